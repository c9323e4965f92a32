"""Models whose weights are mapped from the checkpoint's files until they are placed.

A script that does not know of memplan may do anything between loading its model and training it: generate, resize the
embeddings, begin an adapter from the weights. So the weights are true from the start, and take no RAM that the kernel
cannot take back: a private mapping, of which only what is written to is copied.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import nn

from memplan.hardware.machine import cache_folder
from memplan.model.checkpoint import StoredTensor
from memplan.ranks.data_parallel import leave_alone
from memplan.ranks.session import announce
from memplan.ranks.world import world
from memplan.run.memory.arena import Placeholders, dtype_of, is_placeholder
from memplan.run.memory.disk import DiskReader
from memplan.run.memory.home import Stored, as_bytes
from memplan.trainers.loading.stored import map_stored, origin_of, put_weights, read_stored

_ON_LINUX = sys.platform.startswith("linux")
"""Elsewhere there are no files without a name, and no one says what of a mapping was written to."""
_SMAPS = Path("/proc/self/smaps")
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*)")
_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")


def map_weights(model: nn.Module, folder: str | Path) -> None:
    """Have every parameter on ``meta`` read its checkpoint, mapped; what is new comes into RAM.

    What is cast or converted is mapped from a file of its own, without a name, which goes with the model. Raises
    CheckpointError where the checkpoint is not the model's; the model then is as it was.
    """
    leave_alone(left_alone)
    announce(world())
    with contextlib.ExitStack() as files:
        casts = _Casts(files)
        put_weights(model, folder, lambda reader, meta, stored: casts.read(reader, stored, meta.dtype), heads=True)


def map_placeholders(model: nn.Module) -> None:
    """Have every placeholder whose weights a checkpoint holds read them, mapped as by :func:`map_weights`.

    So do frozen weights that are what the checkpoint holds; what was written to gets memory of its own.
    """
    with contextlib.ExitStack() as files:
        casts = _Casts(files)
        reader = files.enter_context(contextlib.closing(DiskReader()))
        for parameter in model.parameters():
            origin = origin_of(parameter)
            if origin is None or (parameter.requires_grad and not is_placeholder(parameter)):
                continue
            _go_back(parameter, casts.read(reader, origin, parameter.dtype))


def _go_back(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Have a weight that was under a plan be ``data``, as it was before, unless it was written to meanwhile."""
    if is_placeholder(parameter) or _is_alike(parameter.data, data):
        parameter.data = data
    else:
        parameter.data = parameter.data.clone()  # a view of memory that is to go


def _is_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(as_bytes(one).cpu(), as_bytes(other))


class _Cast(NamedTuple):
    """A tensor of a checkpoint as it was cast or converted, in a file without a name."""

    stored: Stored
    dtype: torch.dtype
    path: str
    file_offset_bytes: int
    size_bytes: int


_CASTS: dict[int, _Cast] = {}
"""By where they were mapped. What is there now, the kernel says (:func:`_is_as_stored`)."""


class _Casts:
    """Casts tensors into a file: RAM that the kernel can take back."""

    def __init__(self, files: contextlib.ExitStack) -> None:
        self._files = files
        self._file: IO[bytes] | None = None
        self._end = 0

    def read(self, reader: DiskReader, stored: Stored, dtype: torch.dtype) -> torch.Tensor:
        """Return what a checkpoint holds in a dtype, mapped from its file where that holds these very bytes."""
        if not isinstance(stored, StoredTensor):
            return self.of(read_stored(reader, stored), dtype, stored)
        raw = map_stored(reader, stored, stored.size_bytes).view(dtype_of(stored.dtype)).view(stored.shape)
        return raw if raw.dtype == dtype else self.of(raw, dtype, stored)

    def of(self, raw: torch.Tensor, dtype: torch.dtype, stored: Stored) -> torch.Tensor:
        """Return a tensor in a dtype, mapped privately, or in RAM where there is no room for such a file."""
        size = raw.numel() * dtype.itemsize
        if not size or not _ON_LINUX:
            return raw.to(dtype)
        begin = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        try:
            if self._file is None:
                folder = cache_folder()
                folder.mkdir(parents=True, exist_ok=True)
                self._file = self._files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
            os.posix_fallocate(self._file.fileno(), begin, size)
        except OSError:
            return raw.to(dtype)
        # Straight into the file's pages: buffers of our own would leave holes in the heap, as much as was cast.
        shared = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_WRITE, offset=begin)
        torch.from_numpy(np.frombuffer(shared, np.uint8)).view(dtype).view(raw.shape).copy_(raw)
        self._end = begin + size
        pages = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=begin)
        made = torch.from_numpy(np.frombuffer(pages, np.uint8)).view(dtype).view(raw.shape)
        path = os.readlink(f"/proc/self/fd/{self._file.fileno()}")
        _CASTS[made.data_ptr()] = _Cast(stored, dtype, path, begin, size)
        return made


def is_mapped(model: nn.Module) -> bool:
    """Whether weights of a model were loaded here."""
    return any(origin_of(parameter) is not None for parameter in model.parameters())


def folder_of(model: nn.Module) -> Path | None:
    """Return the folder that a mapped model's weights are in."""
    origins = (origin_of(parameter) for parameter in model.parameters())
    return next((Path(origin.path).parent for origin in origins if origin is not None), None)


def release_mapped(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Put placeholders on ``device`` for the frozen weights that are still the files' own bytes; return what undoes it.

    What the script has changed, replaced or trains stays as it is, and so does all where the kernel does not say which
    that is.
    """
    placeholders = Placeholders(device)
    away: list[tuple[nn.Parameter, torch.Tensor]] = []
    areas = _file_areas() if _ON_LINUX else []
    for parameter in model.parameters():
        origin = origin_of(parameter)
        if isinstance(origin, StoredTensor) and not parameter.requires_grad and _is_as_stored(parameter, origin, areas):
            away.append((parameter, parameter.data))
            parameter.data = placeholders.of(origin.shape, parameter.dtype)

    def undo() -> None:
        for parameter, data in away:
            _go_back(parameter, data)
        away.clear()

    return undo


def left_alone(model: nn.Module) -> list[int]:
    """Return the ids of the frozen weights of a model that DDP is not to broadcast: the files' own bytes, which are the
    same on every rank, and what waits on the host while the rest is on a device, where DDP takes one kind alone.

    What a script has changed of the others is broadcast as ever. What ranks have differently is found at attach.
    """
    mapped = [p for p in model.parameters() if not p.requires_grad and isinstance(origin_of(p), StoredTensor)]
    areas = _file_areas() if mapped and _ON_LINUX else []
    kinds = {parameter.device.type for parameter in model.parameters() if parameter.requires_grad}
    return [
        id(parameter)
        for parameter in model.parameters()
        if not parameter.requires_grad
        and (origin := origin_of(parameter)) is not None
        and (
            (isinstance(origin, StoredTensor) and _is_as_stored(parameter, origin, areas))
            or bool(kinds - {parameter.device.type})
        )
    ]


class _Area(NamedTuple):
    """A part of this process's memory that is a file's, no page of which was written to."""

    begin: int
    end: int
    file_offset_bytes: int
    path: str


def _file_areas() -> list[_Area]:
    """Return them as the kernel has them: a page of a private mapping becomes the process's own when it is written
    to.
    """
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
    """Whether a weight is the very bytes of its file, or their cast: not written to, moved or given another tensor."""
    begin = parameter.data_ptr() if parameter.device.type == "cpu" else 0
    cast = _CASTS.get(begin)
    if cast is not None and cast.stored == stored and cast.dtype == parameter.dtype:
        dtype, path, offset, size = cast.dtype, cast.path, cast.file_offset_bytes, cast.size_bytes
    else:
        dtype, path = dtype_of(stored.dtype), os.path.realpath(stored.path)
        offset, size = stored.file_offset_bytes, stored.size_bytes
    if (tuple(parameter.shape), parameter.dtype) != (stored.shape, dtype) or not parameter.is_contiguous():
        return False
    place = bisect_right(areas, begin, key=lambda area: area.begin) - 1  # the kernel lists them by address
    area = areas[place] if place >= 0 else None
    return (
        area is not None
        and begin + size <= area.end
        and area.file_offset_bytes + begin - area.begin == offset
        and area.path == path
    )
