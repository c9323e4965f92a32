"""What one trace saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.analyze.graph import LifetimeKind
from memplan.analyze.repeat.whole_events import Event
from memplan.analyze.trace.recorder import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What one trace saw."""

    recorder: Recorder
    spans: dict[tuple[int, int], int]
    """Bytes of what died in the trace, by the segments of birth and death."""
    left: tuple[tuple[LifetimeKind, int, int], ...]
    """What was alive at its end: kind, segment of birth, bytes."""
    gradients: tuple[tuple[int, int], ...]
    """Where gradients are there from the first access on: in which segment each was added to first, and its bytes."""
    ran_again: frozenset[str]
    """Units of which something ran again in backward: the model checkpoints them itself."""
    derived: Mapping[tuple[int, int, str], int]
    """Bytes of what was made of weights alone, by the segments of birth and death, and by how it was made."""
    offload_bytes: Mapping[str, int]
    """What the forward of each unit saved that was offloaded in the trace."""
    stateful: Mapping[str, str]
    """Units whose forward would do otherwise a second time, each with the reason."""
    state: Mapping[tuple[int, str], object]
    """What the model's objects held at its end (``Snapshot.state``)."""
    outside: tuple[tuple[tuple[int, ...], int], ...]
    """Shape and bytes an element of each parameter that was trained and is none of the model's."""
    events: Sequence[Event]
    """Births and deaths in their order, where they are asked for."""
    updated: Mapping[int, str]
    """Ids of objects that held a tensor which was read and replaced, each with its name."""
