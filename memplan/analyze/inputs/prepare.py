"""What ``plan`` is given as a model -> a module that can be traced, with its adapter. Nothing is loaded or downloaded.

A configuration becomes a model on ``meta``; a module that gets an adapter here is copied there first, so the user's
own stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from memplan.analyze.blocks.blocks import refuse_moved
from memplan.analyze.inputs.batch import base_of, batch_for
from memplan.analyze.inputs.trainer_settings import as_in_training, with_checkpointing
from memplan.analyze.repeat.outline import runs_of
from memplan.analyze.repeat.periodic import Run, may_be_short, shorten
from memplan.errors import InputError
from memplan.model.adapters import with_adapter
from memplan.model.arguments import ALL_LINEAR
from memplan.model.meta_model import from_configuration

_CHECKPOINTING = ("gradient_checkpointing", "model.gradient_checkpointing_enable()")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """A model that can be traced."""

    model: nn.Module
    name: str
    """For people: the directory's or the class's name."""
    folder: Path | None
    """Where its checkpoint lies, as far as that is known."""
    short: bool = False
    """Whether a few of its layers may be traced for all."""
    runs: tuple[Run, ...] = ()
    """Stacks of which the model holds those few layers alone."""
    notes: tuple[str, ...] = ()
    """What is to be said of how it was built."""

    def shapes(self, batch: object) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of the batch by name."""
        return batch_for(self.model, batch).shapes()


def prepare(
    model: Any,
    *,
    adapter: Any = None,
    dtype: Any = None,
    attention: str | None = None,
    quantization: Any = None,
    kbit: bool = False,
    gradient_checkpointing: bool | None = None,
    buffers: bool = False,
    short_for: object = None,
) -> Prepared:
    """Return a traceable model of what the user gave: a module, a transformers configuration, or a directory.

    ``adapter``: a PEFT configuration, or ``{"rank": 16, "targets": "all-linear", "alpha": 32}``; None where the model
    has its trainables. ``dtype``, ``attention`` and ``quantization`` are for a model that is built here, and so are
    ``kbit`` (PEFT's ``prepare_model_for_kbit_training``) and ``gradient_checkpointing``; ``buffers``: have its buffers
    hold their values. ``short_for``: a batch for which layers that are like others are left out, before the adapter is
    added, see ``periodic.py``.

    Raises InputError for anything that cannot be used, ModelError for a model that cannot be placed.
    """
    if isinstance(model, nn.Module):
        if dtype is not None or attention is not None:
            raise InputError(
                "dtype and attention were given with a model that is built already: give them with a configuration, "
                "or build the model with them"
            )
        if quantization is not None:
            raise InputError(
                f"quantization was given with a {type(model).__name__} that is built already: load it quantized, or "
                "give its configuration"
            )
        if kbit or gradient_checkpointing is not None:
            what, call = ("kbit", "peft.prepare_model_for_kbit_training(model)") if kbit else _CHECKPOINTING
            raise InputError(
                f"{what} was given with a {type(model).__name__} that is built already: call {call} before, or give "
                "its configuration"
            )
        refuse_moved(model)
        base = base_of(model)
        folder = getattr(getattr(base, "config", None), "_name_or_path", None)
        prepared = Prepared(
            model=model if adapter is None else _copy_on_meta(model, buffers=buffers),
            name=type(base).__name__,
            folder=Path(folder) if folder and Path(folder).is_dir() else None,
        )
    else:
        skeleton = from_configuration(model, dtype, attention, buffers=buffers, quantization=quantization)
        if buffers and skeleton.estimated:
            raise InputError(
                f"the times of {skeleton.name} cannot be measured without its quantized kernels: leave measure out"
            )
        may = may_be_short(skeleton.model.config)
        notes = as_in_training(skeleton.model)
        runs: tuple[Run, ...] = ()
        if short_for is not None and may and _is_alike_everywhere(adapter):
            runs = runs_of(skeleton.model, batch_for(skeleton.model, short_for))
            shorten(runs)
        with_checkpointing(skeleton.model, kbit=kbit, wanted=gradient_checkpointing)
        prepared = Prepared(
            model=skeleton.model,
            name=skeleton.name,
            folder=skeleton.folder,
            short=may,
            runs=runs,
            notes=(*skeleton.notes, *notes),
        )
    if adapter is None:
        return prepared
    return replace(prepared, model=with_adapter(prepared.model, adapter))


def _is_alike_everywhere(adapter: Any) -> bool:
    """Whether an adapter is told without naming layers by their numbers."""
    if adapter is None:
        return True
    targets = adapter.get("targets", ALL_LINEAR) if isinstance(adapter, Mapping) else None
    names = [targets] if isinstance(targets, str) else targets
    return targets == ALL_LINEAR or (bool(names) and all(str(name).isidentifier() for name in names or ()))


def describe(model: nn.Module) -> str:
    """Return the model's adapter for people, such as ``"LoRA r=16 on all-linear"``; empty where it has none."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return ""
    config = next(iter(configs.values()))
    kind = {"LORA": "LoRA"}.get(_text(config.peft_type), _text(config.peft_type))
    rank = getattr(config, "r", None)
    targets = getattr(config, "target_modules", None)
    what = f"{kind} r={rank}" if rank else kind
    if not targets:
        return what
    if isinstance(targets, str):
        return f"{what} on {targets}"
    if _covers_all_linear(base_of(model)):
        return f"{what} on {ALL_LINEAR}"
    return f"{what} on {', '.join(sorted({target.rsplit('.', 1)[-1] for target in targets}))}"


def _covers_all_linear(model: nn.Module) -> bool:
    """Whether no linear layer but the head, and those of the adapter, is without adapter."""
    adapted = {id(module.base_layer) for module in model.modules() if hasattr(module, "base_layer")}
    inside = {
        id(inner)
        for module in model.modules()
        if hasattr(module, "base_layer")
        for inner in module.modules()
        if id(inner) not in adapted
    }
    given = getattr(model, "get_output_embeddings", None)
    head = given() if callable(given) else None
    return all(
        id(module) in adapted or id(module) in inside or module is head
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def _copy_on_meta(model: nn.Module, *, buffers: bool = False) -> nn.Module:
    """Return a copy whose parameters hold no memory, nor its buffers unless ``buffers``; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in () if buffers else model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def _text(kind: object) -> str:
    return str(getattr(kind, "value", kind))
