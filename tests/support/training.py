"""Small real models with adapters, ways to checkpoint them, and one way to train: for whole and planned runs alike."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import memplan
from memplan.hardware.profile import Figure, HardwareProfile
from memplan.run.access.dispatched import unasked

ROWS, LENGTH, VOCABULARY = 2, 16, 96
KINDS = ("llama", "gpt2", "t5", "plain")
CHECKPOINTING = ("off", "inside-reentrant", "inside-other", "around-reentrant", "around-other")
QUICK = {
    ("llama", "off"), ("llama", "inside-other"), ("t5", "off"), ("t5", "around-reentrant"), ("gpt2", "around-other"),
    ("plain", "inside-reentrant"),
}  # fmt: skip
EVERY_WAY = [
    pytest.param(kind, way, id=f"{kind}-{way}", marks=() if (kind, way) in QUICK else pytest.mark.full)
    for kind in KINDS
    for way in CHECKPOINTING
]
"""Each kind checkpointed in each way; the quick suite has some, beside the pairs of ``test_parity_cover.py``."""


class PlainLayer(nn.Module):
    """A frozen linear layer with an adapter beside it, written by hand."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.lora_a = nn.Linear(width, 4, bias=False)
        self.lora_b = nn.Linear(4, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(torch.tanh(self.up(h))) + self.lora_b(self.lora_a(self.dropout(h)))


class Decoder(nn.Module):
    """No transformers, no PEFT: ``layers`` between an embedding and a head; returns logits, not a loss."""

    def __init__(self, layers: Iterable[nn.Module], width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora" in name)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Plain(Decoder):
    """A decoder of plain layers."""

    def __init__(self, width: int = 48, depth: int = 6, dropout: float = 0.0) -> None:
        super().__init__((PlainLayer(width, dropout) for _ in range(depth)), width)


def make(kind: str, *, dropout: float = 0.0, checkpointing: str = "off", seed: int = 0) -> nn.Module:
    """Return a model with a LoRA adapter whose B is not zero, in training mode."""
    torch.manual_seed(seed)
    if kind == "plain":
        model = Plain(dropout=dropout)
        stacks = [model.layers]
    else:
        base, targets = _base(kind)
        for module in base.modules():  # a cache would be written to twice where a layer is checkpointed
            if hasattr(module, "config"):
                module.config.use_cache = False
        lora = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2",
        )  # fmt: skip
        model = get_peft_model(base, lora)
        stacks = _stacks(kind, base)
    if checkpointing == "native":
        name = "activation_checkpointing_enable"  # transformers 5.23's name for gradient_checkpointing_enable
        getattr(base, name, base.gradient_checkpointing_enable)({"use_reentrant": False})
    elif checkpointing != "off":
        _require_input_gradients(model)
        for stack in stacks:
            for layer in stack:
                checkpoint_layer(layer, checkpointing)
    return model.train()


def _base(kind: str):
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=VOCABULARY, max_position_embeddings=64, dtype="float32",
        )  # fmt: skip
        return LlamaForCausalLM(config), "all-linear"
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=48, n_layer=5, n_head=4, vocab_size=VOCABULARY, n_positions=64, dtype="float32",
            bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc"]
    config = T5Config(
        d_model=48, d_kv=12, d_ff=96, num_layers=4, num_decoder_layers=4, num_heads=4, vocab_size=VOCABULARY,
        dropout_rate=0.0, decoder_start_token_id=0, dtype="float32",
    )  # fmt: skip
    return T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"]


def _stacks(kind: str, base):
    if kind == "llama":
        return [base.model.layers]
    if kind == "gpt2":
        return [base.transformer.h]
    return [base.encoder.block, base.decoder.block]


def _require_input_gradients(model: nn.Module) -> None:
    """A reentrant checkpoint gives gradients only where an input asks for one."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim > 16:
            module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))


def checkpoint_layer(layer: nn.Module, how: str) -> None:
    """Checkpoint a layer inside its hooks (as transformers 5.23 does) or around them (as earlier ones and users do)."""
    reentrant = how.endswith("-reentrant")
    if how.startswith("inside"):
        original = layer.forward
        layer.forward = lambda *args, **kwargs: checkpoint(partial(original, **kwargs), *args, use_reentrant=reentrant)
        return

    layer.__class__ = _around(type(layer), reentrant)


@cache
def _around(kind: type[nn.Module], reentrant: bool) -> type[nn.Module]:
    class Around(kind):
        def __call__(self, *args, **kwargs):
            return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=reentrant)

    Around.__qualname__ += f" {kind.__qualname__} {reentrant}"  # models are told apart by the names of their classes
    return Around


def batch_of(kind: str, seed: int = 3, length: int = LENGTH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (ROWS, length), generator=generator)
    if kind == "plain":
        return {"input_ids": tokens}
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    labels = torch.randint(1, VOCABULARY, (ROWS, length - 4 if kind == "t5" else length), generator=generator)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def loss_of(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        target = torch.arange(output.shape[1], device=output.device).expand(output.shape[:2]) % VOCABULARY
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())
    return output.loss


@dataclass
class Run:
    """What a run computed: every loss, every gradient, the adapters after it, and how often each layer ran forward."""

    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    adapters: dict[str, torch.Tensor] = field(default_factory=dict)
    forwards: Counter = field(default_factory=Counter)


def train(
    model: nn.Module,
    kind: str,
    *,
    steps: int = 3,
    accumulation: int = 1,
    around_step=None,
    around_forward=nullcontext,
    batches=batch_of,
) -> Run:
    """Train with AdamW; every micro-batch is another one. ``around_step(optimizer)`` is a context for each step,
    ``around_forward()`` for each forward, ``batches(kind, seed=)`` gives the micro-batches.
    """
    run = Run()
    handle = memplan.handle_of(model)
    direct_reads = handle.record.direct_reads if handle is not None else 0
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-2)
    hooks = count_forwards(model, run.forwards)
    torch.manual_seed(11)
    for step in range(steps):
        with around_step(optimizer) if around_step is not None else torch.enable_grad():
            for micro in range(accumulation):
                with around_forward():
                    loss = loss_of(model(**batches(kind, seed=100 + step * accumulation + micro))) / accumulation
                loss.backward()
                run.losses.append(loss.detach().clone())
                del loss
            run.gradients.append({n: p.grad.clone() for n, p in trainables.items() if p.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    run.adapters = {name: p.detach().clone() for name, p in trainables.items()}
    for hook in hooks:
        hook.remove()
    if handle is not None:
        assert handle.record.direct_reads == direct_reads, "a weight was read that no trigger had brought"
    return run


@cache
def whole_run(
    kind: str,
    *,
    make: Callable[..., nn.Module] = make,
    dropout: float = 0.0,
    checkpointing: str = "off",
    steps: int = 3,
    accumulation: int = 1,
) -> Run:
    """What training computes where the whole model is there; trained once in a process, and not to be changed."""
    return train(make(kind, dropout=dropout, checkpointing=checkpointing), kind, steps=steps, accumulation=accumulation)


def as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    """What is in a weight's place, though it may be away: no read of it is served."""
    with torch._C.DisableTorchFunctionSubclass(), unasked():
        return tensor.detach().clone().as_subclass(torch.Tensor)


def count_forwards(model: nn.Module, counter: Counter):
    """Count calls of each leaf with frozen weights: a lost checkpoint, or one too many, shows there.

    In place of its forward: a hook that comes after the plan is called once, however often its layer runs.
    """

    def counted(name, forward):
        def run(*args, **kwargs):
            counter[name] += 1
            return forward(*args, **kwargs)

        return run

    hooks = []
    for name, module in model.named_modules():
        if any(not p.requires_grad for p in module.parameters(recurse=False)):
            hooks.append(Replaced(module, module.__dict__.get("forward")))
            module.forward = counted(name, module.forward)
    return hooks


@dataclass
class Replaced:
    module: nn.Module
    forward: object

    def remove(self) -> None:
        del self.module.forward
        if self.forward is not None:
            self.module.forward = self.forward


def assert_equal(one: Run, other: Run) -> None:
    """Losses, gradients and adapters are equal to the last bit."""
    assert len(one.losses) == len(other.losses)
    for index, (a, b) in enumerate(zip(one.losses, other.losses, strict=True)):
        assert torch.equal(a, b), f"loss {index}: {a.item()!r} and {b.item()!r}"
    for step, (a, b) in enumerate(zip(one.gradients, other.gradients, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), f"gradient of {name} in step {step}"
    assert one.adapters.keys() == other.adapters.keys()
    for name in one.adapters:
        assert torch.equal(one.adapters[name], other.adapters[name]), name


def _figure(value: float) -> Figure:
    return Figure(value=value, kind="assumed", source="tests", date="2026-11-23")


CPU = HardwareProfile(
    schema_version=1,
    name="test-cpu",
    description="round figures, so that plans do not depend on the machine that tests",
    device="cpu",
    device_bytes=_figure(16 * 2**30),
    host_bytes=_figure(16 * 2**30),
    matmul_flops_per_s={"float32": _figure(5e10)},
    memory_bytes_per_s=_figure(1e10),
    host_to_device_bytes_per_s=_figure(5e9),
    device_to_host_bytes_per_s=_figure(5e9),
    disk_bytes_per_s=_figure(1e9),
    launch_s=_figure(1e-6),
    load_latency_s=_figure(1e-4),
    context_bytes=_figure(0),
)


def assert_only_whole_blocks(cache) -> None:
    """A cache holds packed blocks with the very bytes that their names promise, and nothing half written."""
    blocks = cache / "blocks"
    assert {path.name for path in cache.iterdir()} <= {"blocks"}
    for path in blocks.iterdir() if blocks.exists() else ():
        assert path.suffix in (".block", ".json"), path
        if path.suffix == ".block":
            assert hashlib.blake2b(path.read_bytes(), digest_size=20).hexdigest() == path.stem
