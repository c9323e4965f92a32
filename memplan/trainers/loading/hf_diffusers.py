"""diffusers' models as ``from_pretrained`` makes them, with their parameters on ``meta``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memplan.model.meta_model import diffusers_model

_KNOWN = {"torch_dtype", "dtype", "subfolder", "low_cpu_mem_usage", "use_safetensors", "local_files_only"}


def not_served(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return what of the arguments of ``from_pretrained`` is not understood here."""
    unknown = sorted(name for name, value in kwargs.items() if value not in (None, False) and name not in _KNOWN)
    unknown += [n for n in ("torch_dtype", "dtype") if not isinstance(kwargs.get(n), torch.dtype | None)]
    unknown += ["use_safetensors"] * (kwargs.get("use_safetensors") is False)
    return ["positional arguments"] * bool(args) + unknown


def folder_of(name: str | Path, kwargs: Mapping[str, Any]) -> Path:
    """Return the folder that holds the model's own files."""
    return Path(name) / (kwargs.get("subfolder") or "")


def skeleton_of(cls: Any, name: str | Path, kwargs: Mapping[str, Any]) -> Any:
    """Return the model that ``from_pretrained`` would, with its parameters on ``meta``, in evaluation mode."""
    given = kwargs.get("dtype") or kwargs.get("torch_dtype")
    config, unused = cls.load_config(
        name, subfolder=kwargs.get("subfolder"), return_unused_kwargs=True, local_files_only=True
    )
    model = diffusers_model(cls, config, given, **unused)
    model.register_to_config(_name_or_path=str(name))
    return model.eval()
