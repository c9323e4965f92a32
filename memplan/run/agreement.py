"""What must be the same on all ranks before a plan is put to work: the plan, the model, its frozen weights."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping

import msgspec
import torch

from memplan.model.checkpoint import StoredTensor
from memplan.model.weights import Weight
from memplan.program import codec
from memplan.program.schema import Plan
from memplan.ranks.session import RankError, Session
from memplan.run.memory.home import Checkpoint, as_bytes, is_away

_PIECE_WORDS = 1 << 20
_LOOKED_AT_BYTES = 4096
"""Of a weight that is a file's own: its beginning. Its place in a file of that size is compared too."""


class _Own(msgspec.Struct, frozen=True):
    """One rank's. ``weights``: by block, in the plan's order."""

    plan: str
    model: str
    weights: list[int]


def require_same(ranks: Session, plan: Plan, weights: Mapping[str, Weight], stored: Checkpoint) -> None:
    """Raise RankError where a rank has another plan, or frozen weights of other names, shapes, dtypes or values.

    Of what the model holds every byte is looked at; of what is to be read from files, where it is in them and how it
    begins. DDP copies rank 0's values to all as it is built, which is not done to weights that are streamed.
    """
    doing = "comparing plans and weights"
    with ranks.telling(doing):
        own = _Own(
            plan=hashlib.sha256(codec.encode(plan)).hexdigest(),
            model=f"{plan.model} {plan.fingerprint}",
            weights=[
                sum(_number(weights[tensor.name].tensor, stored.get(tensor.name)) for tensor in block.tensors) % 2**63
                for block in plan.table.blocks
            ],
        )
    records = [msgspec.msgpack.decode(one, type=_Own) for one in ranks.gather(doing, msgspec.msgpack.encode(own))]
    first = records[0]
    for rank, record in enumerate(records):
        if record.model != first.model:
            raise RankError(f"rank {rank} trains {record.model}, and rank 0 {first.model}: one model is trained")
        if record.plan != first.plan:
            raise RankError(
                f"rank {rank} has another plan than rank 0: give sizes for vram and ram in place of what is free, and "
                "the longest batch of all ranks; or make one plan, and have every rank load its file"
            )
        for block, its, zeroth in zip(plan.table.blocks, record.weights, first.weights, strict=True):
            if its != zeroth:
                raise RankError(
                    f"the frozen weights of rank {rank} are not those of rank 0 ({block.name}): load one checkpoint on "
                    "every rank, or set the seed before the model is made"
                )


def _number(tensor: torch.Tensor, stored: object) -> int:
    """Return a number of a frozen weight, the same wherever its bytes are the same, and hardly elsewhere."""
    if not is_away(tensor):
        return _sum(as_bytes(tensor.data))
    if not isinstance(stored, StoredTensor):
        return 0  # made of others as it is read
    found = hashlib.sha256(f"{stored.name} {stored.dtype} {stored.shape}".encode())
    with contextlib.suppress(OSError), open(stored.path, "rb") as file:  # who cannot read it says so when he fills it
        found.update(f"{os.fstat(file.fileno()).st_size}".encode())
        found.update(os.pread(file.fileno(), min(_LOOKED_AT_BYTES, stored.size_bytes), stored.file_offset_bytes))
    return int.from_bytes(found.digest()[:7], "little")


def _sum(held: torch.Tensor) -> int:
    """Return a sum of a tensor's bytes (uint8, one dimension), each word with a factor of its place."""
    total = 0
    with torch.inference_mode(False), torch.no_grad():
        for place, words in enumerate(_words(held)):
            factors = torch.arange(place * _PIECE_WORDS, place * _PIECE_WORDS + len(words), dtype=torch.int64) * 2 + 1
            total += int((words * factors * _ODD).sum())
    return total


_ODD = 0x1E3779B97F4A7C15


def _words(held: torch.Tensor) -> Iterator[torch.Tensor]:
    for piece in held.split(8 * _PIECE_WORDS):
        own = piece.cpu()
        whole = own.numel() // 8 * 8
        # A copy where the words are not aligned to themselves.
        aligned = own[:whole] if own.data_ptr() % 8 == 0 else own[:whole].clone()
        yield aligned.view(torch.int64)
        if whole < own.numel():
            yield own[whole:].to(torch.int64)
