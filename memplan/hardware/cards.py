"""Names of cards as people write them: ``4090``, ``RTX 4090``, ``NVIDIA A100-SXM4-80GB``. No torch here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_SIZE = re.compile(r"(?<![a-z0-9])(\d+) ?g(?:i?b)?(?![a-z0-9])")
_MEANS_NOTHING = re.compile(
    r"nvidia|geforce|tesla|quadro|graphics|gpus?|cards?|sxm\d*|pcie|nvl\d*|hbm\d*e?|gddr\d*x?|tensor|core|ampere|hopper"
)


def matching(text: str, names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that are the card called ``text``, whatever their memory: :func:`size_of` says what it
    names.
    """
    core = _core(text)
    return [name for name in names if core and core == _core(name)]


def size_of(text: str) -> int | None:
    """Return the memory in GB that a card's name has in it, or None."""
    size = _SIZE.search(_plain(text))
    return int(size[1]) if size else None


def near(text: str, names: Sequence[str]) -> list[str]:
    """Return names that are like ``text``, the nearest first."""
    core, cores = _core(text), {name: _core(name) for name in names}
    begins = [name for name, its in cores.items() if core and (core.startswith(its) or its.startswith(core))]
    by_core = difflib.get_close_matches(core, list(cores.values()), n=3, cutoff=0.5)
    like = [name for one in by_core for name, its in cores.items() if its == one]
    by_name = difflib.get_close_matches(text.lower(), list(names), n=3, cutoff=0.5)
    return list(dict.fromkeys((*begins, *like, *by_name)))[:3]


def _core(text: str) -> str:
    """Return a card's name without maker, form, memory and separators."""
    words = [word for word in _SIZE.sub(" ", _plain(text)).split() if not _MEANS_NOTHING.fullmatch(word)]
    return "".join(words).removeprefix("rtx").removeprefix("gtx")


def _plain(text: str) -> str:
    return re.sub(r"[-_/() ]+", " ", text.lower()).strip()
