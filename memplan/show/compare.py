"""Two plans, or two runs, side by side: what changed, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.errors import InputError
from memplan.show.glyphs import Glyphs
from memplan.show.sentences import number, rate
from memplan.show.summary import BlockFact, facts, home_of
from memplan.show.terminal import print_or_write
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

_NOTHING = 1e-9
"""A figure below this is what rounding leaves of none."""
_SAME = 5e-4
"""Times that differ by less than this share read the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of both; ``unit``: ``bytes``, ``s``, ``tokens/s`` or empty for a count."""

    what: str
    first: float | None
    second: float | None
    unit: str

    @property
    def share(self) -> float | None:
        """By what share the second is more; None where there is nothing to compare with."""
        if self.first is None or self.second is None or self.first < _NOTHING:
            return None
        return self.second / self.first - 1

    @property
    def is_some(self) -> bool:
        """Whether either has anything of it."""
        return any(value is not None and value >= _NOTHING for value in (self.first, self.second))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Blocks that are another way in the second plan."""

    first: str
    second: str
    blocks: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What two plans, or two runs, differ in."""

    settings: tuple[tuple[str, str, str], ...]
    """What was asked otherwise: what, and each one's."""
    rows: tuple[Row, ...]
    moved: tuple[Moved, ...]
    """By home, then by what becomes of their activations."""
    notes: tuple[str, ...]


def compare_plans(first: Plan, second: Plan) -> Compared:
    """Return what the second plan has otherwise. Blocks are compared by name; those that only one has are told."""
    one, other = facts(first), facts(second)
    rows = [
        *_both("vram", first.prediction.vram_parts, second.prediction.vram_parts),
        Row(
            what="vram peak",
            first=first.prediction.peaks.vram_bytes,
            second=second.prediction.peaks.vram_bytes,
            unit="bytes",
        ),
        *_both("ram", first.prediction.ram_parts, second.prediction.ram_parts),
        Row(what="  pinned ram", first=one.page_locked_bytes, second=other.page_locked_bytes, unit="bytes"),
        Row(
            what="disk",
            first=first.prediction.peaks.disk_bytes,
            second=second.prediction.peaks.disk_bytes,
            unit="bytes",
        ),
        *(
            Row(what=what, first=of_one / first.group, second=of_other / second.group, unit="s")
            for what, of_one, of_other in (
                ("compute", first.prediction.compute_s, second.prediction.compute_s),
                ("  recompute", one.recompute_s, other.recompute_s),
                ("waiting", first.prediction.stall_s, second.prediction.stall_s),
                ("micro-batch", first.prediction.pass_s, second.prediction.pass_s),
            )
        ),
        Row(what="step", first=first.prediction.step_s, second=second.prediction.step_s, unit="s"),
        Row(
            what="lower bound",
            first=first.prediction.bound_s / first.group,
            second=second.prediction.bound_s / second.group,
            unit="s",
        ),
        Row(what=f"{first.workload.unit}/s", first=one.tokens_per_s, second=other.tokens_per_s, unit="tokens/s"),
        Row(
            what="loads/micro-batch",
            first=_each(first.prediction.loads_per_pass, first),
            second=_each(second.prediction.loads_per_pass, second),
            unit="",
        ),
        Row(
            what="loaded/micro-batch",
            first=_each(first.prediction.loaded_bytes_per_pass, first),
            second=_each(second.prediction.loaded_bytes_per_pass, second),
            unit="bytes",
        ),
    ]
    here, there = {b.name: b for b in one.blocks}, {b.name: b for b in other.blocks}
    common = [(here[name], there[name]) for name in here if name in there]
    moved = [*_moved(common, home_of), *_moved(common, lambda block: block.activations)]
    notes = []
    if first.fingerprint != second.fingerprint and first.model == second.model:
        notes.append(f"The two are of different models, though both are called {first.model}.")
    if lone := here.keys() ^ there.keys():
        notes.append(f"{len(lone)} blocks are in one of the two only: they are cut otherwise, or of another model.")
    return Compared(
        settings=tuple(_settings(first, second)),
        rows=tuple(row for row in rows if row.is_some),
        moved=tuple(moved),
        notes=tuple(notes),
    )


def _each(count: int, plan: Plan) -> float:
    """Return what of a pass's count comes to each micro-batch of its group."""
    return count if plan.group == 1 else count / plan.group


def compare_records(first: RunRecord, second: RunRecord) -> Compared:
    """Return what the second run did otherwise. Raises InputError where the two are of different models."""
    if first.fingerprint != second.fingerprint:
        raise InputError(
            f"the records are of different models (fingerprints {first.fingerprint[:12]} and "
            f"{second.fingerprint[:12]}): give two runs of one"
        )
    passes = (max(first.passes, 1), max(second.passes, 1))
    rows = (
        Row(what="micro-batches", first=first.passes, second=second.passes, unit=""),
        Row(what="micro-batch", first=first.pass_s, second=second.pass_s, unit="s"),
        Row(what="waiting", first=first.stall_s, second=second.stall_s, unit="s"),
        Row(what="vram peak", first=first.vram_peak_bytes, second=second.vram_peak_bytes, unit="bytes"),
        Row(what="vram reserved", first=first.vram_reserved_bytes, second=second.vram_reserved_bytes, unit="bytes"),
        Row(what="ram peak", first=first.ram_peak_bytes, second=second.ram_peak_bytes, unit="bytes"),
        Row(what="loads/micro-batch", first=first.loads / passes[0], second=second.loads / passes[1], unit=""),
        Row(
            what="loaded/micro-batch",
            first=first.loaded_bytes / passes[0],
            second=second.loaded_bytes / passes[1],
            unit="bytes",
        ),
        Row(what="misses", first=first.misses, second=second.misses, unit=""),
        Row(what="out of order", first=first.out_of_order, second=second.out_of_order, unit=""),
        Row(what="direct reads", first=first.direct_reads, second=second.direct_reads, unit=""),
        Row(what="recoveries", first=first.recoveries, second=second.recoveries, unit=""),
    )
    settings = [("device", first.device, second.device)] if first.device != second.device else []
    return Compared(
        settings=tuple(settings),
        rows=tuple(row for row in rows if row.is_some),
        moved=(),
        notes=(),
    )


def _both(tier: str, first: dict[str, int], second: dict[str, int]) -> Iterator[Row]:
    for kind in dict.fromkeys((*first, *second)):
        yield Row(what=f"  {tier} {kind}", first=first.get(kind, 0), second=second.get(kind, 0), unit="bytes")


def _moved(common: list[tuple[BlockFact, BlockFact]], how: Callable[[BlockFact], str]) -> Iterator[Moved]:
    groups: dict[tuple[str, str], list[BlockFact]] = {}
    for one, other in common:
        if how(one) != how(other):
            groups.setdefault((how(one), how(other)), []).append(other)
    for (before, after), blocks in sorted(groups.items()):
        yield Moved(
            first=before,
            second=after,
            blocks=tuple(block.name for block in blocks),
            size_bytes=sum(block.size_bytes for block in blocks),
        )


def _settings(first: Plan, second: Plan) -> Iterator[tuple[str, str, str]]:
    def budget(size_bytes: int | None, none: str) -> str:
        return none if size_bytes is None else format_bytes(size_bytes)

    for what, of in _SETTINGS.items():
        one, other = of(first), of(second)
        if one != other:
            yield what, one, other
    for tier, none in _NO_BUDGET.items():
        limits = getattr(first.budgets, tier), getattr(second.budgets, tier)
        if limits[0] != limits[1]:
            what = tier.removesuffix("_bytes").replace("_", " ")
            yield f"{what} budget", budget(limits[0], none), budget(limits[1], none)


_NO_BUDGET = {
    "vram_bytes": "none",
    "ram_bytes": "none",
    "disk_bytes": "the checkpoint's files",
    "page_lock_bytes": "all of ram",
}
"""Budgets, and what each is called where there is none."""

_SETTINGS: dict[str, Callable[[Plan], str]] = {
    "model": lambda plan: plan.model,
    "hardware": lambda plan: f"{plan.hardware} ({plan.table.device})",
    "adapter": lambda plan: plan.workload.adapter or "the model's own",
    "optimizer": lambda plan: plan.workload.optimizer,
    "optimizer's state": lambda plan: plan.optimizer_state,
    "batch": lambda plan: ", ".join(f"{k} {'x'.join(map(str, v))}" for k, v in plan.workload.batch.items()),
    "micro-batches per step": lambda plan: str(plan.workload.accumulation),
    "micro-batches that share a load": lambda plan: str(plan.group),
}


# ---- as text --------------------------------------------------------------------------------------------------------


def write_compared_files(compared: Compared, names: tuple[str, str]) -> None:
    """Print the comparison to standard output: in colour to a terminal, as plain ASCII to anything else."""
    print_or_write(lambda glyphs: _render(compared, names, glyphs))


def _render(compared: Compared, names: tuple[str, str], glyphs: Glyphs) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(glyphs.safe(name)), justify="right", overflow="fold")
    table.add_column("change", justify="right", no_wrap=True)
    for what, one, other in compared.settings:
        table.add_row(what, Text(glyphs.safe(one)), Text(glyphs.safe(other)))
    for row in compared.rows:
        table.add_row(
            Text(glyphs.safe(row.what)),
            _value(row.first, row.unit, glyphs),
            _value(row.second, row.unit, glyphs),
            _change(row, glyphs),
        )
    parts: list[RenderableType] = [table]
    if compared.moved:
        parts += [Text(""), Text("Changed blocks", style="bold")]
        for moved in compared.moved:
            count = "1 block" if len(moved.blocks) == 1 else f"{len(moved.blocks):,} blocks"
            what = f"{moved.first} -> {moved.second}: {count}, {format_bytes(moved.size_bytes)}, of "
            parts.append(Padding(Text(what + glyphs.safe("; ".join(_owners(moved.blocks)))), (0, 0, 0, 2)))
    parts += [Text(glyphs.safe(note)) for note in compared.notes]
    return Group(*parts)


def _value(value: float | None, unit: str, glyphs: Glyphs) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return format_bytes(round(value))
    if unit == "s":
        return glyphs.seconds(value)
    return rate(value) if unit else number(value)


def _change(row: Row, glyphs: Glyphs) -> str:
    if row.first is None or row.second is None or row.first == row.second:
        return ""
    if row.unit == "bytes":
        more = round(row.second - row.first)
        return ("+" if more > 0 else "") + format_bytes(more)
    if row.share is None:
        return "new"
    return "same" if abs(row.share) < _SAME else f"{row.share:+.1%}"


def _owners(names: tuple[str, ...]) -> Iterator[str]:
    """Yield the layers that blocks are, or are parts of: ``model.layers.0, 4-7``; what has no number by its name."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        parts = name.split(".")
        at = max((index for index, part in enumerate(parts) if part.isdigit()), default=None)
        owner, number = (name, []) if at is None else (".".join(parts[:at]), [int(parts[at])])
        found = numbers.setdefault(owner, [])
        found += [one for one in number if one not in found]
    for owner, of in numbers.items():
        yield ".".join([owner, ", ".join(_ranges(sorted(of)))]) if of else owner


def _ranges(numbers: list[int]) -> Iterator[str]:
    begin = 0
    for turn in range(1, len(numbers) + 1):
        if turn == len(numbers) or numbers[turn] != numbers[turn - 1] + 1:
            first, last = numbers[begin], numbers[turn - 1]
            yield str(first) if first == last else f"{first}-{last}"
            begin = turn
