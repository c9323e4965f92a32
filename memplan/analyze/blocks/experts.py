"""Layers whose router chooses among experts, which are then blocks of their own.

Experts are found by structure: modules alike in a ``ModuleList`` or ``ModuleDict``. Whether anything is chosen among
them, the trace says: where nothing is, every part of a layer is read whenever the layer is, and it stays one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memplan.analyze.blocks.blocks import Draft, Unit, expert_lists
from memplan.analyze.trace.recorder import Recorder

_MOST_PINNED = 0.1
"""A layer stays whole where more than this share of its bytes would have to stay on the device once it is taken apart.
"""


def routed_layers(units: Sequence[Unit], recorder: Recorder) -> frozenset[str]:
    """Return the layers that hold experts, and in which something was decided by values."""
    return frozenset(
        unit.name
        for unit in units
        if unit.kind == "layer" and unit.name in recorder.deciding and expert_lists(unit.module)
    )


def pinned_layers(layers: frozenset[str], whole: Sequence[Draft], apart: Sequence[Draft]) -> frozenset[str]:
    """Return the layers that had better stay whole: taken apart, much of them would have to stay on the device.

    ``whole``, ``apart``: the blocks with these layers whole and taken apart, with what is pinned.
    """
    pinned = {draft.name for draft in whole if draft.pinned_because}

    def is_too_much(layer: str) -> bool:
        parts = [draft for draft in apart if draft.name == layer or draft.name.startswith(layer + ".")]
        return _bytes(d for d in parts if d.pinned_because) > _MOST_PINNED * _bytes(parts)

    return frozenset(layer for layer in layers if layer not in pinned and is_too_much(layer))


def _bytes(drafts: Iterable[Draft]) -> int:
    return sum(draft.layout()[1] for draft in drafts)
