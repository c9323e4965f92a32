"""The tensors that frozen weights are made of. A parameter is one; a quantized one is several.

They are what moves. Each is re-pointed by its ``.data``, so that whoever holds the tensor (a quantizer's state,
autograd) sees what it points at. What a quantizer keeps besides (code tables, an offset: a few bytes each) stays on the
device.

Known by their form, without importing any quantizer: bitsandbytes' 4-bit and 8-bit parameters, tensors made of tensors
(torchao's), and the buffers of GPTQ- and AWQ-like layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memplan.model.names import canonical

_BUFFERS = {"qweight", "qzeros", "scales", "g_idx"}
"""Weight buffers of GPTQ- and AWQ-like layers; ``qweight`` marks one."""
_ADAPTERS: WeakSet[nn.Module] = WeakSet()
"""Modules that are an adapter's own, or that one replaces the weights of (:func:`mark_adapters`)."""
_PACKED = "packing_format_for_cpu"
_REPACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weight:
    """One tensor of frozen weights."""

    name: str
    """Where a checkpoint of this format has it."""
    tensor: torch.Tensor
    twins: tuple[torch.Tensor, ...] = ()
    """Other tensors over the same memory, which must always be pointed where it is."""

    def everywhere(self) -> tuple[torch.Tensor, ...]:
        """Return all tensors to point."""
        return (self.tensor, *self.twins)

    def bind(self, there: torch.Tensor) -> None:
        """Have it lie at ``there``."""
        for tensor in self.everywhere():
            tensor.data = there


def frozen_weights(name: str, module: nn.Module, *, deep: bool) -> tuple[Weight, ...]:
    """Return the frozen weights of a module by canonical name, in module order; of all within it too where ``deep``."""
    found: dict[int, Weight] = {}
    for inner, part in module.named_modules(prefix=name) if deep else ((name, module),):
        for weight in own_weights(part, f"{inner}." if inner else ""):
            found.setdefault(
                id(weight.tensor), Weight(name=canonical(weight.name), tensor=weight.tensor, twins=weight.twins)
            )
    return tuple(found.values())


def mark_adapters(model: nn.Module) -> None:
    """Have what is an adapter's own be known as such: it is no frozen weight, though it may not be trained just now.

    Adapters are exchanged while they train (PEFT's ``set_adapter``), and those that wait are frozen meanwhile.
    """
    for module in model.modules():
        _ADAPTERS.discard(module)
    for module in model.modules():
        names = list(getattr(module, "adapter_layer_names", ()))
        if hasattr(module, "original_module"):
            names.append("modules_to_save")
        for name in names:
            held = getattr(module, name, None)
            for part in held.modules() if isinstance(held, nn.Module) else ():
                _ADAPTERS.add(part)
        _ADAPTERS.update(_replaced_by_adapter(module))


def _replaced_by_adapter(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose frozen parameters an adapter replaces by new ones in every forward.

    [Note: attention that is merged] PEFT's LoRA on ``nn.MultiheadAttention`` merges itself into ``in_proj_weight`` and
    into the output's weight, and takes itself out again; and it makes new parameters whenever its modules are listed.
    No address of theirs lasts, so they stay with the adapter.
    """
    base: Any = module._modules.get("base_layer")
    if isinstance(base, nn.MultiheadAttention):
        yield base
        yield base.out_proj._modules.get("base_layer") or base.out_proj


def is_adapters(module: nn.Module) -> bool:
    """Whether a module's parameters are no frozen weights, but go with an adapter (:func:`mark_adapters`)."""
    return module in _ADAPTERS


Multiplicity = Callable[[str], int]
"""For how many modules of a whole model the one of a name stands, where the model is a part of it."""


def once(name: str) -> int:
    """Return that a module stands for itself."""
    return 1


def trained(model: nn.Module, times: Multiplicity = once) -> list[nn.Parameter]:
    """Return the parameters that require gradients, each as often as there are such."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for _ in range(times(canonical(name)))
    ]


def trained_bytes(model: nn.Module, times: Multiplicity = once) -> int:
    """Return the bytes of the parameters that require gradients."""
    return sum(p.numel() * p.element_size() for p in trained(model, times))


def adapters_bytes(model: nn.Module, times: Multiplicity = once) -> int:
    """Return the bytes of what is trained and of adapters that wait."""
    found = {
        id(parameter): parameter.numel() * parameter.element_size() * times(canonical(name))
        for name, module in model.named_modules()
        for parameter in module._parameters.values()
        if parameter is not None and (parameter.requires_grad or module in _ADAPTERS)
    }
    return sum(found.values())


def own_weights(module: nn.Module, prefix: str = "") -> Iterator[Weight]:
    """Yield the frozen weights that the module itself holds, by the names that its ``state_dict`` gives them."""
    if module in _ADAPTERS:
        return
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.requires_grad:
            yield from _weights_of(prefix, name, parameter, module)
    if "qweight" in module._buffers:
        for name, buffer in module._buffers.items():
            if buffer is not None and name in _BUFFERS:
                yield Weight(name=prefix + name, tensor=buffer)


def _weights_of(prefix: str, name: str, parameter: nn.Parameter, module: nn.Module) -> Iterator[Weight]:
    full = prefix + name
    if is_wrapper(parameter):
        yield from (Weight(name=f"{full}.{part}", tensor=tensor) for part, tensor in _named_parts(parameter))
        return
    kind = type(parameter).__name__
    state = _quant_state(parameter, module)
    if state is not None:
        yield Weight(name=full, tensor=parameter)
        yield Weight(name=f"{full}.absmax", tensor=state.absmax)
        if state.nested:
            yield Weight(name=f"{full}.nested_absmax", tensor=state.state2.absmax)
        return
    if kind == "Int8Params":
        # Before its first forward the parameter has them, from then on the module's state.
        state = getattr(module, "state", None)
        held = [t for t in (getattr(parameter, "CB", None), getattr(state, "CB", None)) if t is not None]
        yield Weight(name=full, tensor=parameter, twins=tuple(held))
        scales = [t for t in (getattr(parameter, "SCB", None), getattr(state, "SCB", None)) if t is not None]
        if scales:
            yield Weight(name=f"{prefix}SCB", tensor=scales[0])
        return
    yield Weight(name=full, tensor=parameter)


def small_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what a quantizer keeps beside a module's own weights and what never moves: tables and offsets."""
    for parameter in module._parameters.values():
        state = _quant_state(parameter, module)
        if state is not None:
            second = state.state2
            for tensor in (state.code, state.offset, second.code if second is not None else None):
                if isinstance(tensor, torch.Tensor):
                    yield tensor


def is_quantizer_state(value: object) -> bool:
    """Whether an attribute is an object in which bitsandbytes keeps tensors."""
    return type(value).__name__ in ("QuantState", "MatmulLtState")


def is_quantized(tensor: object) -> bool:
    """Whether a tensor is a parameter of bitsandbytes, which keeps tensors in its attributes."""
    return type(tensor).__name__ in ("Params4bit", "Int8Params")


def unknown_kind(parameter: torch.Tensor) -> str | None:
    """Return the name of a parameter's class where what its weights are made of is not known, else None."""
    kind = kind_of(parameter)
    if kind in (nn.Parameter, torch.Tensor, FakeTensor) or is_wrapper(parameter):
        return None
    return None if is_quantized(parameter) else kind.__name__


def unready(parameter: torch.Tensor, module: nn.Module) -> str | None:
    """Return why a quantized parameter cannot be managed as it is, or None."""
    if type(parameter).__name__ == "Params4bit":
        state = _quant_state(parameter, module)
        if state is None:
            return "has not been quantized yet: move it to its device once"
        if getattr(state, _PACKED, False):
            return "was repacked for inference on this CPU by an evaluation: load the model anew"
    if type(parameter).__name__ == "Int8Params" and parameter.dtype is not torch.int8:
        return "has not been quantized yet: move it to its device once"
    return None


def kind_of(tensor: object) -> type:
    """Return a tensor's own class: between its accesses a streamed weight is of another
    (:mod:`memplan.run.access.direct_access`).
    """
    kind = type(tensor)
    own: type = kind.__dict__.get("_memplan_kind", kind)
    return own


def is_wrapper(tensor: object) -> bool:
    """Whether a tensor is made of others (torchao's quantized ones)."""
    kind = kind_of(tensor)
    return kind not in (torch.Tensor, nn.Parameter, FakeTensor) and is_traceable_wrapper_subclass(tensor)


def keep_layout(module: nn.Module) -> Callable[[], None] | None:
    """Have bitsandbytes leave a module's 4-bit weights in their layout; return what undoes it, or None if it does
    anyway.

    In an evaluation on some CPUs it repacks them into new tensors: no gradient goes through those, and an
    address of theirs would no longer hold what is read.
    """
    held = module.__dict__.get(_REPACKS)
    if not held:
        return None
    module.__dict__[_REPACKS] = type(held)(0)
    return lambda: module.__dict__.update({_REPACKS: held})


def is_wrapper_type(kind: type) -> bool:
    """Whether tensors of a class are made of others."""
    return kind is not FakeTensor and hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the plain tensors that a tensor is made of; none for one on ``meta``, which holds no memory."""
    for part in wrapped_parts(tensor):
        # A fake tensor's device is what it stands for, and asking for it is slow.
        if type(part) is FakeTensor or part.device.type != "meta":
            yield part


def wrapped_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that a tensor is made of, or itself."""
    if is_wrapper(tensor):
        yield from (part for _, part in _named_parts(tensor))
    else:
        yield tensor


def rewrapped(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return a tensor that is made of others with each of them changed; any other one is changed itself."""
    if not is_wrapper(tensor):
        return change(tensor)
    wrapper: Any = tensor
    with torch._C.DisableTorchFunctionSubclass():  # a streamed weight that is away would ask for itself
        size, stride = wrapper.size(), wrapper.stride()
    names, context = wrapper.__tensor_flatten__()
    parts = {name: rewrapped(getattr(wrapper, name), change) for name in names}
    kind: Any = kind_of(wrapper)
    made: torch.Tensor = kind.__tensor_unflatten__(parts, context, size, stride)
    return made


def _named_parts(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    wrapper: Any = tensor
    for name in wrapper.__tensor_flatten__()[0]:
        part = getattr(wrapper, name)
        if is_wrapper(part):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in _named_parts(part))
        else:
            yield name, part


def _quant_state(parameter: Any, module: nn.Module) -> Any:
    if type(parameter).__name__ != "Params4bit":
        return None
    state = getattr(parameter, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)
