"""Well-known models by name: the figures of their ``config.json``, for plans where there is no network. No torch here.

``models.json`` holds, by name: where the model is on the hub, how many parameters its checkpoint has, and the settings
that make its shapes. What is not named there is transformers' own default for the model's type.
"""

from __future__ import annotations

import difflib
import os
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

_FILE = Path(__file__).with_name("models.json")


class KnownModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the table."""

    hub: str
    """Its name on the hub."""
    parameters: int
    """Of its checkpoint, as its model card has them."""
    config: dict[str, Any]
    """``model_type`` and the settings of transformers' configuration of that type."""


@cache
def table() -> dict[str, KnownModel]:
    """Return the models by name, in lower case."""
    return msgspec.json.decode(_FILE.read_bytes(), type=dict[str, KnownModel])


def find(name: str) -> tuple[str, KnownModel] | None:
    """Return a model by its name here or on the hub, upper and lower case alike; None where it is not in the table."""
    wanted = name.lower()
    for known, model in table().items():
        if wanted in (known, model.hub.lower()):
            return known, model
    return None


def folder_of(model: object) -> Path | None:
    """Return the directory with a ``config.json`` that a model was given as, or None."""
    if not isinstance(model, (str, Path)):
        return None
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    return folder if os.path.isfile(folder / "config.json") else None  # of any name: a path's own is_file may raise


def near(name: str) -> list[str]:
    """Return names of the table that are like a name."""
    return difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], table(), n=3, cutoff=0.5)


def is_plain(model: str) -> bool:
    """Whether a model that was given by its name or directory is known to have no quantized weights, before it is built."""
    folder = folder_of(model)
    if folder is None:
        return find(model) is not None
    try:
        return "quantization_config" not in (folder / "config.json").read_text(errors="replace")
    except OSError:
        return False
