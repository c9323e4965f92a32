"""Graphs that are kept from one run to the next, by all that they follow from. No torch here: what is kept is there at
once.

Only models that a configuration describes are kept, with batches that are a shape: a module of the user's own may do
anything, and its state is no file. What a graph follows from is memplan's own code, the versions of the libraries that
were traced, the configuration, and the options.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from memplan.analyze.graph import LayerGraph
from memplan.atomic_write import write_whole
from memplan.model import models

FOLDER = "graphs"
"""Of memplan's cache."""

MOST = 64
"""Graphs that are kept; the oldest go first."""

ours = False
"""Set by the command line: in a process of someone else's, libraries may be patched, and contexts count."""

_LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "torchao", "bitsandbytes", "kernels", "flash-attn",
    "flash-linear-attention", "causal-conv1d", "mamba-ssm", "triton", "xformers", "trl",
)  # fmt: skip
"""What is traced, and what those take up where it is there."""

_PLAIN = (str, int, float, bool, type(None))


class Analysis(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a plan needs to know of a model and a batch."""

    graph: LayerGraph
    shapes: dict[str, tuple[int, ...]]
    """Of the batch's tensors by name."""
    adapter: str
    """For people."""


def key_of(model: object, batch: object, options: Mapping[str, Any]) -> str | None:
    """Return what names the graph of a model, a batch and ``options``; None for one that cannot be kept."""
    if not ours:
        return None
    folder = models.folder_of(model)
    if folder is not None:
        try:
            described: object = (folder.resolve().name, (folder / "config.json").read_text(errors="replace"))
        except OSError:
            return None  # what is wrong is said where the model is built
    elif isinstance(model, str) and (known := models.find(model)) is not None:
        described = known[0], msgspec.to_builtins(known[1])
    else:
        return None
    sizes = sorted(batch.items()) if isinstance(batch, Mapping) else batch
    if not (isinstance(sizes, (tuple, list)) and all(_is_size(size) for size in sizes)):
        return None
    if not all(_is_plain(value) for value in options.values()):
        return None
    follows_from = (_code(), _versions(), described, list(sizes), sorted(options.items()))
    return hashlib.sha256(repr(follows_from).encode()).hexdigest()


def _is_size(value: object) -> bool:
    return type(value) is int or (isinstance(value, tuple) and len(value) == 2 and type(value[1]) is int)


def recall(folder: Path, key: str) -> Analysis | None:
    """Return what was kept under ``key`` in ``folder``, or None. What cannot be read is as if it were not there."""
    path = folder / f"{key}.json"
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Analysis)
    except (OSError, msgspec.DecodeError):
        return None
    with suppress(OSError):  # a folder that may be read only
        os.utime(path)
    return found


def keep(folder: Path, key: str, analysis: Analysis) -> None:
    """Keep an analysis. A folder that cannot be written costs the next plan some seconds, no more."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{key}.json", msgspec.json.encode(analysis))
        for old in sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)


def clear(folder: Path) -> int:
    """Remove all that is kept; return the bytes."""
    freed = 0
    for path in folder.glob("*.json"):
        with suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(part) for part in value)
    return isinstance(value, _PLAIN)


@cache
def _code() -> str:
    root = Path(__file__).parents[1]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sorted(root.rglob("*.py")))).hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    found = [platform.python_version()]
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return tuple(found)
