"""The trace's eye: sees every operator on fake tensors, tells its cost and its storages to the access under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from memplan.analyze.blocks.blocks import Draft, dtype_name
from memplan.analyze.trace.accesses import AccessLog
from memplan.analyze.trace.fake_values import Values
from memplan.analyze.trace.operators import Operator, flops, operator, size_bytes, tensors, workspace_bytes
from memplan.analyze.trace.provenance import Origins
from memplan.hooks.offload import version_of
from memplan.model.live_storages import StorageLedger, opens, storage_of

_DEVICE = torch.ops.prim.device.default


@dataclass(slots=True)
class Work:
    """What the operators of one segment cost."""

    flops: int = 0
    float32_flops: int = 0
    matmul_bytes: int = 0
    other_bytes: int = 0
    kernels: int = 0

    def add(self, other: Work) -> None:
        self.flops += other.flops
        self.float32_flops += other.float32_flops
        self.matmul_bytes += other.matmul_bytes
        self.other_bytes += other.other_bytes
        self.kernels += other.kernels


class Recorder(StorageLedger):
    """A ledger that counts work besides, looks who reads frozen weights when, and what copies of them live on."""

    def __init__(
        self, ignore: Iterable[torch.Tensor], frozen: Mapping[int, Draft], batch: Iterable[torch.Tensor]
    ) -> None:
        """``frozen``: the block of each frozen storage by its address."""
        super().__init__(ignore)
        self.log = AccessLog(self.begin_segment)
        self.values = Values()
        self.work: list[Work] = [Work()]
        self.matmul_flops: Counter[tuple[int, str]] = Counter()
        """FLOPs of matrix products by segment and dtype."""
        self.read: set[str] = set()
        """Names of blocks that an operator read."""
        self.stray: dict[str, str] = {}
        """Names of blocks that were read outside their triggers, each with the operator."""
        self.rows: Counter[tuple[str, str, int]] = Counter()
        """Bytes of the rows of a block that were read under one of its triggers, by the names of both and the segment.
        """
        self.whole: set[tuple[str, str]] = set()
        """Blocks and triggers under which an operator read more than rows."""
        self.deciding: set[str] = set()
        """Triggers in whose forward something was decided by values that a trace does not have."""
        self.touched: set[int] = set()
        """Addresses of storages of ``names`` that an operator read."""
        self.names: dict[int, str] = {}
        """What the model holds by the addresses of its storages."""
        self.written: dict[str, str] = {}
        """Blocks whose weights were written to, each with the operator."""
        self.stateful: dict[str, str] = {}
        """Triggers whose forward would do otherwise a second time, each with the reason."""
        self.strangers: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        """Real leaves that require gradients, by id, each with the gradient that it had."""
        self._overwritten: dict[int, tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]] = {}
        self._frozen = frozen
        self._origins = Origins(frozen, (tensor.untyped_storage()._cdata for tensor in batch))
        self._derived: Counter[tuple[int, int, str]] = Counter()

    def derived(self) -> dict[tuple[int, int, str], int]:
        """Return the bytes of what was made of weights alone, by the segments of birth and death (for what is alive the
        one under way) and by how it was made.
        """
        found = Counter(self._derived)
        for address, held in self._held.items():
            how = self._origins.derived(address)
            if how:
                found[held.born, self.segment, how] += held.size_bytes
        return dict(found)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in a trace (it runs under ``force_eager``): torch need not see to that at every operator,
        which takes a fifth of its time.
        """
        return False

    def begin_segment(self, segment: int) -> None:
        super().begin_segment(segment)
        self.work.append(Work())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if opens(types):
            return NotImplemented
        given = kwargs or {}
        if func is _DEVICE:  # asked of every fake tensor, many times an operator
            return args[0].fake_device if type(args[0]) is FakeTensor else func(*args, **given)
        known = operator(func)
        for tensor in tensors(args):  # a view may be all that is seen of one
            is_real = type(tensor) is not FakeTensor and not isinstance(tensor, FakeTensor)
            if is_real and tensor.requires_grad and tensor.is_leaf and id(tensor) not in self.strangers:
                self.strangers[id(tensor)] = (tensor, tensor.grad)
                tensor.grad = None
        for tensor in known.written(args, given):
            self._see_write(tensor, known)
        generator = given.get("generator")
        if generator is not None and generator is not torch.default_generator:
            self._would_differ("it draws from a random generator of its own")
        decisions = self.values.decisions
        result = self.values.run(func, args, given)
        if self.values.decisions > decisions:
            self.deciding.update(self.log.active)
        self.note_all(result)
        if known.is_free:
            return result
        self._origins.follow(known, args, given, result)
        work = self.work[-1]
        work.kernels += 1
        moved = 0
        for tensor in tensors(args):
            moved += size_bytes(tensor)
            if not known.reads_shape_only:
                self._see_read(tensor, known, result)
        made = sum(size_bytes(tensor) for tensor in tensors((result,)))
        if known.is_matmul:
            counted = flops(func, args, given, result)
            dtype = _product_dtype(args)
            work.flops += counted
            work.float32_flops += counted if dtype == "float32" else 0
            dequantized_bytes = workspace_bytes(func, args)
            self.touch(dequantized_bytes)
            work.matmul_bytes += moved + made + dequantized_bytes
            work.other_bytes += dequantized_bytes
            self.matmul_flops[self.segment, dtype] += counted
        else:
            work.other_bytes += 2 * made if known.reads_rows else made if known.reads_shape_only else moved + made
        return result

    def _death_of(self, key: int) -> Callable[[object], None]:
        died = super()._death_of(key)

        def forgotten(reference: object) -> None:
            held, how = self._held[key], self._origins.forget(key)
            if how:
                self._derived[held.born, self.segment, how] += held.size_bytes
            died(reference)

        return forgotten

    def put_back(self) -> None:
        """Put back what was written to real tensors, which the model held where nobody looked, and their gradients."""
        for parameter, gradient in self.strangers.values():
            parameter.grad = gradient
        for tensor, version, contents, before in self._overwritten.values():
            contents.copy_(before)
            if not tensor.is_inference():
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))

    def _see_write(self, tensor: torch.Tensor, known: Operator) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        draft = self._frozen.get(storage._cdata)
        if draft is not None:
            self.written.setdefault(draft.name, known.name)
        name = self.names.get(storage._cdata)
        if name is not None:
            self._would_differ(f"it writes to {name} (by {known.name})")
        if (
            not isinstance(tensor, FakeTensor)
            and tensor.device.type != "meta"
            and storage._cdata not in self._overwritten
        ):
            with unset_fake_temporarily():
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self._overwritten[storage._cdata] = (tensor, version_of(tensor), whole, whole.clone())
            self._would_differ("it writes to a tensor that it finds elsewhere")

    def _would_differ(self, reason: str) -> None:
        for trigger in self.log.active:
            self.stateful.setdefault(trigger, reason)

    def _see_read(self, tensor: torch.Tensor, known: Operator, result: object) -> None:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata in self.names:
            self.touched.add(storage._cdata)
        draft = None if storage is None else self._frozen.get(storage._cdata)
        if draft is None:
            return
        self.read.add(draft.name)
        log, now = self.log, self.log.now
        held = {*log.active, now.module} if now is not None and now.kind == "backward" else set(log.active)
        under = held.intersection(draft.triggers)
        if not under:
            self.stray.setdefault(draft.name, known.name)
        for trigger in under:
            if known.reads_rows:
                self.rows[draft.name, trigger, self.segment] += sum(size_bytes(made) for made in tensors((result,)))
            else:
                self.whole.add((draft.name, trigger))


def _product_dtype(args: tuple[Any, ...]) -> str:
    return next((dtype_name(t.dtype) for t in tensors(args) if t.dtype.is_floating_point), "float32")
