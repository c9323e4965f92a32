"""``from_pretrained`` of transformers and diffusers under ``memplan run``: what it can, it maps from the files."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from memplan.checkpoint import has_checkpoint
from memplan.errors import CheckpointError, InputError, ModelError
from memplan.trainers import diffusers
from memplan.trainers.launch import say
from memplan.trainers.mapped import map_weights
from memplan.trainers.transformers import not_served, skeleton_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANY_PLACE = ("auto", {"": "auto"})
_DISTRIBUTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_OF_A_HUB = ("revision", "token", "cache_dir", "local_files_only")

Mapped = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], nn.Module | None]


def map_loaded(kind: Any, mapped: Mapped, then: Callable[[nn.Module], None]) -> None:
    """Have ``from_pretrained`` of a class try ``mapped`` first, and ``then`` be told of the model."""
    original = kind.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        model = None
        if not sys.platform.startswith("linux"):
            say(f"{name} is loaded whole: weights are mapped from their files on Linux only")
        elif not any(os.environ.get(variable, "").lower() in ("1", "true") for variable in _DISTRIBUTED):
            model = mapped(cls, name, args, kwargs)
        if model is None:
            return original.__get__(None, cls)(name, *args, **kwargs)
        then(model)
        return model

    setattr(kind, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def of_transformers(
    cls: type[PreTrainedModel], name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module | None:
    """Return the model with its weights mapped, or None where the script had better load it as ever."""
    given = {key: value for key, value in kwargs.items() if key != "device_map" or value not in _ANY_PLACE}
    asked_of_hub = {key: given.pop(key) for key in _OF_A_HUB if key in given}
    if not isinstance(name, (str, Path)) or not_served(args, given) or kwargs.get("use_safetensors") is False:
        return None
    folder = _folder_of(name, asked_of_hub)
    if folder is None or (folder / "adapter_config.json").is_file():
        return None  # transformers then adds the adapter itself
    if "_adapter_model_path" in (kwargs.get("adapter_kwargs") or {}):
        return None
    try:
        model: PreTrainedModel = skeleton_of(cls, folder, given, name=str(name))
        if getattr(model.config, "quantization_config", None) is not None:
            return None
        map_weights(model, folder)
    except (CheckpointError, InputError, ModelError) as error:
        say(f"{name} is loaded whole: {error}")
        return None
    return model


def of_diffusers(cls: Any, name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """Return the model with its weights mapped, or None where the script had better load it as ever."""
    if not isinstance(name, (str, Path)) or diffusers.not_served(args, kwargs):
        return None
    folder = diffusers.folder_of(name, kwargs)
    if not has_checkpoint(folder) or not (folder / "config.json").is_file():
        return None
    try:
        model: Any = diffusers.skeleton_of(cls, name, kwargs)
        if "quantization_config" in model.config:
            return None
        map_weights(model, folder)
    except (CheckpointError, InputError, ModelError) as error:
        say(f"{name} is loaded whole: {error}")
        return None
    made: nn.Module = model
    return made


def _folder_of(name: str | Path, asked: dict[str, Any]) -> Path | None:
    """Return the folder of a model's files, which those of a hub are first brought to; None where it has no such files."""
    if Path(name).is_dir():
        return Path(name) if has_checkpoint(name) else None
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    optional = {**asked, "_raise_exceptions_for_missing_entries": False}
    try:
        if cached_file(name, "adapter_config.json", **optional) or not cached_file(name, "config.json", **optional):
            return None
        found = cached_file(name, "model.safetensors", **optional)
        if found is None:
            found = cached_file(name, "model.safetensors.index.json", **optional)
            if found is not None:
                get_checkpoint_shard_files(str(name), found, **asked)
        cached_file(name, "generation_config.json", **optional)
    except (OSError, ValueError):
        return None  # transformers itself then says what is wrong
    return None if found is None else Path(found).parent
