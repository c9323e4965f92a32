"""``from_pretrained`` of transformers and diffusers under ``memplan run``: what it can, it maps from the files."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.errors import CheckpointError, InputError, ModelError
from memplan.model.checkpoint import has_checkpoint
from memplan.trainers.launch import say
from memplan.trainers.loading import hf_diffusers as diffusers
from memplan.trainers.loading.hf_transformers import not_served, skeleton_of
from memplan.trainers.loading.mapped_weights import map_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ANY_PLACE = ("auto", {"": "auto"})
_DISTRIBUTED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_OF_A_HUB = ("revision", "token", "cache_dir", "local_files_only")

Mapped = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], nn.Module | None]
Then = Callable[[nn.Module, Mapping[str, Any]], None]
"""Told of a model, and of the keywords that it was loaded with."""


def map_loaded(kind: Any, mapped: Mapped, loaded: Callable[[nn.Module], None], then: Then) -> None:
    """Have ``from_pretrained`` of a class try ``mapped`` first, ``loaded`` be told of what it gives, and ``then`` of
    what is mapped.
    """
    original = kind.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        model = None
        if not sys.platform.startswith("linux"):
            say(f"{name} is loaded whole: weights are mapped from their files on Linux only")
        elif not is_distributed():
            model = mapped(cls, name, args, kwargs)
        if model is None:
            model = original.__get__(None, cls)(name, *args, **kwargs)
            if isinstance(model, nn.Module):
                loaded(model)
            return model
        loaded(model)
        then(model, kwargs)
        return model

    setattr(kind, "from_pretrained", classmethod(from_pretrained))  # noqa: B010


def is_distributed() -> bool:
    """Whether DeepSpeed or FSDP loads the model."""
    return any(os.environ.get(variable, "").lower() in ("1", "true") for variable in _DISTRIBUTED)


def of_transformers(
    cls: type[PreTrainedModel], name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> nn.Module | None:
    """Return the model with its weights mapped, or None where the script had better load it as ever."""
    if why_not_mapped(args, kwargs):
        return None
    folder = mappable_folder(name, kwargs)
    if folder is None:
        return None
    try:
        return mapped_from(cls, name, folder, kwargs)
    except (CheckpointError, InputError, ModelError) as error:
        if not isinstance(error, QuantizedError):
            say(f"{name} is loaded whole: {error}")
        return None


class QuantizedError(ModelError):
    """A checkpoint whose weights are to be quantized as they load."""


def why_not_mapped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Return what of the arguments of ``from_pretrained`` is not understood here."""
    more = ["use_safetensors"] * (kwargs.get("use_safetensors") is False)
    more += ["adapter_kwargs"] * ("_adapter_model_path" in (kwargs.get("adapter_kwargs") or {}))
    return not_served(args, _own(kwargs)) + more


def mappable_folder(name: Any, kwargs: dict[str, Any]) -> Path | None:
    """Return the folder of safetensors that a name stands for; None where there is none, or an adapter's."""
    if not isinstance(name, (str, Path)):
        return None
    folder = _folder_of(name, {key: kwargs[key] for key in _OF_A_HUB if key in kwargs})
    if folder is None or (folder / "adapter_config.json").is_file():
        return None  # transformers then adds the adapter itself
    return folder


def mapped_from(cls: type[PreTrainedModel], name: str | Path, folder: Path, kwargs: dict[str, Any]) -> nn.Module:
    """Return the model of a folder with its weights mapped. Raises CheckpointError, InputError, ModelError."""
    model: PreTrainedModel = skeleton_of(cls, folder, _own(kwargs), name=str(name))
    if getattr(model.config, "quantization_config", None) is not None:
        raise QuantizedError(f"the weights of {name} are quantized, and memplan does not map those")
    map_weights(model, folder)
    return model


def device_asked(kwargs: Mapping[str, Any]) -> torch.device | None:
    """Return where ``device_map`` would put a model at once, where it is to be mapped; None for the CPU."""
    if kwargs.get("device_map") not in _ANY_PLACE or not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords less those that say where to find the files, and those that leave to us where they go."""
    given = {key: value for key, value in kwargs.items() if key not in _OF_A_HUB}
    return {key: value for key, value in given.items() if key != "device_map" or value not in _ANY_PLACE}


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
    """Return the folder of a model's files, which those of a hub are first brought to; None where it has no such
    files.
    """
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
