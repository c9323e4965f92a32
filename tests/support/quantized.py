"""Small real models with quantized bases, loaded from real files by transformers, with a LoRA adapter."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from tests.support.training import CHECKPOINTING, VOCABULARY, _require_input_gradients, checkpoint_layer

QUANTIZED = ("nf4", "nf4-nested", "fp4", "int8", "torchao-int8", "torchao-int4", "gptq-like")


@cache
def folder() -> TemporaryDirectory[str]:
    """Return a folder with a float32 checkpoint, the same for all; it goes with the process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    made = TemporaryDirectory(prefix="memplan-tests-")
    LlamaForCausalLM(config).save_pretrained(made.name)
    return made


def make(kind: str, *, dropout: float = 0.0, checkpointing: str = "off", seed: int = 0, **lora: object) -> nn.Module:
    """Return a Llama whose linear layers are quantized, with an adapter whose B is not zero, in training mode."""
    base = AutoModelForCausalLM.from_pretrained(folder().name, **_options(kind), dtype=torch.float32)
    base.requires_grad_(False)
    base.config.use_cache = False
    if kind == "gptq-like":
        _pack(base)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False,
        target_modules=["lm_head"] if kind == "gptq-like" else "all-linear", **lora,
    )  # fmt: skip
    model = get_peft_model(base, config)
    if kind == "gptq-like":
        for layer in base.model.layers:  # PEFT knows no such layer: a gradient must go through the base all the same
            layer.input_layernorm.weight.requires_grad_(True)
    if checkpointing != "off":
        assert checkpointing in CHECKPOINTING
        _require_input_gradients(model)
        for layer in base.model.layers:
            checkpoint_layer(layer, checkpointing)
    return model.train()


def _options(kind: str) -> dict[str, object]:
    if kind == "gptq-like":
        return {}
    if kind in ("nf4", "nf4-nested", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind.removesuffix("-nested"), bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_use_double_quant=kind.endswith("nested"),
        )  # fmt: skip
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

        int8 = kind == "torchao-int8"
        config = TorchAoConfig(Int8WeightOnlyConfig() if int8 else IntxWeightOnlyConfig(weight_dtype=torch.int4))
    return {"quantization_config": config, "device_map": {"": "cpu"}}


class PackedLinear(nn.Module):
    """Weights in buffers, as GPTQ's and AWQ's layers have them: two 4-bit values a byte, a scale and a zero a group."""

    GROUP = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rows, columns = weight.shape
        groups = weight.view(rows, columns // self.GROUP, self.GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = (high - low).clamp_min(1e-8) / 15
        values = ((groups - low) / scales).round().clamp(0, 15).to(torch.uint8).view(rows, columns)
        self.register_buffer("qweight", values[:, ::2] | (values[:, 1::2] << 4))
        self.register_buffer("scales", scales.squeeze(-1))
        self.register_buffer("qzeros", low.squeeze(-1).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Packed.apply(x, self)

    def weight_of(self) -> torch.Tensor:
        values = torch.stack((self.qweight & 15, self.qweight >> 4), -1).flatten(1).float()
        groups = values.view(values.shape[0], -1, self.GROUP)
        return (groups * self.scales.unsqueeze(-1) + self.qzeros.unsqueeze(-1)).flatten(1)


class _Packed(torch.autograd.Function):
    """Dequantizes again in backward, from the module: no saved tensor tells of it."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x @ module.weight_of().t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.module.weight_of(), None


def _pack(model: nn.Module) -> None:
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child))
