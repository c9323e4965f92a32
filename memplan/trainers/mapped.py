"""Models whose weights are mapped from the checkpoint's files until they are placed.

A script that does not know of memplan may do anything between loading its model and training it: generate, resize the
embeddings, begin an adapter from the weights. So the weights are true from the start, and take no RAM that the kernel
cannot take back: a private mapping, of which only what is written to is copied.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memplan.checkpoint import StoredTensor
from memplan.errors import CheckpointError
from memplan.names import canonical
from memplan.run.arena import Placeholders, dtype_of
from memplan.run.disk import DiskReader
from memplan.run.matching import stored_tensors
from memplan.trainers.loading import checkpoint_of, come_from, map_stored, names_of, read_stored, stored_weights

_SMAPS = Path("/proc/self/smaps")
_AREA = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ [0-9a-f]+ \S+ (\d+)")
_MAPPED = WeakIdKeyDictionary()
"""Of each parameter that was mapped here, what of the files it holds and at which address."""


def map_weights(model: nn.Module, folder: str | Path) -> None:
    """Have every parameter on ``meta`` read its checkpoint, mapped; what is cast or converted comes into RAM.

    Raises CheckpointError where the checkpoint is not the model's; the model then is as it was.
    """
    stored = stored_weights(model, folder)
    for _, names in names_of(model):
        if len({id(stored[name]) for name in names if name in stored}) > 1:
            raise CheckpointError(f"{folder} holds {' and '.join(names)} apart, which its config.json says are one")
    values: dict[int, nn.Parameter] = {}
    mapped: list[tuple[nn.Parameter, StoredTensor]] = []
    with contextlib.closing(DiskReader()) as reader:
        for parameter, names in names_of(model):
            if parameter.device.type != "meta":
                continue
            held = next(stored[name] for name in names if name in stored)
            wanted = parameter.dtype
            if isinstance(held, StoredTensor) and dtype_of(held.dtype) == wanted:
                data = map_stored(reader, held, held.size_bytes).view(wanted).view(held.shape)
            else:
                data = read_stored(reader, held).to(wanted)
            made = values[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            if isinstance(held, StoredTensor) and dtype_of(held.dtype) == wanted:
                mapped.append((made, held))
        buffers = {name: read_stored(reader, stored[name]) for name, _ in model.named_buffers() if name in stored}
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None and id(own) in values:
                module._parameters[name] = values[id(own)]
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.data = buffers[name].to(buffer.dtype)
    come_from(model, stored)
    for made, held in mapped:
        _MAPPED[made] = (held, made.data_ptr())


def is_mapped(model: nn.Module) -> bool:
    """Whether weights of a model were mapped here."""
    return any(parameter in _MAPPED for parameter in model.parameters())


def give_way(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Put placeholders on ``device`` for the frozen weights that are still what the files hold; return what undoes it.

    What the script has changed, replaced or trains stays as it is.
    """
    placeholders = Placeholders(device)
    away: list[tuple[nn.Parameter, torch.Tensor]] = []
    written = _Written()
    # What the placeholder of each name will be filled from: a layer that was put elsewhere is not that of its name.
    named = stored_tensors(model, checkpoint_of(model))
    for parameter, names in names_of(model):
        mapped = _MAPPED.get(parameter)
        if mapped is None or parameter.requires_grad or not _is_as_mapped(parameter, *mapped):
            continue
        held, address = mapped
        known = all(named.get(canonical(name)) == held for name in names)
        if known and not written.within(address, held.size_bytes):
            away.append((parameter, parameter.data))
            parameter.data = placeholders.of(held.shape, parameter.dtype)

    def undo() -> None:
        for parameter, data in away:
            parameter.data = data

    return undo


def _is_as_mapped(parameter: nn.Parameter, held: StoredTensor, address: int) -> bool:
    """Whether a weight is the very memory that was mapped for it: not cast, moved or given another tensor."""
    form = (tuple(parameter.shape), parameter.dtype, parameter.device.type, parameter.data_ptr())
    return form == (held.shape, dtype_of(held.dtype), "cpu", address) and parameter.is_contiguous()


class _Written:
    """Which of this process's memory is not a file's: pages of a private mapping become the process's own when written."""

    def __init__(self) -> None:
        self._files: list[tuple[int, int]] = []
        begin, end, inode = 0, 0, 0
        own = False
        for line in _SMAPS.read_text().splitlines():
            head = _AREA.match(line)
            if head:
                if inode and not own:
                    self._files.append((begin, end))
                begin, end, inode, own = int(head[1], 16), int(head[2], 16), int(head[3]), False
            elif line.startswith(("Anonymous:", "Swap:")):
                own = own or int(line.split()[1]) > 0
        if inode and not own:
            self._files.append((begin, end))

    def within(self, address: int, size_bytes: int) -> bool:
        """Whether any of these bytes may be other than those of the file that is mapped there."""
        return not any(begin <= address and address + size_bytes <= end for begin, end in self._files)
