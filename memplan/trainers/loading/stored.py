"""A model's weights as its checkpoint has them: where each comes from, and reading or mapping it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memplan.errors import CheckpointError
from memplan.model.checkpoint import StoredTensor
from memplan.run.memory.arena import Placeholders, dtype_of
from memplan.run.memory.disk import DiskReader, Extent
from memplan.run.memory.home import Checkpoint, Stored
from memplan.trainers.loading.conversion import stored_for
from memplan.trainers.loading.new_heads import begin, may_be_new

_ORIGINS = WeakIdKeyDictionary()
"""What of a checkpoint each parameter is that was made here, wherever in a model it is put afterwards."""


def put_placeholders(model: nn.Module, folder: str | Path, device: torch.device) -> None:
    """Put a placeholder in the place of each parameter on ``meta``, and read the buffers that the checkpoint holds.

    Raises CheckpointError where the checkpoint is not the model's; the model then
    is as it was.
    """
    placeholders = Placeholders(device)
    put_weights(model, folder, lambda reader, meta, stored: placeholders.of(tuple(meta.shape), meta.dtype))


def put_weights(
    model: nn.Module,
    folder: str | Path,
    data_of: Callable[[DiskReader, nn.Parameter, Stored], torch.Tensor],
    *,
    heads: bool = False,
) -> None:
    """Put what ``data_of`` gives in the place of each parameter on ``meta``, and read the buffers.

    ``data_of``: from what reads the files, the parameter and what the checkpoint holds of it. ``heads``: begin those
    that the checkpoint holds nothing for, on the CPU. Raises CheckpointError where the checkpoint is not the model's;
    the model then is as it was.
    """
    stored = stored_for(model, folder)
    made: dict[int, nn.Parameter] = {}
    new: list[nn.Parameter] = []
    with contextlib.closing(DiskReader()) as reader:
        for parameter, names in names_of(model):
            if heads and not any(name in stored for name in names) and may_be_new(model, names):
                begun = torch.zeros_like(parameter, device="cpu")
                made[id(parameter)] = nn.Parameter(begun, requires_grad=parameter.requires_grad)
                new.append(made[id(parameter)])
                continue
            held = _held(reader, stored, parameter, names, model, folder)
            if parameter.device.type == "meta":
                own = nn.Parameter(data_of(reader, parameter, held), requires_grad=parameter.requires_grad)
                made[id(parameter)] = own
                _ORIGINS[own] = held
        values = {name: read_stored(reader, stored[name]) for name, _ in model.named_buffers() if name in stored}
    for module in model.modules():
        for name, before in module._parameters.items():
            if before is not None:
                module._parameters[name] = made.get(id(before), before)
    for name, buffer in model.named_buffers():
        if name in values:
            buffer.data = values[name].to(buffer.dtype)
    if new:
        begin(model, new)


def origin_of(parameter: nn.Parameter) -> Stored | None:
    """Return what of a checkpoint a parameter is; None for one that was not made here."""
    found: Stored | None = _ORIGINS.get(parameter)
    return found


def checkpoint_of(model: nn.Module) -> Checkpoint | None:
    """Return what of a checkpoint the parameters of a model are, by their names of now; None where none was made
    here.
    """
    found = {name: origin for parameter, names in names_of(model) if (origin := origin_of(parameter)) for name in names}
    return found or None


def map_stored(reader: DiskReader, stored: StoredTensor, size_bytes: int) -> torch.Tensor:
    """Return the first bytes of a stored tensor as a private mapping of the file (uint8)."""
    extent = Extent(path=stored.path, file_offset_bytes=stored.file_offset_bytes, size_bytes=size_bytes)
    reader.open([extent])
    return torch.from_numpy(reader.mapped(extent, stored.name))


def names_of(model: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Return each parameter with all the names it goes by."""
    names: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), (parameter, []))[1].append(name)
    return list(names.values())


def _held(
    reader: DiskReader,
    stored: Checkpoint,
    parameter: nn.Parameter,
    names: list[str],
    model: nn.Module,
    folder: str | Path,
) -> Stored:
    """Return what a checkpoint holds of a parameter. Raises CheckpointError where that is nothing, or not one thing."""
    held = [stored[name] for name in names if name in stored]
    shape = tuple(parameter.shape)
    if not held:
        raise CheckpointError(
            f"{folder} holds no tensor {names[0]}, which {type(model).__name__} needs: give the checkpoint of this "
            "model"
        )
    if held[0].shape != shape:
        raise CheckpointError(
            f"{held[0].path} holds {names[0]} with shape {held[0].shape}, its config.json says {shape}: the two do "
            "not belong together"
        )
    for other in held[1:]:
        if other != held[0] and not torch.equal(_bytes(reader, held[0]), _bytes(reader, other)):
            raise CheckpointError(
                f"{folder} holds different weights for {' and '.join(names)}, which its config.json says are tied: set "
                "tie_word_embeddings to false there, if they are not"
            )
    return held[0]


def _bytes(reader: DiskReader, stored: Stored) -> torch.Tensor:
    if isinstance(stored, StoredTensor):
        return map_stored(reader, stored, stored.size_bytes)
    return read_stored(reader, stored).contiguous().view(torch.uint8)


def read_stored(reader: DiskReader, stored: Stored) -> torch.Tensor:
    """Return a stored tensor in RAM. Raises TransferError."""
    if not isinstance(stored, StoredTensor):
        return stored.make(lambda part: read_stored(reader, part))
    raw = torch.empty(stored.size_bytes, dtype=torch.uint8)
    extent = _extent(stored)
    reader.open([extent])
    reader.read([(extent, raw.numpy())], stored.name)
    return raw.view(dtype_of(stored.dtype)).view(stored.shape)


def _extent(stored: StoredTensor) -> Extent:
    return Extent(path=stored.path, file_offset_bytes=stored.file_offset_bytes, size_bytes=stored.size_bytes)
