"""Blocks in pieces: the natural parts of a layer (its projections), each placed for itself.

An access still reads them all at once. But what stays on the device is chosen in finer steps, so that no room is left
over that is smaller than a layer, and a load begins as soon as there is room for a piece.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from memplan.analyze.graph import Block, Tensor
from memplan.cost.table import CostTable
from memplan.program.schema import Tier
from memplan.units import MIB, align_up

LEAST_BYTES = MIB
"""A piece is at least this large,"""

LATENCIES = 20
"""takes this many times as long to load as any load does at least,"""

MOST_PIECES = 16
"""and is no smaller than this part of its block, so that loads are few."""

_TENSORS = ("weight", "bias", "qweight", "qzeros", "scales", "g_idx")
"""Components of a tensor's name at which that of its part ends, whatever a quantizer adds behind."""


def split(table: CostTable, pins: Mapping[int, Tier]) -> tuple[CostTable, dict[int, Tier]]:
    """Return the table with streamable blocks in pieces, and the pins of these. Where nothing can be split: the
    same.
    """
    least_bytes = max(LEAST_BYTES, int(LATENCIES * table.load_latency_s * table.host_to_device_bytes_per_s))
    blocks: list[Block] = []
    pieces_of: list[tuple[int, ...]] = []
    by_rows = {rows.block for access in table.accesses for rows in access.rows}
    for block in table.blocks:
        whole = block.pinned_because or pins.get(block.id) == "device" or block.id in by_rows
        parts = [] if whole else _parts(block, max(least_bytes, block.size_bytes // MOST_PIECES))
        made = [block] if len(parts) < 2 else [_piece(block, tensors) for tensors in parts]
        pieces_of.append(tuple(range(len(blocks), len(blocks) + len(made))))
        blocks += [replace(piece, id=len(blocks) + turn) for turn, piece in enumerate(made)]
    if len(blocks) == len(table.blocks):
        return table, dict(pins)
    accesses = tuple(
        replace(
            access,
            blocks=tuple(piece for block in access.blocks for piece in pieces_of[block]),
            rows=tuple(replace(rows, block=pieces_of[rows.block][0]) for rows in access.rows),
        )
        for access in table.accesses
    )
    return (
        replace(table, blocks=tuple(blocks), accesses=accesses),
        {piece: tier for block, tier in pins.items() for piece in pieces_of[block]},
    )


def _piece(block: Block, tensors: list[Tensor]) -> Block:
    """Return some tensors of a block as a block, called after the part of the largest."""
    held, offset = [], 0
    for tensor in tensors:
        held.append(replace(tensor, offset_bytes=offset))
        offset += align_up(tensor.size_bytes)
    name = _part_of(max(tensors, key=lambda tensor: tensor.size_bytes).name)
    return replace(block, name=name, tensors=tuple(held), size_bytes=offset)


def _parts(block: Block, least_bytes: int) -> list[list[Tensor]]:
    """Return a block's tensors by part, what is small with a neighbour."""
    by_part: dict[str, list[Tensor]] = {}
    for tensor in block.tensors:
        by_part.setdefault(_part_of(tensor.name), []).append(tensor)
    parts: list[list[Tensor]] = []
    waiting: list[Tensor] = []
    for tensors in by_part.values():
        waiting += tensors
        if _bytes(waiting) >= least_bytes:
            parts.append(waiting)
            waiting = []
    if waiting and parts:
        parts[-1].extend(waiting)
    return parts


def _part_of(tensor: str) -> str:
    parts = tensor.split(".")
    end = next((at for at, part in enumerate(parts) if part in _TENSORS and at), len(parts))
    return ".".join(parts[:end])


def _bytes(tensors: list[Tensor]) -> int:
    return sum(align_up(tensor.size_bytes) for tensor in tensors)
