"""Well-known models by name: the figures of their ``config.json``, for plans where there is no network. No torch here.

``models.json`` holds, by name: where the model is on the hub, how many parameters its checkpoint has, and the settings
that make its shapes. What is not named there is the library's own default for the model's type.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from memplan.errors import InputError, first_line

_FILE = Path(__file__).with_name("models.json")
TRAINED = ("transformer", "unet")
"""What is trained of a pipeline of diffusers, by its directory there."""
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?(?:/(?:tree|blob|resolve)/.*)?(?:[?#].*)?"
)
_TUNED_OTHERWISE = ("mixtral-8x22b",)
"""Its instruct model has 768 tokens more."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TUNED = frozenset(("instruct", "base", "it", "chat", "hf", "pt"))


class KnownModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the table."""

    hub: str
    """Its name on the hub."""
    parameters: int
    """Of its checkpoint, as its model card has them."""
    config: dict[str, Any]
    """``model_type`` and the settings of transformers' configuration of that type, or ``_class_name`` and those of that
    class of diffusers.
    """


@cache
def table() -> dict[str, KnownModel]:
    """Return the models by name, in lower case."""
    return msgspec.json.decode(_FILE.read_bytes(), type=dict[str, KnownModel])


def find(name: str) -> tuple[str, KnownModel] | None:
    """Return a model by its name here or on the hub, as people write it; None where it is not in the table.

    Upper and lower case are alike, as are ``-``, ``_`` and a space; so are a model and what was tuned from it under its
    own name (``-Instruct``, ``-Base``, ``-it``, ``-Chat``), which have the same shapes. Of another's repository nothing
    is known.
    """
    wanted = hub_name(name).lower()
    owner, _, own = wanted.rpartition("/")
    for known, model in table().items():
        its_owner, _, its_own = model.hub.lower().partition("/")
        if wanted in (known, model.hub.lower()):
            return known, model
        if owner in ("", its_owner) and known not in _TUNED_OTHERWISE and _core(own) in (_core(known), _core(its_own)):
            return known, model
    return None


def hub_name(text: str) -> str:
    """Return the ``owner/name`` of a page of the hub, and what is none as it is."""
    match = _PAGE.fullmatch(text.strip())
    return match[1] if match else text


def is_hub_name(name: str) -> bool:
    """Whether a text is ``owner/name``, and no directory."""
    return _HUB_NAME.fullmatch(name) is not None and not os.path.isdir(name)


def from_hub(name: str) -> Path | None:
    """Return the configuration of a model on the hub, from its cache where it is there; it alone is fetched.

    None where transformers has been imported: it does so itself, but only once torch has been imported too. Raises
    InputError.
    """
    if "transformers" in sys.modules:
        return None
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json")
        return Path(found if isinstance(found, str) else hf_hub_download(name, "config.json"))
    except Exception as error:  # of the hub's library, its transport, the network
        raise not_on_hub(name, error) from error


def not_on_hub(name: str, error: Exception) -> InputError:
    """Return the error of a name whose configuration cannot be fetched."""
    found = near(name)
    known = f", or one of the names that memplan knows itself, such as {found[0]}" if found else ""
    return InputError(
        f"the configuration of {name} could not be fetched from the Hub: {first_line(error).rstrip('. ')}. Check the "
        f"name and the network, or give a directory with its config.json{known}"
    )


def unknown(given: object) -> InputError:
    """Return the error of what is no model, with the names that are near or what the directory holds instead."""
    found = near(str(given))
    hint = f"; near it: {', '.join(found)}" if found else ""
    path = Path(str(given))
    for file, what in _HOLDS_INSTEAD.items():
        if os.path.isfile(path / file):
            hint = f": {what}"
    if os.path.isfile(path):
        hint = ": it is a file; give the directory that holds its config.json"
    return InputError(
        f"{given} is neither a directory with a config.json nor a model that memplan knows{hint}. Give a directory, "
        "one of the names in memplan/model/models.json, a name on the hub such as meta-llama/Llama-3.1-8B, a "
        "transformers configuration or an nn.Module"
    )


_HOLDS_INSTEAD = {
    "adapter_config.json": "it holds an adapter; give its base model",
    "model_index.json": "it holds a pipeline of diffusers; give the directory of one model in it, such as transformer "
    "or unet",
    "params.json": "it holds weights in their first publisher's form; give a directory in transformers' form",
}


def _core(name: str) -> str:
    """Return a name in lower case without what tells a tuned model from its base, and without separators."""
    words = re.split(r"[-_ ]+", name.lower().removeprefix("meta-"))
    return "".join(word for word in words if word not in _TUNED)


def folder_of(model: object) -> Path | None:
    """Return the directory with a ``config.json`` that a model was given as, or None."""
    if not isinstance(model, (str, Path)):
        return None
    path = Path(model)
    folder = path.parent if path.name == "config.json" else path
    if not os.path.isfile(folder / "config.json"):  # of a pipeline, or what was downloaded of one
        folder = next((folder / part for part in TRAINED if os.path.isfile(folder / part / "config.json")), folder)
    return folder if os.path.isfile(folder / "config.json") else None  # of any name: a path's own is_file may raise


def near(name: str) -> list[str]:
    """Return names of the table that are like a name."""
    return difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], table(), n=3, cutoff=0.5)


def is_plain(model: str) -> bool:
    """Whether a model that was given by its name or directory is known to have no quantized weights, before it is
    built.
    """
    folder = folder_of(model)
    if folder is None:
        return find(model) is not None
    try:
        return "quantization_config" not in (folder / "config.json").read_text(errors="replace")
    except OSError:
        return False
