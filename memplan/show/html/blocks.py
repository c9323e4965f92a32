"""Where blocks are: a mark for each layer, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memplan.program.schema import Plan, Tier
from memplan.show import sentences as words
from memplan.show.html.tables import NONE, Row, Table, size
from memplan.show.summary import BlockFact, home_of
from memplan.units import format_bytes

TIERS: tuple[tuple[Tier, str], ...] = (
    ("device", "stay on the device"),
    ("host", "streamed from ram"),
    ("disk", "streamed from disk"),
)
_POLICIES = {
    "recompute": "their activations are recomputed in backward",
    "offload": "their activations wait in ram for the backward",
}
_CELL = 24
"""Height of a mark, in its own units; its ground, two more, says what becomes of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The blocks of one layer, or one block beside the stacks."""

    name: str
    stack: str
    blocks: tuple[int, ...]
    size_bytes: int
    by_tier: tuple[int, int, int]
    """Bytes by ``TIERS``."""
    activations: str
    """``keep``, ``recompute`` or ``offload``; empty where a block is part of no layer."""
    loads: int
    """Of a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One layer's mark: parts (class and top and height) from the ground up."""

    title: str
    parts: tuple[tuple[str, float, float], ...]
    activations: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The marks of one stack, or of what is beside the stacks, in tens; each ten with the number of its first layer."""

    name: str
    tens: tuple[tuple[str, tuple[Mark, ...]], ...]


def layer_of(block: BlockFact) -> str:
    """Return the name of the layer that a block is part of: its own where it is part of none."""
    inside = block.name.removeprefix(f"{block.stack}.") if block.stack else ""
    if not block.stack or inside == block.name:
        return block.name
    return f"{block.stack}.{inside.partition('.')[0]}"


def layers(plan: Plan, blocks: Sequence[BlockFact]) -> tuple[Layer, ...]:
    """Return the layers in the order of their first access."""
    loads = loads_by_block(plan)
    found: dict[str, list[int]] = {}
    for place, block in enumerate(blocks):
        found.setdefault(layer_of(block), []).append(place)
    return tuple(_layer(name, places, blocks, loads) for name, places in found.items())


def loads_by_block(plan: Plan) -> list[int]:
    """Return how often a pass loads each block's weights."""
    loads = [0] * len(plan.table.blocks)
    for stay in plan.residences:
        item = plan.items[stay.item]
        if stay.begins == "load" and item.kind == "weights":
            loads[item.block] += 1
    return loads


def strip(plan: Plan, found: Sequence[Layer]) -> tuple[Line, ...]:
    """Return the marks, a line for each stack; neighbours beside the stacks share one."""
    lines: list[tuple[str, list[Layer]]] = []
    for layer in found:
        if lines and lines[-1][0] == layer.stack:
            lines[-1][1].append(layer)
        else:
            lines.append((layer.stack, [layer]))
    return tuple(Line(name=_span(inside), tens=_tens(words.cycle(plan), stack, inside)) for stack, inside in lines)


def homes(blocks: Sequence[BlockFact]) -> Table:
    """Return what the marks mean, with counts and bytes."""
    rows = []
    for tier, meaning in TIERS:
        here = [block.size_bytes for block in blocks if block.home == tier]
        if here:
            rows.append(Row(name=tier, cells=(f"{len(here):,}", size(sum(here)), meaning), swatch=f"home-{tier}"))
        slow = [block.size_bytes for block in blocks if block.home == tier and block.is_pageable]
        if slow:
            meaning = "not pinned: slower"
            rows.append(Row(name="of it pageable", cells=(f"{len(slow):,}", size(sum(slow)), meaning), style="part"))
    rows.append(
        Row(name="total", cells=(f"{len(blocks):,}", size(sum(block.size_bytes for block in blocks)), ""), style="sum")
    )
    for policy, meaning in _POLICIES.items():
        count = sum(block.activations == policy for block in blocks)
        if count:
            rows.append(Row(name=policy, cells=(f"{count:,}", NONE, meaning), swatch=policy))
    return Table(
        id="homes",
        caption="Frozen blocks by home, and by what becomes of activations",
        head=("blocks", "count", "bytes", "what it means"),
        rows=tuple(rows),
        texts=frozenset({3}),
    )


def runs(plan: Plan, found: Sequence[Layer]) -> Table:
    """Return the layers in their order, a line for neighbours that are alike."""
    groups: list[list[Layer]] = []
    for layer in found:
        if groups and layer.stack and _alike(groups[-1][-1], layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    rows, tiers = [], [place for place in range(len(TIERS)) if any(layer.by_tier[place] for layer in found)]
    for group in groups:
        one, count = group[0], len(group)
        sizes = (size(sum(layer.by_tier[place] for layer in group) or None) for place in tiers)
        loads = sum(layer.loads for layer in group)
        rows.append(Row(name=_span(group), cells=(f"{count:,}", *sizes, one.activations or NONE, f"{loads:,}")))
    return Table(
        id="layers",
        caption="Layers by home, one line for neighbours that are alike",
        head=(
            "layers",
            "count",
            *(TIERS[place][0] for place in tiers),
            "activations",
            f"loads per {words.cycle(plan)}",
        ),
        rows=tuple(rows),
        texts=frozenset({2 + len(tiers)}),
        long=len(rows) > 24,
    )


def table(plan: Plan, blocks: Sequence[BlockFact], found: Sequence[Layer]) -> Table:
    """Return every block; those of a split layer under its name."""
    loads, rows = loads_by_block(plan), list[Row]()
    for layer in found:
        split = len(layer.blocks) > 1
        if split:
            rows.append(Row(name=layer.name, style="group"))
        for place in layer.blocks:
            block = blocks[place]
            name = block.name.removeprefix(f"{layer.name}.") if split else block.name
            cells = (size(block.size_bytes), home_of(block), block.activations, f"{loads[place]:,}")
            rows.append(Row(name=name, cells=cells, style="part" if split else ""))
    return Table(
        id="blocks",
        caption="Every block",
        head=("block", "bytes", "home", "activations", f"loads per {words.cycle(plan)}"),
        rows=tuple(rows),
        texts=frozenset({2, 3}),
        long=True,
    )


def _layer(name: str, places: Sequence[int], blocks: Sequence[BlockFact], loads: Sequence[int]) -> Layer:
    inside = [blocks[place] for place in places]
    sums = [sum(block.size_bytes for block in inside if block.home == tier) for tier, _ in TIERS]
    return Layer(
        name=name,
        stack=inside[0].stack,
        blocks=tuple(places),
        size_bytes=sum(sums),
        by_tier=(sums[0], sums[1], sums[2]),
        activations=inside[0].activations if inside[0].stack else "",
        loads=sum(loads[place] for place in places),
    )


def _alike(one: Layer, other: Layer) -> bool:
    return (one.stack, one.by_tier, one.activations, one.loads, len(one.blocks)) == (
        other.stack,
        other.by_tier,
        other.activations,
        other.loads,
        len(other.blocks),
    )


def _span(group: Sequence[Layer]) -> str:
    first, last = group[0], group[-1]
    if len(group) == 1:
        return first.name
    if first.stack:
        return f"{first.name} … {last.name.removeprefix(f'{first.stack}.')}"
    return f"{first.name} … {last.name}"


def _tens(cycle: str, stack: str, inside: Sequence[Layer]) -> tuple[tuple[str, tuple[Mark, ...]], ...]:
    marks = [_mark(cycle, layer) for layer in inside]
    return tuple(
        (inside[first].name.removeprefix(f"{stack}.") if stack else "", tuple(marks[first : first + 10]))
        for first in range(0, len(inside), 10)
    )


def _mark(cycle: str, layer: Layer) -> Mark:
    parts, top, said = list[tuple[str, float, float]](), float(_CELL), list[str]()
    for (tier, _), size_bytes in zip(TIERS, layer.by_tier, strict=True):
        if size_bytes:
            height = round(_CELL * size_bytes / layer.size_bytes, 2)
            top = max(0.0, round(top - height, 2))
            parts.append((f"home-{tier}", top, height))
            said.append(f"{format_bytes(size_bytes)} {tier}")
    text = f"{layer.name}: {', '.join(said)}"
    if layer.activations in _POLICIES:
        text += f", {layer.activations}"
    if layer.loads:
        text += f", {layer.loads:,} {'load' if layer.loads == 1 else 'loads'} per {cycle}"
    return Mark(title=text, parts=tuple(parts), activations=layer.activations)
