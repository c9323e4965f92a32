"""Models whose weights are mapped from the checkpoint's files until they are placed.

A script that does not know of memplan may do anything between loading its model and training it: generate, resize the
embeddings, begin an adapter from the weights. So the weights are true from the start, and take no RAM that the kernel
cannot take back: a private mapping, of which only what is written to is copied.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from memplan.checkpoint import StoredTensor
from memplan.run.arena import Placeholders, dtype_of
from memplan.run.disk import DiskReader
from memplan.run.home import Stored
from memplan.trainers.loading import map_stored, origin_of, put_weights, read_stored

_SMAPS = Path("/proc/self/smaps")
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)")
_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


def map_weights(model: nn.Module, folder: str | Path) -> None:
    """Have every parameter on ``meta`` read its checkpoint, mapped; what is cast, converted or new comes into RAM.

    Raises CheckpointError where the checkpoint is not the model's; the model then is as it was.
    """
    put_weights(model, folder, _data_of, heads=True)


def _data_of(reader: DiskReader, meta: nn.Parameter, stored: Stored) -> torch.Tensor:
    if isinstance(stored, StoredTensor) and dtype_of(stored.dtype) == meta.dtype:
        return map_stored(reader, stored, stored.size_bytes).view(meta.dtype).view(stored.shape)
    return read_stored(reader, stored).to(meta.dtype)


def is_mapped(model: nn.Module) -> bool:
    """Whether weights of a model were loaded here."""
    return any(origin_of(parameter) is not None for parameter in model.parameters())


def folder_of(model: nn.Module) -> Path | None:
    """Return the folder that a mapped model's weights are in."""
    origins = (origin_of(parameter) for parameter in model.parameters())
    return next((Path(origin.path).parent for origin in origins if origin is not None), None)


def give_way(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Put placeholders on ``device`` for the frozen weights that are still the files' own bytes; return what undoes it.

    What the script has changed, replaced or trains stays as it is.
    """
    placeholders = Placeholders(device)
    away: list[tuple[nn.Parameter, torch.Tensor]] = []
    areas = _file_areas()
    for parameter in model.parameters():
        origin = origin_of(parameter)
        if isinstance(origin, StoredTensor) and not parameter.requires_grad and _is_as_stored(parameter, origin, areas):
            away.append((parameter, parameter.data))
            parameter.data = placeholders.of(origin.shape, parameter.dtype)

    def undo() -> None:
        for parameter, data in away:
            parameter.data = data

    return undo


class _Area(NamedTuple):
    """A part of this process's memory that is a file's, no page of which was written to."""

    begin: int
    end: int
    file_offset_bytes: int
    path: str


def _file_areas() -> list[_Area]:
    """Return them as the kernel has them: a page of a private mapping becomes the process's own when it is written to."""
    found: list[_Area] = []
    area: _Area | None = None
    for line in _SMAPS.read_text(errors="surrogateescape").splitlines():
        if _HEAD.match(line):
            found += [area] if area else []
            head = _AREA.fullmatch(line)
            area = _Area(int(head[1], 16), int(head[2], 16), int(head[3], 16), head[4]) if head else None
        elif line.startswith(("Anonymous:", "Swap:")) and int(line.split()[1]):
            area = None
    return found + ([area] if area else [])


def _is_as_stored(parameter: nn.Parameter, stored: StoredTensor, areas: list[_Area]) -> bool:
    """Whether a weight is the very bytes of its file: not written to, cast, moved or given another tensor."""
    form = (tuple(parameter.shape), parameter.dtype, parameter.device.type)
    if form != (stored.shape, dtype_of(stored.dtype), "cpu") or not parameter.is_contiguous():
        return False
    begin = parameter.data_ptr()
    place = bisect_right(areas, begin, key=lambda area: area.begin) - 1  # the kernel lists them by address
    area = areas[place] if place >= 0 else None
    return (
        area is not None
        and begin + stored.size_bytes <= area.end
        and area.file_offset_bytes + begin - area.begin == stored.file_offset_bytes
        and area.path == os.path.realpath(stored.path)
    )
