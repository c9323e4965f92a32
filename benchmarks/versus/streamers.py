"""Peers of one package each that stream a frozen base under an adapter: TrainStream, BlockStreamer, RamTorch.

Driven by what their own READMEs say, with their own choice of what stays on the card where they make one. They stream
a stack of layers; written for Llama's. Unproven: no GPU has run them, and but for RamTorch they run on nothing else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.versus.contenders import adapted, base_of, stacks, trainables, training
from benchmarks.versus.training import LEARNING_RATE, Setting, Training

BESIDE_BYTES = 4 << 30
"""RamTorch is told how many layers to keep: those that fit beside so much for logits, activations and the window."""


def trainstream(setting: Setting, name: str) -> Training:
    """``wrap``, planning by itself, nothing quantized that was not before."""
    import trainstream as library  # type: ignore[import-not-found, unused-ignore]

    model = adapted(base_of(setting, "cpu"), setting)
    (_, layers), *_ = stacks(model)
    own = torch.optim.AdamW(trainables(model), lr=LEARNING_RATE)
    model, optimizer = library.wrap(model, own, device=setting.device, blocks=list(layers), quantize="none")
    return Training(setting=setting, model=model, optimizer=optimizer)


def block_streamer(setting: Setting, name: str) -> Training:
    """``StreamedModel`` in the place of the layers, one ahead; every layer is recomputed, as it always does."""
    from block_streamer import StreamedModel  # type: ignore[import-not-found, unused-ignore]

    model = adapted(base_of(setting, "cpu"), setting)
    (owner, layers), *_ = stacks(model)
    streamed = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    engine = StreamedModel(list(layers), device=setting.device, prefetch_ahead=1)
    inside = {id(tensor) for tensor in (*engine.parameters(), *engine.buffers())} | streamed
    owner.layers = nn.ModuleList([engine])
    owner.config.num_hidden_layers = 1  # it loops over so many
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(setting.device)
    return training(setting, model.train())


class _Embed(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> Any:
        return self.embedding(ids)


class _Layer(nn.Module):
    """A layer that takes the hidden state alone."""

    def __init__(self, layer: nn.Module, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.angles = (cos, sin)  # no buffers: they stay where they are

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.layer(hidden, position_embeddings=self.angles, attention_mask=None)


class _Head(nn.Module):
    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, hidden: torch.Tensor) -> Any:
        return self.head(self.norm(hidden))


class Engine(Training):
    """RamTorch's: forward and backward are one call."""

    __slots__ = ("engine",)

    def _pass(self) -> None:
        done = self.engine.step(self.batch["input_ids"], targets=self.batch["labels"], loss_fn=_next_token_loss)
        self.engine.flush_grads()
        self.losses.append(done.loss.item())


def _next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


def ramtorch(setting: Setting, name: str) -> Training:
    """``OffloadModel`` of embedding, layers and head, recomputed chunk by chunk; the rest of the card holds layers."""
    from ramtorch import OffloadModel  # type: ignore[import-not-found, unused-ignore]

    model: Any = adapted(base_of(setting, "cpu"), setting)
    (owner, layers), *_ = stacks(model)
    positions = torch.arange(setting.shape[1])[None]
    like = torch.empty(1, dtype=getattr(torch, setting.model.dtype))
    cos, sin = (angle.to(setting.device) for angle in owner.rotary_emb(like, positions))
    head = _Head(owner.norm, model.get_base_model().lm_head)
    chunks = [_Embed(owner.embed_tokens), *(_Layer(layer, cos, sin) for layer in layers), head]
    layer_bytes = sum(parameter.nbytes for parameter in layers[0].parameters())
    room = 0 if setting.card_bytes is None else max(0, setting.card_bytes - BESIDE_BYTES) // layer_bytes
    kept = max(0, min(len(layers), int(room)))
    made = training(setting, model, Engine)
    made.engine = OffloadModel(  # type: ignore[attr-defined, unused-ignore]
        chunks, device=setting.device, window=2, pin_layers=[1 + index * len(layers) // kept for index in range(kept)]
    )
    made.optimizer = torch.optim.AdamW(trainables(model), lr=LEARNING_RATE)  # what it keeps on the card has moved
    return made


STREAMERS: dict[str, Callable[[Setting, str], Training]] = {
    "trainstream": trainstream,
    "block-streamer": block_streamer,
    "ramtorch": ramtorch,
}
PACKAGES = {
    "trainstream": "trainstream", "block-streamer": "block_streamer", "ramtorch": "ramtorch",
    "deepspeed-cpu": "deepspeed", "diffusers-group": "diffusers", "accelerate-cpu": "accelerate",
}  # fmt: skip
NOT_DRIVEN = {"streamft": "trains from its own nf4 checkpoint by its own command line, which nothing here drives"}


def missing(name: str) -> str | None:
    """Return why a peer cannot run here at all, or None."""
    if name in NOT_DRIVEN:
        return NOT_DRIVEN[name]
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed here"
    return None
