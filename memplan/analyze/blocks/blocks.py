"""Module tree -> blocks. Found by structure, not by class names.

An element of a repeated stack is one block; every other module with frozen parameters of its own is one; parameters
that several of those share are a block that all of them read. A layer that chooses among experts is taken apart: what
is not chosen need not be loaded (``experts.py`` says which layers these are).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from memplan.analyze.graph import BlockKind, Tensor
from memplan.errors import ModelError
from memplan.hooks.flows import gradients_flow
from memplan.hooks.triggers import modules_by_name
from memplan.model.names import canonical
from memplan.model.weights import Weight, frozen_weights, mark_adapters, trained_bytes, unknown_kind, unready
from memplan.units import align_up, format_bytes

_SMALL = 8
"""A part of a layer with experts is worth loads of its own from this fraction of its largest expert on."""

_SMALL_PART = 256
"""A module of a layer in parts from this fraction of the layer on: below are norms and routers, which stay."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unit:
    """A trigger module: what it reads is announced by its forward and its backward."""

    name: str
    """Canonical."""
    module: nn.Module
    kind: BlockKind
    stack: str
    """Canonical name of the stack that it is an element of, or empty."""
    weights: tuple[Weight, ...]
    """The frozen ones, in module order."""


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A block as the module tree has it; the trace adds why it may not be streamed."""

    name: str
    kind: BlockKind
    stack: str
    weights: tuple[Weight, ...]
    triggers: tuple[str, ...]
    """Units that read it."""
    pinned_because: str = field(default="")

    def pin(self, reason: str) -> None:
        """Note why it must stay on the device; the first reason stays."""
        self.pinned_because = self.pinned_because or reason

    def layout(self) -> tuple[tuple[Tensor, ...], int]:
        """Return its tensors, each at a multiple of 512 bytes, and the bytes of them all."""
        tensors, offset = [], 0
        for weight in self.weights:
            size = weight.tensor.numel() * weight.tensor.element_size()
            tensors.append(
                Tensor(
                    name=weight.name,
                    shape=tuple(weight.tensor.shape),
                    dtype=dtype_name(weight.tensor.dtype),
                    offset_bytes=offset,
                    size_bytes=size,
                )
            )
            offset += align_up(size)
        return tuple(tensors), offset


def dtype_name(dtype: object) -> str:
    """Return torch's name of a dtype without the module."""
    return str(dtype).removeprefix("torch.")


def refuse_moved(model: nn.Module) -> None:
    """Raise ModelError where someone else moves the model's weights."""
    for name, module in model.named_modules():
        if "_hf_hook" in module.__dict__:
            raise ModelError(
                f"the module {canonical(name)} is hooked by accelerate (device_map or cpu_offload), which would move "
                "the same weights: load the model without device_map"
            )
    places = getattr(model, "hf_device_map", None)
    if isinstance(places, Mapping) and len({str(place) for place in places.values()}) > 1:
        spread = ", ".join(sorted({str(place) for place in places.values()}))
        raise ModelError(
            f"the model is spread by accelerate's device map over {spread}: load it without device_map; memplan places "
            f"it"
        )


def check_model(model: nn.Module, given: object) -> None:
    """Raise ModelError where the model cannot be placed: nothing frozen, no gradient that goes through it when it is
    called with ``given``, or moved by someone else.
    """
    refuse_moved(model)
    mark_adapters(model)
    frozen = frozen_weights("", model, deep=True)
    trainable_bytes = trained_bytes(model)
    if not frozen:
        raise ModelError(
            f"all {format_bytes(trainable_bytes)} of the model's parameters are trained: memplan streams frozen ones. "
            'Give an adapter, such as adapter={"rank": 16, "targets": "all-linear"}'
        )
    if not trainable_bytes and not gradients_flow(model, given):
        raise ModelError(
            "the model has nothing to train: no parameter requires a gradient, and nothing that it is called with. "
            'Give an adapter, such as adapter={"rank": 16, "targets": "all-linear"}'
        )
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad:
                continue
            full = canonical(f"{name}.{own}" if name else own)
            kind, why = unknown_kind(parameter), unready(parameter, module)
            if kind is not None:
                raise ModelError(
                    f"the parameter {full} is a {kind}, of which memplan does not know what it is made of: load the "
                    "model with bitsandbytes or torchao, or without quantization"
                )
            if why is not None:
                raise ModelError(f"the quantized parameter {full} {why}")


def find_units(
    model: nn.Module,
    containers: frozenset[str] = frozenset(),
    routed: frozenset[str] = frozenset(),
    in_parts: frozenset[str] = frozenset(),
) -> tuple[Unit, ...]:
    """Return the trigger modules in module order.

    ``containers``: units whose forward is never called though their weights are read: their children are units.
    ``routed``: layers that choose among experts: their parts are units, down to each expert. ``in_parts``: layers of
    which each module with frozen weights of its own is a unit.
    """
    outermost = modules_by_name(model)
    units: list[Unit] = []
    seen: set[int] = set()

    def element(name: str, module: nn.Module, stack: str) -> None:
        if id(module) in seen:
            return
        if canonical(name) in containers:
            own(name, module, stack)
            for part, child in module.named_children():
                element(f"{name}.{part}", child, stack)
        elif canonical(name) in routed:
            experts = [child for held in expert_lists(module) for child in held.children()]
            apart(name, module, stack, max(_frozen_bytes(expert) for expert in experts) // _SMALL)
        elif canonical(name) in in_parts:
            parts(name, module, stack, _frozen_bytes(module) // _SMALL_PART)
        else:
            whole(name, module, stack, "layer")

    def whole(name: str, module: nn.Module, stack: str, kind: BlockKind) -> None:
        frozen = frozen_weights(name, module, deep=True)
        seen.update(id(inner) for inner in module.modules())
        if frozen:
            units.append(Unit(name=canonical(name), module=module, kind=kind, stack=stack, weights=frozen))

    def apart(name: str, module: nn.Module, stack: str, least_bytes: int) -> None:
        own(name, module, stack)
        holds_experts = _holds_alike(module)
        for part, child in module.named_children():
            inner = f"{name}.{part}"
            if id(child) in seen:
                continue
            if canonical(inner) in containers or expert_lists(child):
                apart(inner, child, stack, least_bytes)
            elif holds_experts:
                whole(inner, child, stack, "expert")
            else:
                whole(inner, child, stack, "layer" if _frozen_bytes(child) >= least_bytes else "other")

    def parts(name: str, module: nn.Module, stack: str, least_bytes: int) -> None:
        own(name, module, stack, least_bytes)
        for part, child in module.named_children():
            if id(child) not in seen:
                parts(f"{name}.{part}", child, stack, least_bytes)

    def own(name: str, module: nn.Module, stack: str, layer_from_bytes: float = math.inf) -> None:
        seen.add(id(module))
        frozen = frozen_weights(name, module, deep=False)
        if frozen:
            unit = canonical(name)
            kind: BlockKind = "embedding" if isinstance(module, nn.Embedding) else "other"
            if sum(w.tensor.numel() * w.tensor.element_size() for w in frozen) >= layer_from_bytes:
                kind = "layer"
            units.append(Unit(name=unit, module=outermost[unit], kind=kind, stack=stack, weights=frozen))

    def walk(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        own(name, module, "")
        stacked = is_stack(module)
        for part, child in module._modules.items():
            if child is None:
                continue
            inner = f"{name}.{part}" if name else part
            if stacked:
                element(inner, child, canonical(name))
            else:
                walk(inner, child)

    walk("", model)
    return tuple(units)


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a repeated stack: two or more elements with parameters, two of them of one class."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    classes = [type(child) for child in module if next(child.parameters(), None) is not None]
    return len(classes) > len(set(classes))


def expert_lists(layer: nn.Module) -> list[nn.Module]:
    """Return the innermost lists within a layer that a router may choose from: of two or more modules alike."""
    found = [module for module in layer.modules() if _holds_alike(module)]
    outer = {id(m) for m in found for child in m.children() for i in child.modules() if _holds_alike(i)}
    return [module for module in found if id(module) not in outer]


def _holds_alike(module: nn.Module) -> bool:
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    alike = [
        (type(child), tuple((tuple(w.tensor.shape), w.tensor.dtype) for w in weights))
        for child in module.children()
        if (weights := frozen_weights("", child, deep=True))
    ]
    return len(alike) > 1 and len(set(alike)) == 1


def _frozen_bytes(module: nn.Module) -> int:
    return sum(w.tensor.numel() * w.tensor.element_size() for w in frozen_weights("", module, deep=True))


def draft_blocks(units: tuple[Unit, ...]) -> tuple[Draft, ...]:
    """Return the blocks that the units read: each one's own parameters, and those that several share."""
    readers: dict[int, dict[str, None]] = {}
    for unit in units:
        for weight in unit.weights:
            readers.setdefault(id(weight.tensor), {})[unit.name] = None
    drafts: list[Draft] = []
    shared: dict[tuple[str, ...], list[Weight]] = {}
    for unit in units:
        own: list[Weight] = []
        for weight in unit.weights:
            of = tuple(readers[id(weight.tensor)])
            if len(of) == 1:
                own.append(weight)
            elif of[0] == unit.name:
                shared.setdefault(of, []).append(weight)
        if own:
            drafts.append(
                Draft(name=unit.name, kind=unit.kind, stack=unit.stack, weights=tuple(own), triggers=(unit.name,))
            )
    taken = {draft.name for draft in drafts}
    for of, weights in shared.items():
        name = _common_module([weight.name for weight in weights])
        if name in taken:
            name = weights[0].name
        taken.add(name)
        drafts.append(Draft(name=name, kind="shared", stack="", weights=tuple(weights), triggers=of))
    return tuple(drafts)


def head_of(model: nn.Module, drafts: tuple[Draft, ...], forwards: list[str]) -> Draft | None:
    """Return the block that is the output head: what the model says, else the last matrix outside stacks, if wide."""
    given: Any = getattr(model, "get_output_embeddings", None)
    try:
        output = given() if callable(given) else None
    except (AttributeError, NotImplementedError):
        output = None
    weight = getattr(getattr(output, "base_layer", output), "weight", None)
    for draft in drafts:
        if draft.kind == "other" and weight is not None and any(w.tensor is weight for w in draft.weights):
            return draft
    last = next((d for d in drafts if forwards and d.triggers == (forwards[-1],) and d.kind == "other"), None)
    if last is None or last.stack:
        return None
    wide = any(w.tensor.dim() == 2 and w.tensor.shape[0] > w.tensor.shape[1] for w in last.weights)
    return last if wide else None


def _common_module(names: list[str]) -> str:
    """Return the name of the innermost module that holds all of the parameters."""
    paths = [name.split(".")[:-1] for name in names]
    return ".".join(_common(paths)) or names[0]


def _common(paths: list[list[str]]) -> Iterator[str]:
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            return
        yield parts[0]
