"""What ``from_pretrained`` of transformers would give, without its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memplan.errors import CheckpointError
from memplan.model.checkpoint import StoredTensor, read_checkpoint
from memplan.model.meta_model import keep_in_float32
from memplan.run.memory.arena import dtype_of

_LOADING = {
    "config",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "local_files_only",
    "low_cpu_mem_usage",
    "use_cache",
}
_PASSED_BY_AUTO = {
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
    "use_safetensors",
    "trust_remote_code",
    "code_revision",
}


def not_served(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Return what of the arguments of ``from_pretrained`` is not understood here."""
    unknown = sorted(
        name for name, value in kwargs.items() if value is not None and name not in _LOADING | _PASSED_BY_AUTO
    )
    if kwargs.get("trust_remote_code"):
        unknown.append("trust_remote_code")
    if isinstance(kwargs.get("config"), (str, Path)) or isinstance(kwargs.get("dtype"), dict):
        unknown.append("a path as config, or a dtype for each part")
    return ["positional arguments"] * bool(args) + unknown


def skeleton_of(cls: Any, folder: Path, kwargs: Mapping[str, Any], *, name: str | None = None) -> Any:
    """Return the model that ``from_pretrained`` would, with its parameters on ``meta``, in evaluation mode.

    ``name``: what it says it came from (default: the folder).
    """
    from accelerate import init_empty_weights

    stored = read_checkpoint(folder)
    config = kwargs.get("config")
    if config is not None:
        config = copy.deepcopy(config)
    elif not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json: without it the model's shape is not known")
    else:
        wanted = {} if kwargs.get("use_cache") is None else {"use_cache": kwargs["use_cache"]}
        config = cls.config_class.from_pretrained(folder, **wanted)
    config._name_or_path = name or str(folder)  # the model keeps it apart as it is built
    dtype = _dtype(kwargs.get("dtype") or kwargs.get("torch_dtype"), config, stored)
    more = {"attn_implementation": kwargs["attn_implementation"]} if kwargs.get("attn_implementation") else {}
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype, **more)
    keep_in_float32(model, dtype)
    model.tie_weights()
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _dtype(given: Any, config: Any, stored: Mapping[str, StoredTensor]) -> torch.dtype:
    if isinstance(given, torch.dtype):
        return given
    if isinstance(given, str) and given != "auto":
        return dtype_of(given)
    held = getattr(config, "dtype", None)
    if held is not None:
        return dtype_of(held) if isinstance(held, str) else held
    floats = [t.dtype for t in stored.values() if t.dtype.startswith(("float", "bfloat"))]
    return dtype_of(floats[0]) if floats else torch.float32
