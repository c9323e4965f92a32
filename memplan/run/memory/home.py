"""Homes: where each block's permanent copy lies, and how it gets there.

Each block goes straight to its home, in turn: the model is never held twice. A block's bytes come from the
model's own parameters, or from the checkpoint's files where the model was built without its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch

from memplan.analyze.graph import Block, Tensor
from memplan.errors import CheckpointError, RunError
from memplan.model.checkpoint import StoredTensor
from memplan.model.weights import Weight
from memplan.run.memory.arena import dtype_of, is_placeholder, own_storage, shaped, strides_of, view
from memplan.run.memory.disk import Bytes, DiskReader, Extent, Reading
from memplan.run.transfer.transfer import HostSource, Source
from memplan.units import MIB

_PIECE_BYTES = 16 * MIB
"""No more is held at a time of what is compared, cast or packed."""


Layout = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def layout_of(tensor: torch.Tensor) -> Layout:
    """Return where a tensor lies, and how: two that are alike in this are the same values, whatever those are."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Converted(Protocol):
    """A tensor that is made of others of a checkpoint: fused experts, a split projection."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def path(self) -> str:
        """A file that it comes from, for messages."""

    def make(self, read: Callable[[StoredTensor], torch.Tensor]) -> torch.Tensor:
        """Return it, in the dtype that the model has it in; ``read`` reads what it is made of."""


Stored = StoredTensor | Converted
Matched = Mapping[str, Weight]
Checkpoint = Mapping[str, Stored]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes as they lie in memory, without a copy unless it has gaps."""
    with torch.no_grad():
        held, strides = tensor.detach(), strides_of(tensor)
        if strides is not None:
            held = held.as_strided((held.numel(),), (1,))
        return held.contiguous().reshape(-1).view(torch.uint8)


def is_away(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no weights of its own: on ``meta`` or a placeholder."""
    return tensor.device.type == "meta" or is_placeholder(tensor)


class Weights:
    """Where the bytes of the model's frozen tensors come from at attach."""

    def __init__(self, weights: Matched, checkpoint: Checkpoint, reader: DiskReader) -> None:
        self._weights = weights
        self._checkpoint = checkpoint
        self._reader = reader
        self._coming: Reading | None = None

    def fill(self, block: Block, part: torch.Tensor) -> None:
        """Write a block's layout into ``part`` (uint8, on the host or the device). Raises CheckpointError.

        One block may still be on its way from the disk when this returns, so that the disk has the next to go on with:
        all have come when ``finish`` has returned.
        """
        direct = []
        for tensor in block.tensors:
            target = part[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
            held = self._weights[tensor.name].tensor
            if not is_away(held):
                target.copy_(as_bytes(held.data))
                continue
            stored = self._stored(tensor)
            if isinstance(stored, StoredTensor) and stored.dtype == tensor.dtype and target.device.type == "cpu":
                direct.append((_extent(stored), target.numpy()))
                continue
            done = 0
            for piece in self._pieces(block, tensor):
                target[done : done + piece.numel()].copy_(piece)
                done += piece.numel()
        self._reader.open(extent for extent, _ in direct)
        reading = self._reader.begin(direct, f"the block {block.name}")
        self.finish()
        self._coming = reading

    def finish(self) -> None:
        """Wait for what is still on its way. Raises TransferError."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None

    def is_held(self, block: Block) -> bool:
        """Whether the model itself holds all of a block's weights."""
        return not any(is_away(self._weights[tensor.name].tensor) for tensor in block.tensors)

    def layout(self, block: Block) -> Iterator[Bytes]:
        """Yield a block's layout piece by piece, zeros where nothing lies. Raises CheckpointError."""
        done = 0
        for tensor in block.tensors:
            if tensor.offset_bytes > done:
                yield np.zeros(tensor.offset_bytes - done, np.uint8)
            for piece in self._pieces(block, tensor):
                yield piece.cpu().numpy()
            done = tensor.offset_bytes + tensor.size_bytes
        if block.size_bytes > done:
            yield np.zeros(block.size_bytes - done, np.uint8)

    def _pieces(self, block: Block, tensor: Tensor) -> Iterator[torch.Tensor]:
        """Yield a tensor's bytes piece by piece, in the dtype that the model has it in."""
        held = self._weights[tensor.name].tensor
        stored = None if not is_away(held) else self._stored(tensor)
        if isinstance(stored, StoredTensor):
            dtype, wanted = dtype_of(stored.dtype), dtype_of(tensor.dtype)
            step = _PIECE_BYTES // max(dtype.itemsize, wanted.itemsize) * dtype.itemsize
            for start in range(0, stored.size_bytes, step):
                raw = self._read(stored, block.name, start, min(step, stored.size_bytes - start))
                yield raw if dtype == wanted else raw.view(dtype).to(wanted).view(torch.uint8)
            return
        if stored is None:
            value = held.data
        else:
            value = stored.make(lambda part: self._read(part, block.name).view(dtype_of(part.dtype)).view(part.shape))
        yield from as_bytes(value).split(_PIECE_BYTES)

    def own_files(self, block: Block) -> tuple[tuple[Extent, int], ...] | None:
        """Return the checkpoint's extents of a block, or None where the files do not hold just these bytes."""
        found = []
        for tensor in block.tensors:
            stored = self._checkpoint.get(tensor.name)
            if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
                return None
            extent = _extent(stored)
            held = self._weights[tensor.name].tensor
            if not is_away(held) and not self._same(extent, as_bytes(held.data), block.name):
                return None
            found.append((extent, tensor.offset_bytes))
        return tuple(found)

    def _stored(self, tensor: Tensor) -> Stored:
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

    def _read(self, stored: StoredTensor, block: str, start: int = 0, size_bytes: int | None = None) -> torch.Tensor:
        """Return some bytes of a stored tensor (uint8), or all."""
        extent = _extent(stored, start, size_bytes)
        self._reader.open([extent])
        raw = torch.empty(extent.size_bytes, dtype=torch.uint8)
        self._reader.read([(extent, raw.numpy())], f"the block {block}")
        return raw

    def _same(self, extent: Extent, held: torch.Tensor, block: str) -> bool:
        """Whether the file holds the very bytes that the model holds, piece by piece."""
        self._reader.open([extent])
        piece = np.empty(min(_PIECE_BYTES, extent.size_bytes), np.uint8)
        for start in range(0, extent.size_bytes, _PIECE_BYTES):
            size = min(_PIECE_BYTES, extent.size_bytes - start)
            part = Extent(path=extent.path, file_offset_bytes=extent.file_offset_bytes + start, size_bytes=size)
            self._reader.read([(part, piece[:size])], f"the block {block}")
            if not np.array_equal(piece[:size], held[start : start + size].cpu().numpy()):
                return False
        return True


class Home:
    """A block's permanent copy, and its tensors as anyone may read them there."""

    def __init__(self, block: Block, source: Source, weights: Matched) -> None:
        self.block = block
        self.source = source
        self._weights = {tensor.name: weights[tensor.name] for tensor in block.tensors}
        self.lies: torch.Tensor | None = None
        """Where the weights lie for good, and are pointed at; None where they come and go."""
        self.touched: set[str] = set()
        """Tensors that were written to, or lent to someone who may have done so."""
        held = {name: weight.tensor for name, weight in self._weights.items()}
        self.strides = {name: None if is_away(tensor) else strides_of(tensor) for name, tensor in held.items()}
        # What each was: its placeholder where it held no weights, else the device that it was on.
        self._were = {name: tensor.data if is_away(tensor) else tensor.device for name, tensor in held.items()}

    def tensor(self, tensor: Tensor) -> torch.Tensor:
        """Return one tensor with a storage of its own and without a copy: where the block lies, or mapped from disk."""
        apart = self._apart(tensor)
        if apart is not None:
            return apart
        return shaped(self._raw(tensor), tensor, self.strides[tensor.name])

    def _raw(self, tensor: Tensor) -> torch.Tensor:
        begin, end = tensor.offset_bytes, tensor.offset_bytes + tensor.size_bytes
        if isinstance(self.source, HostSource):
            lies = self.source.part if self.source.handed_out is None else self.source.handed_out
            return own_storage(lies[begin:end])
        for extent, offset in self.source.extents:
            if offset <= begin and end <= offset + extent.size_bytes:
                part = Extent(
                    path=extent.path,
                    file_offset_bytes=extent.file_offset_bytes + begin - offset,
                    size_bytes=tensor.size_bytes,
                )
                return torch.from_numpy(self.source.reader.mapped(part, f"the block {self.block.name}"))
        raise AssertionError(f"no extent holds {tensor.name}")

    def give_back(self) -> None:
        """Give the weights back what they were: tensors of their own with their weights, or their placeholders.

        Raises TransferError where a block cannot be read from disk.
        """
        held: torch.Tensor | None = None
        for tensor in self.block.tensors:
            weight, was = self._weights[tensor.name], self._were[tensor.name]
            if self._apart(tensor) is not None:
                continue
            if isinstance(was, torch.Tensor):
                # Where it lay for good nobody has seen what was written to it.
                may_differ = self.lies is not None or tensor.name in self.touched
                weight.bind(self.tensor(tensor) if may_differ else was)
                continue
            if held is None:
                held = self._layout()
            with torch.inference_mode(False), torch.no_grad():
                weight.bind(view(held, tensor, self.strides[tensor.name]).to(was, copy=True))

    @property
    def is_writable(self) -> bool:
        """Whether the home is memory of this process's own; else it is files, or pinned memory that ranks share."""
        return isinstance(self.source, HostSource) and self.source.handed_out is None

    @property
    def files(self) -> str:
        """The files that it is in, for messages."""
        if isinstance(self.source, HostSource):
            return "" if self.source.handed_out is None else "pinned memory that several ranks read"
        return ", ".join(sorted({extent.path for extent, _ in self.source.extents}))

    def write(self, tensor: Tensor, value: torch.Tensor) -> None:
        """Have one tensor be ``value``, of the same shape and dtype, from now on. The home must be writable."""
        assert isinstance(self.source, HostSource)
        self.touched.add(tensor.name)
        with torch.inference_mode(False), torch.no_grad():
            view(self.source.part, tensor, self.strides[tensor.name]).copy_(value)

    def _apart(self, tensor: Tensor) -> torch.Tensor | None:
        """Return what was put in the place of a weight that lies here for good (``weight.data = ...``), or None.

        It stays where it is: whoever still holds what lay here before may put it back.
        """
        if self.lies is None:
            return None
        there = view(self.lies, tensor, self.strides[tensor.name])
        for pointed in self._weights[tensor.name].everywhere():
            if layout_of(pointed) != layout_of(there):
                return pointed.data
        return None

    def copy_to(self, part: torch.Tensor) -> None:
        """Write the block's layout into ``part`` (uint8). Raises TransferError."""
        part.copy_(self._layout())

    def _layout(self) -> torch.Tensor:
        apart = {tensor: value for tensor in self.block.tensors if (value := self._apart(tensor)) is not None}
        if isinstance(self.source, HostSource):
            held = self.source.part.clone() if apart else self.source.part
        else:
            held = torch.empty(self.block.size_bytes, dtype=torch.uint8)
            self.source.read(held.numpy())
        for tensor, value in apart.items():
            there = view(held, tensor, self.strides[tensor.name])
            if value.shape != there.shape or value.dtype != there.dtype:
                raise RunError(
                    f"the frozen weight {tensor.name} ({tensor.dtype} {tensor.shape}) was replaced by a tensor of "
                    "another shape or dtype, and cannot be placed anew as the plan has it: detach() first, then plan "
                    "and attach anew"
                )
            with torch.inference_mode(False), torch.no_grad():
                there.copy_(value)
        return held


def _extent(stored: StoredTensor, start: int = 0, size_bytes: int | None = None) -> Extent:
    size = stored.size_bytes - start if size_bytes is None else size_bytes
    return Extent(path=stored.path, file_offset_bytes=stored.file_offset_bytes + start, size_bytes=size)
