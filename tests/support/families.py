"""Families of models in every precision that a base may have: loaded from real files by transformers, with an
adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
    TorchAoConfig,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support import causal_types
from tests.support.training import Plain, batch_of, checkpoint_layer

FAMILIES = (
    "llama", "qwen3", "gemma2", "gpt2", "bloom", "t5", "mixtral-attention", "mixtral-experts", "vit", "zamba2", "plain",
)  # fmt: skip
PRECISIONS = ("float32", "autocast", "bfloat16", "nf4", "nf4-nested", "int8", "torchao-int8")
WIDTH, IMAGE, CLASSES = 64, 16, 5

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_TARGETS: dict[str, list[str] | str] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bloom": ["query_key_value", "dense", "dense_h_to_4h"],
    "t5": ["q", "v", "wi", "wo"],
    "mixtral-attention": _ATTENTION,
    "mixtral-experts": [],
    "zamba2": [*_ATTENTION, "in_proj"],
    "vit": [*_ATTENTION, "fc1", "fc2"],
    "plain": ["up", "down"],
}
_STACKS: dict[str, Callable[[nn.Module], list[nn.ModuleList]]] = {
    "gpt2": lambda base: [base.transformer.h],
    "bloom": lambda base: [base.transformer.h],
    "t5": lambda base: [base.encoder.block, base.decoder.block],
    "vit": lambda base: [base.vit.layers],
    "plain": lambda base: [base.layers],
}
_EMBEDDINGS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "t5": lambda base: [base.encoder.embed_tokens, base.decoder.embed_tokens],
    "vit": lambda base: [base.vit.embeddings],
    "plain": lambda base: [base.embed],
}


def make(family: str, precision: str, checkpointing: str = "off") -> nn.Module:
    """Return a model in training mode, its adapter's B not zero. ``checkpointing``: as in tests/support/training.py."""
    base = _plain(precision) if family == "plain" else _load(family, precision)
    base.requires_grad_(False)
    for parameter in base.parameters():
        if type(parameter) is nn.Parameter:
            # As torch itself would align them: read from a file they lie anywhere, and results differ in their last
            # bits.
            parameter.data = parameter.data.clone()
    torch.manual_seed(1)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "mixtral-experts" else None
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0 if experts else 0.1, init_lora_weights=False,
        target_modules=_TARGETS.get(family, "all-linear"), target_parameters=experts, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = get_peft_model(base, lora)
    if checkpointing != "off":
        # A reentrant checkpoint gives gradients only where an input asks for one.
        for module in _EMBEDDINGS.get(family, lambda base: [base.get_input_embeddings()])(base):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        for stack in _STACKS.get(family, lambda base: [base.model.layers])(base):
            for layer in stack:
                checkpoint_layer(layer, checkpointing)
    return model.train()


def batches(family: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return a micro-batch, another for each seed."""
    if family == "vit":
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (2,), generator=generator)}
    return batch_of(family, seed=seed)


def around(precision: str) -> Callable[[], object]:
    """Return what makes the context of a forward."""
    return (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "autocast" else nullcontext


@cache
def _folder(family: str) -> TemporaryDirectory[str]:
    """Return a folder with a float32 checkpoint; it goes with the process."""
    torch.manual_seed(0)
    made = TemporaryDirectory(prefix="memplan-tests-")
    if family == "t5":
        config = T5Config(
            d_model=WIDTH, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3, num_heads=4,
            vocab_size=causal_types.VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
        )  # fmt: skip
        model: nn.Module = T5ForConditionalGeneration(config)
    elif family == "vit":
        config = ViTConfig(
            image_size=IMAGE, patch_size=4, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = ViTForImageClassification(config)
    else:
        config = causal_types.config_of(family.partition("-")[0])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(made.name)
    return made


def _load(family: str, precision: str) -> nn.Module:
    kinds = {"t5": T5ForConditionalGeneration, "vit": ViTForImageClassification}
    options: dict[str, object] = {"dtype": torch.bfloat16 if precision == "bfloat16" else torch.float32}
    if precision in ("nf4", "nf4-nested", "int8", "torchao-int8"):
        options |= {"quantization_config": _quantization(precision), "device_map": {"": "cpu"}}
    with warnings.catch_warnings(action="ignore"):
        base = kinds.get(family, AutoModelForCausalLM).from_pretrained(_folder(family).name, **options)
    if hasattr(base.config, "use_cache"):
        base.config.use_cache = False
    return base


def _quantization(precision: str) -> object:
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=precision == "nf4-nested",
    )  # fmt: skip


def _plain(precision: str) -> nn.Module:
    """Return a model that no library has made, its linear layers swapped by hand."""
    torch.manual_seed(0)
    model = Plain(width=WIDTH, depth=5, dropout=0.1)
    for layer in model.layers:  # PEFT's adapter takes the place of its own
        layer.lora_a.requires_grad_(False)
    if precision == "bfloat16":
        return model.to(torch.bfloat16)
    if precision == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith((".up", ".down")))
    elif precision in ("nf4", "nf4-nested", "int8"):
        import bitsandbytes as bnb

        for layer in model.layers:
            for name in ("up", "down"):
                old = getattr(layer, name)
                size = (old.in_features, old.out_features)
                if precision == "int8":
                    new = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
                else:
                    new = bnb.nn.Linear4bit(
                        *size,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                        compress_statistics=precision.endswith("ed"),
                    )
                new.load_state_dict(old.state_dict())
                setattr(layer, name, new.to("cpu"))
    return model
