"""Homes: where each block's permanent copy lies, and how it gets there.

Each block goes straight to its home, one at a time: the model is never held twice. A block's bytes come from the
model's own parameters, or from the checkpoint's files where the model was built without its weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from memplan.analyze.graph import Block, Tensor
from memplan.checkpoint import StoredTensor
from memplan.errors import CheckpointError, InputError
from memplan.run.arena import dtype_of, is_placeholder, view
from memplan.run.disk import Bytes, DiskReader, Extent, pack
from memplan.units import MIB, format_bytes

_COMPARE_BYTES = 16 * MIB

Parameters = Mapping[str, nn.Parameter]
Checkpoint = Mapping[str, StoredTensor]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes in order, without a copy where it is contiguous."""
    with torch.no_grad():
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def is_away(parameter: nn.Parameter) -> bool:
    """Whether the parameter holds no weights of its own: on ``meta`` or a placeholder."""
    return parameter.device.type == "meta" or is_placeholder(parameter)


class Weights:
    """Where the bytes of the model's frozen tensors come from at attach."""

    def __init__(self, parameters: Parameters, checkpoint: Checkpoint, reader: DiskReader) -> None:
        self._parameters = parameters
        self._checkpoint = checkpoint
        self._reader = reader

    def fill(self, block: Block, part: torch.Tensor) -> None:
        """Write a block's layout into ``part`` (uint8, on the host or the device). Raises CheckpointError."""
        for tensor in block.tensors:
            parameter = self._parameters[tensor.name]
            target = part[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
            if not is_away(parameter):
                target.copy_(as_bytes(parameter.data))
                continue
            stored = self._stored(tensor)
            if stored.dtype == tensor.dtype and target.device.type == "cpu":
                self._read(stored, target.numpy(), block.name)
                continue
            raw = torch.empty(stored.size_bytes, dtype=torch.uint8)
            self._read(stored, raw.numpy(), block.name)
            value = raw.view(dtype_of(stored.dtype)).view(stored.shape)
            target.copy_(as_bytes(value.to(dtype_of(tensor.dtype))))

    def own_files(self, block: Block) -> tuple[tuple[Extent, int], ...] | None:
        """Return the checkpoint's extents of a block, or None where the files do not hold just these bytes."""
        found = []
        for tensor in block.tensors:
            stored = self._checkpoint.get(tensor.name)
            if stored is None or stored.dtype != tensor.dtype or stored.shape != tensor.shape:
                return None
            extent = _extent(stored)
            parameter = self._parameters[tensor.name]
            if not is_away(parameter) and not self._same(extent, as_bytes(parameter.data), block.name):
                return None
            found.append((extent, tensor.offset_bytes))
        return tuple(found)

    def _stored(self, tensor: Tensor) -> StoredTensor:
        stored = self._checkpoint.get(tensor.name)
        if stored is None:
            raise CheckpointError(
                f"the model was built without its weights, and its checkpoint holds no tensor {tensor.name}: "
                "load the model with its weights, or give the checkpoint that has them"
            )
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{stored.path} holds {tensor.name} with shape {stored.shape}, the model has {tensor.shape}: "
                "give the checkpoint of this model"
            )
        return stored

    def _read(self, stored: StoredTensor, destination: Bytes, block: str) -> None:
        extent = _extent(stored)
        self._reader.open([extent])
        self._reader.read([(extent, destination)], f"the block {block}")

    def _same(self, extent: Extent, held: torch.Tensor, block: str) -> bool:
        """Whether the file holds the very bytes that the model holds, piece by piece."""
        self._reader.open([extent])
        for start in range(0, extent.size_bytes, _COMPARE_BYTES):
            size = min(_COMPARE_BYTES, extent.size_bytes - start)
            piece = np.empty(size, np.uint8)
            part = Extent(path=extent.path, file_offset_bytes=extent.file_offset_bytes + start, size_bytes=size)
            self._reader.read([(part, piece)], f"the block {block}")
            if not np.array_equal(piece, held[start : start + size].cpu().numpy()):
                return False
        return True


class BlockFiles:
    """Block files packed for one run in a folder of their own, which goes with the run."""

    def __init__(self, folder: Path, blocks: tuple[Block, ...]) -> None:
        needed = sum(block.size_bytes for block in blocks)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{format_bytes(needed)} of blocks were to be written to {folder}, where {format_bytes(free)} are "
                "free: free some, set MEMPLAN_CACHE to another disk, or give more ram"
            )
        self.folder = Path(tempfile.mkdtemp(prefix="blocks-", dir=folder))

    def write(self, block: Block, weights: Weights) -> tuple[tuple[Extent, int], ...]:
        """Write a block in its layout; return where its tensors lie."""
        layout = torch.zeros(block.size_bytes, dtype=torch.uint8)
        weights.fill(block, layout)
        path = pack(self.folder, f"{block.id}.bin", [layout.numpy()])
        return ((Extent(path=str(path), file_offset_bytes=0, size_bytes=block.size_bytes), 0),)

    def remove(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def restore(block: Block, part: torch.Tensor, parameters: Parameters, devices: Mapping[str, torch.device]) -> None:
    """Give a block's parameters tensors of their own with the bytes of ``part``, on the devices they came from."""
    with torch.inference_mode(False), torch.no_grad():
        for tensor in block.tensors:
            value = torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device=devices[tensor.name])
            value.copy_(view(part, tensor))
            parameters[tensor.name].data = value


def _extent(stored: StoredTensor) -> Extent:
    return Extent(path=stored.path, file_offset_bytes=stored.file_offset_bytes, size_bytes=stored.size_bytes)
