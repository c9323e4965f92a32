"""Kinds of compute devices, by torch's names for them: the CPU, whose memory is the host's, and those apart from it.

No torch here. ROCm is ``cuda`` in torch; XPU is untested. What another package teaches torch is made known by ``add``.
"""

from __future__ import annotations

_kinds = ["cpu", "cuda", "xpu"]


def is_apart(kind: str) -> bool:
    """Whether devices of a kind have memory and streams of their own, beside the host's."""
    return kind != "cpu"


def known() -> tuple[str, ...]:
    """Return the kinds that plans are made for."""
    return tuple(_kinds)


def add(kind: str) -> None:
    """Have plans be made for a kind of torch's, apart from the host, that is not known."""
    if kind not in _kinds:
        _kinds.append(kind)


def fault(kind: str) -> str | None:
    """Return what is wrong with the name of a kind; None where it is known."""
    return None if kind in _kinds else f"its device is {kind!r}, not one of {', '.join(_kinds)}"
