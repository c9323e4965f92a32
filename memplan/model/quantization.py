"""Quantized modules in the place of a model's linear ones, on ``meta``: what loading it with a quantizer would give.

bitsandbytes' and torchao's modules are made by those libraries themselves, whose own functions run on ``meta``; which
modules they take is what transformers says. Of GPTQ, AWQ and torchao's packed int4, whose kernels need a GPU and
libraries of their own, stand-ins have the tensors in their true shapes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memplan.errors import InputError, ModelError
from memplan.model.arguments import QUANTIZATIONS, not_installed

_LIBRARY = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""What a method's modules are made by. Of the other methods known here nothing is needed."""
_SOME_MODULES = "modules_in_block_to_quantize"
_STOOD_IN_FOR = {"gptq": "GPTQ's", "awq": "AWQ's", "torchao": "torchao's int4"}
_BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-nested": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "fp4-nested": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
}
_TORCHAO = {
    "torchao-int8": "Int8WeightOnlyConfig",
    "torchao-int4": "Int4WeightOnlyConfig",
    "torchao-float8": "Float8WeightOnlyConfig",
}
_PACKED: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
}
NAMES = QUANTIZATIONS
"""What may be asked for by a word: those above, and ``int8`` of bitsandbytes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Quantization:
    """How a model is quantized, in two steps: between them the parameters that stay in float32 are made so."""

    settings: Any
    """transformers' configuration of it."""
    quantizer: Any
    """transformers' own, or None where it would need a library that makes the modules."""

    def begin(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put modules that are not quantized yet in place, as transformers does before it loads."""
        if self.quantizer is not None:
            if _method(self.settings) == "torchao":
                self.quantizer.validate_environment()  # it notes there what it asks for later
            more: dict[str, Any] = {}
            if type(self.quantizer).__module__.startswith("diffusers."):
                more["keep_in_fp32_modules"] = list(getattr(model, "_keep_in_fp32_modules", None) or ())
            with _default_dtype(dtype):
                self.quantizer.preprocess_model(model, dtype=dtype, device_map=None, **more)

    def finish(self, model: nn.Module) -> tuple[str, ...]:
        """Quantize what is in place; return what is to be said of it. Raises ModelError for what cannot be planned."""
        method = _method(self.settings)
        if method == "bitsandbytes":
            _with_bitsandbytes(model)
        elif method == "torchao" and type(self.settings.quant_type).__name__ != "Int4WeightOnlyConfig":
            _with_torchao(model, self.quantizer)
        else:
            _with_stand_ins(model, self.settings, self.quantizer)
        if self.quantizer is None:  # PEFT asks for these
            marked: Any = model
            marked.is_quantized, marked.quantization_method = True, self.settings.quant_method
            marked.config.quantization_config = self.settings
        else:
            held: Any = model
            held.hf_quantizer = self.quantizer
            self.quantizer.postprocess_model(model)
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            return ()
        return (
            f"{_STOOD_IN_FOR[method]} kernels were not traced: each product is counted as one that dequantizes its "
            "weight whole, in forward and again in backward; what a kernel allocates besides, or spares, is an "
            "estimate.",
        )


def quantization_of(given: Any, dtype: torch.dtype) -> Quantization:
    """Return what was asked for: by one of :data:`NAMES`, by a dictionary, or by transformers' configuration of it.

    ``dtype``: the model's, in which 4-bit products are computed where a name alone is given. Raises InputError for what
    is not known or whose library is not there, ModelError for a method that cannot be planned.
    """
    import transformers
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    if isinstance(given, str):
        settings = _named(transformers, given, dtype)
    elif isinstance(given, Mapping) or hasattr(given, "quant_method"):
        method = _method(given)
        if method not in {*_LIBRARY, "gptq", "awq"}:
            raise ModelError(
                f"the quantization is {method or 'of no method'}, whose stored sizes are not planned: give "
                "--quantization none (quantization='none') to plan the model dequantized, as adapters are trained on "
                "it, or load it and plan it as an nn.Module"
            )
        _require(method)
        try:
            settings = copy.deepcopy(given)
            if isinstance(given, Mapping):
                named = settings.pop(_SOME_MODULES, None)  # transformers asks for optimum where there are any
                settings = AutoQuantizationConfig.from_dict(dict(settings))
                if method == "gptq":
                    settings.modules_in_block_to_quantize = named
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise InputError(f"the quantization cannot be used: {error}. Check its settings") from error
    else:
        raise InputError(
            f"the quantization is a {type(given).__name__}: give one of {', '.join(NAMES)}, or transformers' "
            "configuration of it"
        )
    own = _method(settings) in _LIBRARY
    return Quantization(
        settings=settings, quantizer=AutoHfQuantizer.from_config(settings, pre_quantized=False) if own else None
    )


def of_diffusers(name: object, dtype: torch.dtype) -> Quantization:
    """Return what was asked for of a model of diffusers: by a name of bitsandbytes'. Raises InputError for others."""
    if name != "int8" and name not in _BITSANDBYTES:
        raise InputError(
            f"the quantization was given as {name!r} with a model of diffusers: give one of "
            f"{', '.join((*_BITSANDBYTES, 'int8'))}, or the nn.Module as loaded"
        )
    _require("bitsandbytes")
    import diffusers
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    bits: dict[str, Any] = {"load_in_8bit": True}
    if name != "int8":
        bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype, **_BITSANDBYTES[str(name)]}
    made: Any = diffusers.BitsAndBytesConfig
    settings = made(**bits)
    return Quantization(settings=settings, quantizer=DiffusersAutoQuantizer.from_config(settings, pre_quantized=False))


def _named(transformers: Any, name: str, dtype: torch.dtype) -> Any:
    if name not in NAMES:
        raise InputError(f"the quantization was given as {name!r}: give one of {', '.join(NAMES)}")
    if name in _PACKED:
        from transformers.quantizers.auto import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict(_PACKED[name])
    if name in _TORCHAO:
        library = _require("torchao")
        return transformers.TorchAoConfig(getattr(importlib.import_module(f"{library}.quantization"), _TORCHAO[name])())
    _require("bitsandbytes")
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **_BITSANDBYTES[name])


def _method(given: Any) -> str:
    held = given if isinstance(given, Mapping) else vars(given)
    if held.get("load_in_4bit") or held.get("load_in_8bit"):
        return "bitsandbytes"
    method = held.get("quant_method", "")
    return str(getattr(method, "value", method))


def _require(method: str) -> str:
    """Return the name of the library that a method needs. Raises InputError where it cannot be imported."""
    library = _LIBRARY.get(method, "")
    if library:
        try:
            importlib.import_module(library)
        except ImportError as error:
            raise not_installed(library) from error
    return library


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---- by the libraries themselves
# ----------------------------------------------------------------------------------------


def _with_bitsandbytes(model: nn.Module) -> None:
    bitsandbytes: Any = importlib.import_module("bitsandbytes")
    functional = bitsandbytes.functional
    # It is kept for the whole process, on the device where it is first asked for: not on meta.
    if "dynamic" not in functional.name2qmap:
        functional.name2qmap["dynamic"] = functional.create_dynamic_map()
    for module in model.modules():
        if isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            module.weight._quantize(torch.device("meta"))  # what a move to a device does


def _with_torchao(model: nn.Module, quantizer: Any) -> None:
    convert = quantizer.get_quantize_ops().convert
    for name, parameter in list(model.named_parameters()):
        if quantizer.param_needs_quantization(model, name):
            given = {name: parameter.detach()}
            # What it gives back is a head that was untied.
            for other, tensor in convert(given, model=model, full_layer_name=name, missing_keys=set()).items():
                owner, _, own = other.rpartition(".")
                setattr(model.get_submodule(owner), own, nn.Parameter(tensor, requires_grad=False))


# ---- stand-ins
# ----------------------------------------------------------------------------------------------------------

torch.library.define("memplan::dequantize", "(Tensor[] packed, int rows, int columns, ScalarType dtype) -> Tensor")


@torch.library.register_fake("memplan::dequantize")  # type: ignore[untyped-decorator]
def _dequantize(packed: list[torch.Tensor], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return packed[0].new_empty((rows, columns), dtype=dtype)


class PackedLinear(nn.Linear):
    """Stands in for a linear layer of several weights a word. It can be traced, not run."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, packed: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("weight", None)  # PEFT looks for one
        self.names = tuple(packed)
        for name, (shape, dtype) in packed.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.register_buffer("bias", torch.empty(outputs, dtype=torch.float16, device="meta") if bias else None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        bias: torch.Tensor | None = self._buffers["bias"]
        return made if bias is None else made + bias.to(made.dtype)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, inputs x outputs."""
        packed = [getattr(self, name) for name in self.names]
        made: torch.Tensor = torch.ops.memplan.dequantize(packed, self.in_features, self.out_features, dtype)
        return made


class _Product(torch.autograd.Function):
    """Dequantizes again in backward: nothing of the weight is saved."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, module: PackedLinear) -> torch.Tensor:
        ctx.module = module
        return given @ module.dequantized(given.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ ctx.module.dequantized(gradient.dtype).t(), None


def _with_stand_ins(model: nn.Module, settings: Any, quantizer: Any) -> None:
    from transformers.pytorch_utils import Conv1D

    method = _method(settings)
    if method == "gptq":
        wanted = _gptq_takes(settings)
    else:
        wanted = _others_take(model, settings, quantizer)
    for name, module in list(model.named_modules()):
        if not wanted(name):
            continue
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
        elif type(module) is nn.Linear:
            inputs, outputs = module.in_features, module.out_features
        elif any(parameter.dim() > 2 for parameter in module._parameters.values() if parameter is not None):
            raise ModelError(
                f"{name} holds the weights of several layers in one, and {_STOOD_IN_FOR[method]} layout of such is "
                "not known: load the model and plan it as an nn.Module"
            )
        else:
            continue
        packed = _layout(settings, inputs, outputs)
        if packed is not None:
            model.set_submodule(name, PackedLinear(inputs, outputs, module.bias is not None, packed))


def _gptq_takes(settings: Any) -> Callable[[str], bool]:
    """Return whether a module of this name is taken: those in the repeated layers, or of them the ones that are
    named.
    """
    named = settings.modules_in_block_to_quantize
    ends = (
        None
        if named is None
        else tuple(part for group in named for part in ([group] if isinstance(group, str) else group))
    )

    def takes(name: str) -> bool:
        return any(part.isdigit() for part in name.split(".")) and (ends is None or name.endswith(ends))

    return takes


def _others_take(model: nn.Module, settings: Any, quantizer: Any) -> Callable[[str], bool]:
    """Return whether a module of this name is taken: all but the head and those that are named."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    typed: Any = model
    spared = HfQuantizer.get_modules_to_not_convert(
        typed, settings.modules_to_not_convert, typed._keep_in_fp32_modules, add_default_skips=quantizer is None
    )
    return lambda name: bool(name) and should_convert_module(name, spared)


def _layout(settings: Any, inputs: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
    """Return shapes and dtypes as checkpoints have them; None for a layer that is left as it is.

    GPTQ's and AWQ's (gemm) as gptqmodel registers its buffers, torchao's as its Int4Tensor has them.
    """
    method = _method(settings)
    if method == "torchao":
        group = settings.quant_type.group_size
        if inputs % group:
            return None
        scales = ((inputs // group, outputs), torch.bfloat16)
        return {"qweight": ((outputs, inputs // 2), torch.int8), "scales": scales, "qzeros": scales}
    bits = settings.bits
    group = inputs if settings.group_size == -1 else settings.group_size
    groups, words = -(-inputs // group), -(-outputs * bits // 32)
    found = {
        "qweight": ((-(-inputs * bits // 32), outputs) if method == "gptq" else (inputs, words), torch.int32),
        "qzeros": ((groups, words), torch.int32),
        "scales": ((groups, outputs), torch.float16),
    }
    return found | ({"g_idx": ((inputs,), torch.int32)} if method == "gptq" else {})
