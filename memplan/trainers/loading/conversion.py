"""A checkpoint's tensors under the names and in the form that the model has them.

transformers renames keys and fuses or splits tensors while it loads (experts that are stored one by one, projections
that are stored as one). Its own rules say what each parameter is made of, and its own operations make it, one at a
time.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from memplan.errors import CheckpointError
from memplan.model.checkpoint import StoredTensor, read_checkpoint
from memplan.run.memory.arena import dtype_of
from memplan.run.memory.home import Stored

Read = Callable[[StoredTensor], torch.Tensor]


@dataclass(slots=True, kw_only=True, eq=False)
class _Conversion:
    """One of transformers' conversions and what goes into it; it may make several tensors."""

    rule: Any
    target: str
    dtype: torch.dtype
    sources: list[tuple[str, StoredTensor]] = field(default_factory=list)
    """Each with the pattern of the rule that it is of."""
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    """What was made and not yet taken."""

    def run(self, model: nn.Module, read: Read) -> dict[str, torch.Tensor]:
        rule = copy.deepcopy(self.rule)
        for pattern, stored in self.sources:  # read when the rule asks for them
            rule.add_tensor(self.target, stored.name, pattern, partial(self._source, read, stored))
        with torch.no_grad():
            made = rule.convert(self.target, model=model, config=getattr(model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _source(self, read: Read, stored: StoredTensor) -> torch.Tensor:
        return read(stored).to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """One tensor that a conversion makes: a :class:`memplan.run.memory.home.Converted`."""

    name: str
    shape: tuple[int, ...]
    path: str
    conversion: _Conversion
    model: weakref.ReferenceType[nn.Module]

    def make(self, read: Read) -> torch.Tensor:
        made = self.conversion.made
        if self.name not in made:
            model = self.model()
            assert model is not None, "it outlived the model"
            made.update(self.conversion.run(model, read))
        return made.pop(self.name)


def stored_for(model: nn.Module, folder: str | Path) -> dict[str, Stored]:
    """Return what the checkpoint holds for each name of the model's ``state_dict``; its other tensors are left out.

    ``model``: transformers', on ``meta``, without adapter. Raises CheckpointError.
    """
    stored = read_checkpoint(folder)
    if not hasattr(model, "base_model_prefix"):
        return dict(stored)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    asked: Any = model
    rules = get_model_conversion_mapping(asked)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    own = model.state_dict()
    naming: dict[str, Any] = {"base_model_prefix": asked.base_model_prefix, "meta_state_dict": own}
    found: dict[str, Stored] = {}
    conversions: dict[str, _Conversion] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, **naming)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], **naming)
        if name not in own:
            continue
        if pattern is None:
            found[name] = msgspec.structs.replace(stored[key], name=name)
            continue
        conversion = conversions.setdefault(
            name, _Conversion(rule=by_pattern[pattern], target=name, dtype=own[name].dtype)
        )
        conversion.sources.append((pattern, stored[key]))
    for conversion in conversions.values():
        found |= _targets(conversion, model, own)
    return found


def _targets(conversion: _Conversion, model: nn.Module, own: Mapping[str, torch.Tensor]) -> dict[str, Stored]:
    """Return what a conversion makes, having run it without any values."""
    path = conversion.sources[0][1].path
    try:
        made = conversion.run(model, _on_meta)
    except Exception as error:
        raise CheckpointError(
            f"{path}: transformers cannot make {conversion.target} of {len(conversion.sources)} tensors such as "
            f"{conversion.sources[0][1].name} ({type(error).__name__}: {error}): give the checkpoint of this model"
        ) from error
    return {
        name: _Made(name=name, shape=tuple(value.shape), path=path, conversion=conversion, model=weakref.ref(model))
        for name, value in made.items()
        if name in own
    }


def _on_meta(stored: StoredTensor) -> torch.Tensor:
    return torch.empty(stored.shape, dtype=dtype_of(stored.dtype), device="meta")
