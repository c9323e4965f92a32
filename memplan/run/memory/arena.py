"""Arenas: one line of offsets in a tier. Items are byte ranges of it; parameters are views of those.

[Note: bytes that come and go] A segment may be given back and brought back, while views of it live on (autograd's saved
ones too). On the CPU all segments lie in one mapping at addresses that never change: the kernel takes the pages of what
is given back, and reads there give zeros until it is filled again. On a GPU each is a storage of its own that
is resized to nothing and back, which its views follow; it is allocated and freed in the order of the compute stream,
behind which every copy into it waits. Unproven: no GPU has run it yet.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.program.schema import Segment
from memplan.run.memory.page_lock import page_locked
from memplan.units import align_up, format_bytes

_LOG = logging.getLogger("memplan")

_POISON = 0xFF
"""All bits set: NaN in every floating-point format, -1 in every signed integer."""


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of that name; raises RunError for what is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RunError(
            f"the plan names the dtype {name!r}, which this torch does not have: use the torch it was made with"
        )
    return dtype


class Addresses:
    """Where an arena lies in memory at the moment. Holds none of it: a graph that is alive may keep this."""

    def __init__(self) -> None:
        self.spans: dict[int, tuple[int, int]] = {}
        """By segment that is there, or 0 for all: begin and end."""

    def holds(self, address: int) -> bool:
        """Whether an address is in the arena."""
        return any(begin <= address < end for begin, end in self.spans.values())


class Arena:
    """Bytes of one tier, all there at first. On the compute device, or on the host (page-locked where the device is
    apart from it).

    [Note: alignment changes bits] torch aligns CPU allocations to 64 bytes and CUDA ones to 512, and addresses are
    multiples of 512: a weight's alignment here is that of a tensor of its own, so results are a whole run's to the bit.
    """

    def __init__(
        self,
        size_bytes: int,
        device: torch.device,
        *,
        pinned: bool = False,
        segments: Sequence[Segment] = (),
        poisoned: bool = False,
    ) -> None:
        """``segments``: what may come and go of it, the first one apart; they follow one another and sum to
        ``size_bytes``. ``poisoned``: what is given back is filled with NaN instead, so that a stale read is heard.
        """
        self.size_bytes = size_bytes
        self.watch: Callable[[int], None] | None = None
        """Told the change of ``there_bytes`` where segments come and go."""
        self._poisoned = poisoned
        self._mapping: mmap.mmap | None = None
        self._segments: list[tuple[int, torch.Tensor]] = []  # where each begins, and its bytes
        self._away: set[int] = set()
        self.addresses = Addresses()
        # Lightning validates in inference mode; tensors made there could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            if len(segments) < 2:
                self.bytes = _allocate(size_bytes, device, pinned)
                self._segments.append((0, self.bytes))
            elif device.type == "cpu":
                self.bytes = self._map(segments)
            else:
                for segment in segments:
                    self._segments.append((segment.offset_bytes, _allocate(segment.size_bytes, device, pinned)))
                self.bytes = self._segments[0][1]
            flat = device.type == "cpu" or len(segments) < 2
            whole = [(0, self.bytes)] if flat else enumerate(part for _, part in self._segments)
            self.addresses.spans.update((number, _span(part)) for number, part in whole)

    def _map(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Map memory of the CPU, in which each segment begins on a page of its own. Raises RunError."""
        total = sum(align_up(segment.size_bytes, mmap.PAGESIZE) for segment in segments)
        try:
            self._mapping = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _refused(total, "memory", error) from error
        held = torch.from_numpy(np.frombuffer(self._mapping, np.uint8))
        top = 0
        for segment in segments:
            self._segments.append((segment.offset_bytes, held[top : top + segment.size_bytes]))
            top += align_up(segment.size_bytes, mmap.PAGESIZE)
        return held

    @property
    def there_bytes(self) -> int:
        """Bytes of the segments that are there."""
        return sum(held.numel() for number, (_, held) in enumerate(self._segments) if number not in self._away)

    @property
    def is_elastic(self) -> bool:
        return len(self._segments) > 1

    def segment(self, number: int) -> torch.Tensor:
        """Return a segment's bytes, there or not: uint8, one dimension, no copy."""
        return self._segments[number][1]

    def is_there(self, number: int) -> bool:
        """Whether a segment is there."""
        return number not in self._away

    def part(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Return that byte range, which lies in one segment: uint8, one dimension, no copy."""
        begin, held = next(one for one in reversed(self._segments) if one[0] <= offset_bytes)
        with torch.inference_mode(False), torch.no_grad():
            return held[offset_bytes - begin : offset_bytes - begin + size_bytes]

    def give_back(self, number: int) -> None:
        """Have a segment's bytes be others' until ``bring_back``. What lay there is lost."""
        if number in self._away:
            return
        held = self.segment(number)
        if self._poisoned and held.device.type == "cpu":
            poison(held)
        elif self._mapping is not None:
            begin = held.data_ptr() - self.bytes.data_ptr()
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, held.numel())
        else:
            # First: an interrupt must not leave a segment that counts as there without its bytes.
            self._away.add(number)
            self.addresses.spans.pop(number, None)
            held.untyped_storage().resize_(0)
        self._away.add(number)
        self._changed(-held.numel())

    def bring_back(self, number: int) -> None:
        """Have a segment's bytes there again, unfilled. Raises torch's error where a device has none left."""
        if number not in self._away:
            return
        held = self.segment(number)
        if self._mapping is None:
            held.untyped_storage().resize_(held.numel())
            self.addresses.spans[number] = _span(held)
        self._away.discard(number)
        self._changed(held.numel())

    def _changed(self, size_bytes: int) -> None:
        if self.watch is not None:
            self.watch(size_bytes)


def _span(part: torch.Tensor) -> tuple[int, int]:
    return part.data_ptr(), part.data_ptr() + part.numel()


def poison(part: torch.Tensor) -> None:
    """Fill a byte range so that whoever reads it too early gets NaN."""
    part.fill_(_POISON)


def view(part: torch.Tensor, tensor: Tensor, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return ``tensor`` as a view of its block's byte range ``part``; ``strides`` as for :func:`shaped`."""
    with torch.inference_mode(False), torch.no_grad():
        return shaped(part[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes], tensor, strides)


def shaped(raw: torch.Tensor, tensor: Tensor, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the bytes ``raw`` (uint8, one dimension) as ``tensor``. ``strides``: as :func:`strides_of` gave them."""
    with torch.inference_mode(False), torch.no_grad():
        values = raw.view(dtype_of(tensor.dtype))
        return values.view(tensor.shape) if strides is None else values.as_strided(tensor.shape, strides)


def strides_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return a tensor's strides in elements; None where they are those of a contiguous one.

    [Note: strides change bits] A transposed weight goes another way through matmul than a contiguous copy of it, and by
    the strides of dimensions of size 1, which move nothing, torch tells a convolution in channels-last. So they are
    kept in an arena. One with gaps (a column of a larger tensor) becomes contiguous.
    """
    strides = tensor.stride()
    dims = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))
    is_plain = strides == torch.empty(tensor.shape, device="meta").stride()
    return None if is_plain or not tensor.permute(dims).is_contiguous() else strides


def has_no_gaps(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills a range of memory, in whatever order of its dimensions."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return reach + 1 == tensor.numel()


def own_storage(part: torch.Tensor) -> torch.Tensor:
    """Return the same memory (uint8, one dimension) under a storage of its own.

    What saves a tensor saves its storage, and takes tensors of one storage for one tensor: neither is meant here.
    """
    with torch.inference_mode(False), torch.no_grad():
        begin = part.storage_offset()
        return part.new_empty(0).set_(part.untyped_storage()[begin : begin + part.numel()])


def _allocate(size_bytes: int, device: torch.device, pinned: bool) -> torch.Tensor:
    """Return that many bytes. Where page-locking is refused (WSL2, containers), pageable ones. Raises RunError."""
    if pinned and size_bytes:
        try:
            return page_locked(size_bytes)
        except RuntimeError as error:
            _LOG.warning(
                "cannot pin %s of RAM (%s): pageable memory is used, which takes one more copy",
                format_bytes(size_bytes),
                str(error).splitlines()[0],
            )
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise _refused(size_bytes, "vram" if device.type != "cpu" else "memory", error) from error


def _refused(size_bytes: int, tier: str, error: Exception) -> RunError:
    return RunError(
        f"{format_bytes(size_bytes)} of {tier} for the plan's blocks could not be had ({str(error).splitlines()[0]}): "
        "end what else uses it, or make the plan with a smaller budget"
    )


class Placeholders:
    """What parameters are while their block is away: one NaN element expanded to the true shape.

    Counts, shapes and dtypes hold; a stray read is loud; nothing is allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elements: dict[torch.dtype, torch.Tensor] = {}

    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of that shape and dtype that holds no memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            element = self._elements.get(dtype)
            if element is None:
                element = torch.empty(1, dtype=dtype, device=self._device)
                element.view(torch.uint8).fill_(_POISON)
                self._elements[dtype] = element
                _ELEMENTS[element.data_ptr()] = element.untyped_storage()
            return element.expand(shape) if shape else element[0]


_ELEMENTS: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
"""The memory of each placeholder's element by its address, while it lives: of a weight of one element nothing else
tells.
"""


def is_placeholder(parameter: nn.Parameter | torch.Tensor) -> bool:
    """Whether a tensor is one element expanded over several, or the one of a placeholder."""
    with torch._C.DisableTorchFunctionSubclass():  # a streamed weight that is away says so of what it stands for
        if any(stride for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1):
            return False
        return parameter.numel() > 1 or (parameter.numel() == 1 and parameter.data_ptr() in _ELEMENTS)
