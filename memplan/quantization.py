"""A model on ``meta`` -> the same with quantized linear layers, as they are once loaded: shapes and dtypes, no values.

bitsandbytes' and torchao's layers are their own, in the layout that they have after quantization. Of formats whose kernels are
not at hand (GPTQ, AWQ, torchao's int4) a layer of memplan's own has the tensors in their true sizes and dequantizes its whole
weight for each product: an upper bound, and named as one in a plan's notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.errors import InputError, ModelError

NAMES = (
    "nf4", "nf4-nested", "fp4", "fp4-nested", "int8", "torchao-int8", "torchao-int4", "torchao-float8", "gptq", "awq",
)  # fmt: skip
"""What ``plan(quantization=...)`` takes: bitsandbytes' first, ``nested`` with doubly quantized scales."""

_BLOCK, _NESTED_BLOCK = 64, 256
"""Elements that share a scale in bitsandbytes, and scales that share one."""
_GROUP = 128
"""Rows that share a scale in GPTQ and AWQ, unless said otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a model's linear layers are quantized."""

    method: str
    """``bnb-4bit``, ``bnb-8bit``, ``torchao`` or ``packed``."""
    name: str
    """For people, and which of the method's kinds it is."""
    kind: Any = None
    """bitsandbytes' 4-bit type; torchao's configuration."""
    nested: bool = False
    compute_dtype: torch.dtype | None = None
    """None: the model's own."""
    bits: int = 4
    group: int = _GROUP
    skip: tuple[str, ...] | None = None
    """Names of modules that are left as they are; None: those that transformers leaves."""


# ---- what was asked ---------------------------------------------------------------------------------------------------


def by_name(name: Any) -> Quantization:
    """Return the quantization of a name of ``NAMES``. Raises InputError for another."""
    if name not in NAMES:
        raise InputError(f"the quantization was given as {name!r}: give one of {', '.join(NAMES)}")
    if name == "int8":
        return Quantization(method="bnb-8bit", name=name)
    if name in ("gptq", "awq", "torchao-int4"):
        return Quantization(method="packed", name=name)
    if name.startswith("torchao-"):
        kinds = {"torchao-int8": "Int8WeightOnlyConfig", "torchao-float8": "Float8WeightOnlyConfig"}
        return Quantization(method="torchao", name=name, kind=getattr(_torchao(), kinds[name])())
    return Quantization(method="bnb-4bit", name=name, kind=name[:3], nested=name.endswith("-nested"))


def of_configuration(given: Any) -> Quantization:
    """Return the quantization that a configuration's ``quantization_config`` says. Raises ModelError for an unknown one."""
    said: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(said.get("quant_method"), "value", said.get("quant_method", "")))
    skipped = said.get("modules_to_not_convert") or said.get("llm_int8_skip_modules")
    skip = None if skipped is None else tuple(skipped)
    if method in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit") or "load_in_4bit" in said:
        if said.get("load_in_8bit") or said.get("_load_in_8bit"):
            return Quantization(method="bnb-8bit", name="int8", skip=skip)
        kind, nested = said.get("bnb_4bit_quant_type", "fp4"), bool(said.get("bnb_4bit_use_double_quant"))
        if kind not in ("nf4", "fp4"):
            raise ModelError(f"the configuration's bnb_4bit_quant_type is {kind!r}: nf4 and fp4 are known")
        compute = getattr(torch, str(said.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."), None)
        if not isinstance(compute, torch.dtype):
            raise ModelError(
                f"the configuration's bnb_4bit_compute_dtype is {said['bnb_4bit_compute_dtype']!r}: no dtype"
            )
        name = f"{kind}-nested" if nested else kind
        return Quantization(method="bnb-4bit", name=name, kind=kind, nested=nested, compute_dtype=compute, skip=skip)
    if method in ("gptq", "awq"):
        bits, group = said.get("bits", said.get("w_bit", 4)), said.get("group_size", said.get("q_group_size", _GROUP))
        if bits not in (2, 3, 4, 8) or not isinstance(group, int) or group == 0:
            raise ModelError(
                f"the configuration's {method} has bits {bits!r} and group_size {group!r}: these are not known"
            )
        return Quantization(method="packed", name=method, bits=bits, group=group, skip=skip)
    if method == "torchao":
        kind = getattr(given, "quant_type", None)
        if kind is None or isinstance(kind, (str, dict)):
            from transformers import TorchAoConfig

            kind = TorchAoConfig.from_dict(said).quant_type
        if "Int4" in type(kind).__name__:
            group = getattr(kind, "group_size", _GROUP)
            return Quantization(method="packed", name="torchao-int4", group=group, skip=skip)
        return Quantization(method="torchao", name=f"torchao {type(kind).__name__}", kind=kind, skip=skip)
    raise ModelError(
        f"the configuration is quantized by {method or 'an unnamed method'}, which memplan does not know: give one without "
        f"quantization_config, and quantization= one of {', '.join(NAMES)}"
    )


# ---- on meta ----------------------------------------------------------------------------------------------------------


def quantize(model: nn.Module, how: Quantization) -> None:
    """Quantize the linear layers of a model on ``meta`` in place, all but those that transformers leaves (the head).

    Raises InputError where a library that it takes is not installed, ModelError where it cannot be done.
    """
    chosen = list(_chosen(model, how))
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer within it to quantize: leave quantization out")
    try:
        if how.method == "torchao":
            names = {id(layer) for _, layer in chosen}
            _torchao().quantize_(model, how.kind, filter_fn=lambda module, name: id(module) in names)
        else:
            make = {"bnb-4bit": _four_bits, "bnb-8bit": _eight_bits, "packed": _packed}[how.method]
            for name, layer in chosen:
                model.set_submodule(name, make(layer, how))
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} cannot be quantized as {how.name}: {text}") from error
    model.requires_grad_(False)


def notes(model: nn.Module) -> list[str]:
    """Return what a reader should know of layers that stand for others' kernels."""
    names = sorted({module.format for module in model.modules() if isinstance(module, PackedLinear)})
    if not names:
        return []
    return [
        f"The kernels of {' and '.join(names)} were not traced: their weights have their true sizes, and each product counts a "
        "whole dequantized weight, which is about the most that they take."
    ]


def _chosen(model: nn.Module, how: Quantization) -> Iterator[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = None if how.skip is None else list(how.skip)
    in_full = getattr(model, "_keep_in_fp32_modules", None)
    asked: Any = HfQuantizer
    left = asked.get_modules_to_not_convert(
        model, skipped, None if in_full is None else list(in_full), add_default_skips=how.method == "packed"
    )
    kinds = (nn.Linear, Conv1D) if how.method.startswith("bnb") else (nn.Linear,)
    for name, module in model.named_modules():
        if type(module) in kinds and should_convert_module(name, left):
            yield name, module


def _sizes(layer: Any) -> tuple[int, int, torch.dtype]:
    """Return the widths of what goes in and comes out, and the dtype."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, layer.weight.dtype
    rows, columns = layer.weight.shape
    return int(rows), int(columns), layer.weight.dtype


def _on_meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _finished(made: Any, layer: Any) -> nn.Module:
    """Return the new layer with the old one's bias."""
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    made.source_cls = type(layer)  # as transformers notes it
    finished: nn.Module = made
    return finished


def _four_bits(layer: Any, how: Quantization) -> nn.Module:
    bnb = _bitsandbytes()
    inner, outer, dtype = _sizes(layer)
    made = bnb.nn.Linear4bit(
        inner, outer, layer.bias is not None, how.compute_dtype or dtype, compress_statistics=how.nested,
        quant_type=how.kind, device="meta",
    )  # fmt: skip
    count = inner * outer
    scales = -(-count // _BLOCK)
    state = {"shape": torch.Size((outer, inner)), "blocksize": _BLOCK, "quant_type": how.kind, "dtype": dtype}
    code = _on_meta(16, dtype=torch.float32)
    if how.nested:
        second = bnb.functional.QuantState(
            absmax=_on_meta(-(-scales // _NESTED_BLOCK), dtype=torch.float32), blocksize=_NESTED_BLOCK,
            code=_on_meta(256, dtype=torch.float32), dtype=torch.float32,
        )  # fmt: skip
        made_state = bnb.functional.QuantState(
            absmax=_on_meta(scales, dtype=torch.uint8), code=code, offset=_on_meta(dtype=torch.float32), state2=second,
            **state,
        )  # fmt: skip
    else:
        made_state = bnb.functional.QuantState(absmax=_on_meta(scales, dtype=torch.float32), code=code, **state)
    made.weight = bnb.nn.Params4bit(
        _on_meta(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False, quant_state=made_state, blocksize=_BLOCK,
        compress_statistics=how.nested, quant_type=how.kind, module=made, bnb_quantized=True,
    )  # fmt: skip
    made.quant_state = made_state
    return _finished(made, layer)


def _eight_bits(layer: Any, how: Quantization) -> nn.Module:
    bnb = _bitsandbytes()
    inner, outer, _ = _sizes(layer)
    made = bnb.nn.Linear8bitLt(
        inner, outer, layer.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    values = _on_meta(outer, inner, dtype=torch.int8)
    made.weight = bnb.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=_on_meta(outer, dtype=torch.float32)
    )
    return _finished(made, layer)


def _packed(layer: Any, how: Quantization) -> nn.Module:
    return _finished(PackedLinear(layer, how), layer)


class PackedLinear(nn.Linear):
    """Stands for a layer of GPTQ, AWQ or torchao's int4: its tensors in their sizes, on ``meta``, and about its work."""

    def __init__(self, layer: nn.Linear, how: Quantization) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format = layer.in_features, layer.out_features, how.name
        dtype = torch.bfloat16 if how.name == "torchao-int4" else torch.float16
        group = how.group if how.group > 0 else layer.in_features
        groups, words = -(-layer.in_features // group), 32 // how.bits if 32 % how.bits == 0 else 32 / how.bits
        packed = (math.ceil(layer.in_features / words), layer.out_features)
        if how.name == "awq":
            packed = (layer.in_features, math.ceil(layer.out_features / words))
        zeros = (groups, math.ceil(layer.out_features / words))
        self.register_buffer("qweight", _on_meta(*packed, dtype=torch.int32))
        self.register_buffer("scales", _on_meta(groups, layer.out_features, dtype=dtype))
        if how.name == "torchao-int4":
            self.register_buffer("qzeros", _on_meta(groups, layer.out_features, dtype=dtype))
        else:
            self.register_buffer("qzeros", _on_meta(*zeros, dtype=torch.int32))
        if how.name == "gptq":
            self.register_buffer("g_idx", _on_meta(layer.in_features, dtype=torch.int32))
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        bias: torch.Tensor | None = self._parameters["bias"]
        return made if bias is None else made + bias

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a weight of the right shape that all the layer's tensors were read for."""
        held: dict[str, Any] = self._buffers
        rows = -(-self.in_features // held["scales"].shape[0])
        weight: torch.Tensor = held["scales"].repeat_interleave(rows, 0)[: self.in_features]
        weight.add_(held["qweight"].sum()).add_(held["qzeros"].sum())
        return weight.to(dtype)


class _Product(torch.autograd.Function):
    """Dequantizes anew in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.dequantized(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.layer.dequantized(gradient.dtype).t(), None


# ---- libraries --------------------------------------------------------------------------------------------------------


def _bitsandbytes() -> Any:
    return _library("bitsandbytes", lambda: __import__("bitsandbytes"))


def _torchao() -> Any:
    def opened() -> Any:
        import torchao.quantization

        return torchao.quantization

    return _library("torchao", opened)


def _library(name: str, opened: Callable[[], Any]) -> Any:
    try:
        return opened()
    except ImportError as error:
        raise InputError(
            f"layers of {name} are asked for, which is not installed: pip install 'memplan[quant]'"
        ) from error
