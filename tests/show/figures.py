"""What a report has to say, by arithmetic of its own on a plan and a record. Only sizes and times are written by
``units``.

Nothing here comes from ``memplan.show``: a figure that the two disagree in is a fault of one of them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator

from memplan.program.memory_timeline import Moment, timeline
from memplan.program.record import RunRecord
from memplan.program.results import Point
from memplan.program.schema import RING_BYTES, Plan
from memplan.program.timeline import timeline_of
from memplan.units import format_bytes, format_seconds

Rows = dict[str, tuple[str, ...]]
TIERS = ("device", "host", "disk")
LANES = {"h2d": "RAM to device", "d2h": "device to RAM", "disk": "disk to device"}
MEANING = {
    "device": "stay on the device",
    "host": "streamed from ram",
    "of it pageable": "not pinned: slower",
    "disk": "streamed from disk",
    "recomputed": "activations recomputed in backward",
    "offloaded": "activations wait in ram for the backward",
    "recompute": "their activations are recomputed in backward",
    "offload": "their activations wait in ram for the backward",
    "total": "",
}


def percent(value: float, sign: str = "") -> str:
    """Return a share in percent: a digit behind the point, more where it would be 0."""
    if abs(value) < 1e-9:
        return "0%"
    digits = 1
    while abs(value) < 5e-4 and 100 * abs(value) < 10.0**-digits:
        digits += 1
    return f"{100 * value:{sign}.{digits}f}%"


def count(value: float) -> str:
    """Return a count, or a mean of counts."""
    return f"{int(value):,}" if value == int(value) else f"{value:,.1f}" if value >= 0.05 else f"{value:.1g}"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def some(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


class Figures:
    """All figures of one plan, and of a run under it. ``page``: as a page writes them, else as plain text does."""

    def __init__(self, plan: Plan, record: RunRecord | None = None, *, page: bool = False) -> None:
        self.plan, self.record, self.page = plan, record, page
        self.none = "–" if page else "-"
        self.said = plan.prediction
        self.rows = plan.table.accesses
        self.blocks = plan.table.blocks
        self.policies = {policy.module: policy.activations for policy in plan.activations}
        self.homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
        self.moments: tuple[Moment, ...] = timeline(plan)
        self.line = timeline_of(plan)
        again = [row.recompute_s for row in self.rows if self.policies.get(row.module) == "recompute"]
        self.recompute_s = sum(again)
        self.held_s = self.said.compute_s - self.recompute_s
        self.loads = [0] * len(self.blocks)
        for stay in plan.residences:
            if stay.begins == "load" and plan.items[stay.item].kind == "weights":
                self.loads[plan.items[stay.item].block] += 1

    # ---- how it is written

    def size(self, size_bytes: int | None) -> str:
        return self.none if size_bytes is None else format_bytes(size_bytes)

    def more(self, size_bytes: int) -> str:
        return ("+" if size_bytes > 0 else "") + format_bytes(size_bytes)

    def time(self, time_s: float) -> str:
        text = format_seconds(time_s)
        return text if self.page else text.replace("µ", "u")

    # ---- bytes

    @property
    def tops(self) -> tuple[int, int, int]:
        peaks = self.said.peaks
        return peaks.vram_bytes, peaks.ram_bytes, peaks.disk_bytes

    @property
    def limits(self) -> tuple[int | None, ...]:
        budgets = self.plan.budgets
        return budgets.vram_bytes, budgets.ram_bytes, budgets.disk_bytes

    def parts(self) -> Rows:
        """By kind: bytes of vram, ram, disk."""
        on_disk = sum(block.size_bytes for block in self.blocks if self.homes[block.id] == "disk")
        found: Rows = {}
        for kind in dict.fromkeys((*self.said.vram_parts, *self.said.ram_parts)):
            row = (
                self.said.vram_parts.get(kind, 0),
                self.said.ram_parts.get(kind, 0),
                on_disk if kind == "weights" else 0,
            )
            if any(row):
                found["streaming buffer" if kind == "slots" else kind] = tuple(self.size(part or None) for part in row)
        return found

    def locks(self) -> list[tuple[str, int]]:
        """Of RAM beside a card: what is pinned, and what is not."""
        if self.plan.table.device == "cpu" or not self.tops[1]:
            return []
        return [("of it pinned", self.locked_bytes), ("of it pageable", self.tops[1] - self.locked_bytes)]

    @property
    def locked_bytes(self) -> int:
        limit, card = self.plan.budgets.page_lock_bytes, self.plan.table.device != "cpu"
        arenas = [arena for arena in self.plan.arenas if arena.tier == "host"]
        rings = RING_BYTES * ((self.tops[2] > 0) + any(arena.pageable for arena in arenas))
        locked = sum(arena.size_bytes for arena in arenas if not arena.pageable)
        locked += rings if limit is None or limit >= rings else 0
        state = self.said.ram_parts.get("optimizer", 0)
        return card * (locked + state * (limit is None or state + 2 * RING_BYTES <= limit))

    @property
    def slow(self) -> list[int]:
        """Blocks at home in RAM that is pageable."""
        arenas = {arena.id for arena in self.plan.arenas if arena.pageable}
        held = {self.plan.items[place.item] for place in self.plan.addresses if place.arena in arenas}
        return sorted(item.block for item in held if item.kind == "weights" and item.home == "host")

    def locks_said(self) -> str:
        if not any(arena.pageable for arena in self.plan.arenas):
            return ""
        sizes = [self.blocks[block].size_bytes for block in self.slow]
        limit = format_bytes(self.plan.budgets.page_lock_bytes or 0)
        return (
            f"No more than {limit} of ram may be pinned: {some(len(sizes), 'block', 'blocks')} "
            f"({format_bytes(sum(sizes))}) come from pageable ram, which is slower."
        )

    def home(self, block: int) -> str:
        return self.homes[block] + ", pageable" * (block in self.slow)

    @property
    def copies_bytes(self) -> int:
        """Of the activations at the peak, copies of weights: of layers that keep, from their forward to their
        backward.
        """
        alive, peak = 0, self.said.vram_peak_at
        for row in self.rows:
            ends = [other.index for other in self.rows if other.kind == "backward" and other.forward == row.index]
            keeps = self.policies.get(row.module, "keep") == "keep"
            if keeps and row.index <= peak <= (ends[-1] if ends else row.index):
                alive += row.weight_copy_bytes
        return min(alive, self.said.vram_parts.get("activations", 0))

    def free(self) -> tuple[str, ...]:
        pairs = zip(self.limits, self.tops, strict=True)
        return tuple(self.none if limit is None else format_bytes(limit - top) for limit, top in pairs)

    @property
    def vram_seen(self) -> int:
        """What torch counted and the context, which it does not count; 0 where nobody measured."""
        assert self.record is not None
        peak = self.record.vram_peak_bytes
        return peak + self.said.vram_parts.get("context", 0) if peak else 0

    @property
    def vram_reserved(self) -> int:
        assert self.record is not None
        return self.record.vram_reserved_bytes + self.said.vram_parts.get("context", 0)

    def unaccounted(self) -> tuple[str, str]:
        assert self.record is not None
        seen = (self.vram_seen, self.record.ram_peak_bytes)
        vram, ram = (self.more(got - said) if got else self.none for got, said in zip(seen, self.tops[:2], strict=True))
        return vram, ram

    # ---- times

    @property
    def tokens_per_s(self) -> float:
        return self.plan.workload.tokens * self.plan.workload.accumulation / self.said.step_s

    @property
    def tokens_per_s_seen(self) -> float:
        assert self.record is not None
        return self.plan.workload.tokens / self.record.pass_s

    def compared(self, predicted: float, measured: float, form: object) -> tuple[str, str, str]:
        """A row of what was predicted, what was measured, and the error of the prediction."""
        assert callable(form)
        return form(predicted), form(measured), percent(predicted / measured - 1, "+")

    def bound(self) -> str:
        gap, least = self.said.pass_s / self.said.bound_s - 1, self.time(self.said.bound_s)
        if gap < 1e-9:
            return f"At the lower bound ({least}): no plan of these blocks is faster."
        return f"At most {self.gap()} above the lower bound of these blocks ({least})."

    def gap(self) -> str:
        """How far a pass is above the bound, rounded up."""
        gap = self.said.pass_s / self.said.bound_s - 1
        return "0%" if gap < 1e-9 else f"{max(1, math.ceil(1000 * gap - 1e-6)) / 10:.1f}%"

    def speed(self) -> str:
        """A step, and how it is beside the nearest thing that people do without memplan."""
        kept, layers = (self.without(set()), set(self.plan.table.recomputable))
        checkpointed = self.without(layers)
        is_kept = not layers or kept[0] <= self.plan.budgets.vram_bytes
        than, (_, least_s) = ("everything kept", kept) if is_kept else ("checkpointing only", checkpointed)
        ratio = self.said.step_s / least_s
        said = f"{percent(ratio - 1)} slower than" if ratio > 1 else f"{percent(1 - ratio)} faster than"
        said = "as fast as" if abs(ratio - 1) < 5e-4 else said
        if ratio >= 2:
            said = f"{ratio:.1f} times as long as" if ratio < 10 else f"{ratio:.0f} times as long as"
        return f"{self.time(self.said.step_s)} per step, {self.binds()}: {said} {than}."

    def binds(self) -> str:
        link = "copy-bound" if self.plan.table.device == "cpu" else "PCIe-bound"
        return {"compute": "compute-bound", "link": link, "disk": "disk-bound"}[self.said.binds]

    def without(self, recomputed: set[str]) -> tuple[int, float]:
        """Bytes and seconds of a step with all weights on the device and these layers recomputed."""
        table = self.plan.table
        policies = dict.fromkeys(recomputed, "recompute")
        state = table.state_on_host_bytes
        peak = max(
            table.device_bytes_at(row.index, policies) + (0 if row.kind == "optimizer" else state) for row in self.rows
        )
        pass_s = sum(
            row.time_s + (row.recompute_s if row.module in recomputed else 0.0)
            for row in self.rows
            if row.kind != "optimizer"
        )
        rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s)
        optimizer_s = sum(row.time_s for row in self.rows if row.kind == "optimizer") - sum(state / r for r in rates)
        weights = sum(-(-block.size_bytes // 512) * 512 for block in self.blocks)
        return weights + peak, self.plan.workload.accumulation * pass_s + max(0.0, optimizer_s)

    def why(self) -> str:
        shares = [(self.recompute_s / self.held_s, "recompute"), (self.said.stall_s / self.held_s, "waiting")]
        named = [f"{percent(share)} {what}" for share, what in shares if share >= 5e-4]
        return f"Slower than everything kept by {' and '.join(named)}." if named else ""

    def gains(self) -> list[str]:
        found = []
        for gain in sorted(self.plan.gains, key=lambda gain: gain.pass_s):
            more = format_bytes(gain.more)
            what = {
                "vram": f"{more} more vram",
                "ram": f"{more} more ram",
                "link": f"a PCIe link that is {more}/s faster",
                "loss": f"the loss in chunks of {gain.more:,} tokens",
            }[gain.of]
            saved = self.said.pass_s - gain.pass_s
            found.append(
                f"With {what} a micro-batch would be {self.time(saved)} ({percent(saved / self.said.pass_s)}) shorter."
            )
        return found

    def whole_run(self) -> str:
        """The time of the whole run; empty where its steps are not known."""
        work = self.plan.workload
        if work.steps is None:
            return ""
        steps = some(work.steps, "step", "steps")
        if work.examples and work.epochs:
            steps = f"{some(work.epochs, 'epoch', 'epochs')} of {some(work.examples, 'example', 'examples')} ({steps})"
        return f"About {self.time(work.steps * self.said.step_s)} for {steps}."

    # ---- sentences

    def subject(self) -> str:
        work, by = self.plan.workload, " × " if self.page else " x "
        shapes = {name: by.join(map(str, shape)) for name, shape in work.batch.items() if shape}
        alike = len(set(shapes.values())) == 1
        batch = next(iter(shapes.values())) if alike else ", ".join(f"{k} {v}" for k, v in shapes.items())
        where = f"{self.plan.hardware} ({self.plan.table.device})"
        return f"micro-batch {batch} ({work.tokens:,} tokens), {work.accumulation} per step, on {where}"

    def fits(self) -> str:
        (vram, ram, _), (vram_limit, ram_limit, _) = self.tops, self.limits
        text = f"{self.size(vram)} of {self.size(vram_limit)} vram"
        return f"Fits: {text}, {self.size(ram)} of {self.size(ram_limit)} ram." if ram else f"Fits: {text}."

    def over(self) -> str:
        """By how much a run left the budget; empty where it did not."""
        if self.record is None or not self.record.vram_peak_bytes:
            return ""
        limit = self.plan.budgets.vram_bytes
        if self.vram_seen > limit:
            return f"The run went {self.size(self.vram_seen - limit)} over the vram budget."
        over = self.vram_reserved - limit - self.plan.budgets.margin_bytes
        said = f"The run kept the vram budget, but torch reserved {self.size(over)} beyond it (fragmentation): "
        return f"{said}leave a larger margin." if over > 0 else ""

    def peak(self) -> str:
        row = self.rows[self.said.vram_peak_at]
        named = {"loss": "the loss", "optimizer": "the optimizer step"}
        return f"VRAM peaks in {named.get(row.kind, f'the {row.kind} of {row.module}')}."

    def run(self) -> str:
        assert self.record is not None
        passes = some(self.record.passes, "micro-batch", "micro-batches")
        return f"{passes} in {self.time(self.record.wall_s)} on {self.record.device}"

    def counts(self) -> str:
        run = self.record
        assert run is not None
        found = [
            f"{run.loads:,} loads",
            some(run.misses, "miss", "misses"),
            f"{some(run.out_of_order, 'access', 'accesses')} out of order",
        ]
        if run.learned:
            found.append(f"the sequence learned again {some(run.learned, 'time', 'times')}")
        if run.offload_skipped:
            found.append(
                f"{some(run.offload_skipped, 'forward', 'forwards')} kept activations on the device instead of "
                f"offloading them"
            )
        if run.recoveries:
            found.append(f"ran out of memory and continued with a smaller plan {some(run.recoveries, 'time', 'times')}")
        if run.weight_copy_bytes:
            found.append(f"{self.size(run.weight_copy_bytes)} of copies of weights saved that are not in the plan")
        return ", ".join(found)

    def notes(self) -> tuple[str, ...]:
        found = self.plan.notes
        if self.plan.table.device == "cpu":
            found += ("The compute device is the CPU: vram is the memory that the step itself may use.",)
        return found

    # ---- blocks

    def policy(self, name: str) -> str:
        """What becomes of a block's activations: as its module says, or the nearest one around it."""
        parts = name.split(".")
        around = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        return next((self.policies[one] for one in around if one in self.policies), "keep")

    def layer(self, block: int) -> str:
        """The layer that a block is part of: up to the number behind its stack's name; else its own name."""
        name, stack = self.blocks[block].name, self.blocks[block].stack
        inside = re.match(rf"{re.escape(stack)}\.[^.]+", name) if stack else None
        return inside[0] if inside else name

    def layers(self) -> dict[str, list[int]]:
        """Blocks by layer, in the order of the blocks."""
        found: dict[str, list[int]] = {}
        for block in self.blocks:
            found.setdefault(self.layer(block.id), []).append(block.id)
        return found

    def bytes_of(self, blocks: Iterable[int], tier: str) -> int:
        return sum(self.blocks[block].size_bytes for block in blocks if self.homes[block] == tier)

    def legend(self) -> Iterator[tuple[str, str, str | None]]:
        """Yield what marks mean: a tier or policy, its blocks, their bytes."""
        for tier in TIERS:
            here = [block.id for block in self.blocks if self.homes[block.id] == tier]
            if here:
                yield tier, f"{len(here):,}", self.size(self.bytes_of(here, tier))
            if tier == "host" and self.slow and self.page:
                yield "of it pageable", f"{len(self.slow):,}", self.size(self.bytes_of(self.slow, tier))
        if self.page:
            yield "total", f"{len(self.blocks):,}", self.size(sum(block.size_bytes for block in self.blocks))
        for policy, name in (("recompute", "recomputed"), ("offload", "offloaded")):
            number = sum(self.policy(block.name) == policy for block in self.blocks)
            if number:
                yield policy if self.page else name, f"{number:,}", None

    def runs(self) -> list[tuple[str, ...]]:
        """Neighbouring layers of a stack that are alike, as a row each."""
        rows = []
        for _, group in itertools.groupby(self.layers().items(), self._look):
            names, members = zip(*group, strict=True)
            every = [block for blocks in members for block in blocks]
            stack = self.blocks[every[0]].stack
            name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1].removeprefix(stack + '.')}"
            sizes = [self.bytes_of(every, tier) for tier in TIERS if tier in self.homes.values()]
            loads = sum(self.loads[block] for block in every)
            policy = self.policy(self.blocks[every[0]].name) if stack else self.none
            cells = (f"{len(names):,}", *(self.size(size or None) for size in sizes), policy, f"{loads:,}")
            rows.append((name, *cells))
        return rows

    def _look(self, layer: tuple[str, list[int]]) -> tuple[object, ...]:
        name, blocks = layer
        stack = self.blocks[blocks[0]].stack
        return (
            stack or name,
            *(self.bytes_of(blocks, tier) for tier in TIERS),
            self.policy(self.blocks[blocks[0]].name),
            sum(self.loads[block] for block in blocks),
            len(blocks),
        )

    # ---- waits

    def stalled(self) -> list[tuple[str, ...]]:
        """What a run waited for, the longest first: the five worst and the sum of the others."""
        assert self.record is not None
        found = sorted(
            (row for row in self.record.blocks if row.stall_s > 0), key=lambda row: (-row.stall_s, row.block)
        )
        total = sum(row.stall_s for row in found)
        rows: list[tuple[str, ...]] = [
            (
                self.blocks[row.block].name,
                self.homes[row.block],
                self.time(row.stall_s),
                percent(row.stall_s / total),
                f"{row.loads:,}",
                f"{row.misses:,}",
            )
            for row in found[:5]
        ]
        if found[5:]:
            rest = sum(row.stall_s for row in found[5:])
            rows.append((f"{len(found) - 5} others", self.time(rest), percent(rest / total)))
        return rows

    def waits(self) -> list[tuple[int, float, int | None, str]]:
        """Accesses that wait: for how long, for which block (None: no weights), over what."""
        names = LANES
        stays = {stay.id: stay for stay in self.plan.residences}
        found = []
        for index, stall_s in enumerate(self.line.stall_s):
            if stall_s < 1e-9:
                continue
            needed = [load for load in self.line.loads if stays[load.residence].first_use == index]
            if not needed:
                found.append((index, stall_s, None, self.none))
                continue
            last = max(needed, key=lambda load: (load.end_s, stays[load.residence].item))
            item = self.plan.items[stays[last.residence].item]
            found.append((index, stall_s, item.block if item.kind == "weights" else None, names[last.channel]))
        return found


def point_cells(point: Point, fastest_s: float, figures: Figures) -> tuple[str, ...]:
    """A point of a frontier on a page, but for its budget."""
    slower = percent(point.step_s / fastest_s - 1, "+") if point.step_s > fastest_s else figures.none
    return (
        figures.time(point.step_s),
        slower,
        f"{point.recomputed:,}",
        f"{point.offloaded:,}",
        figures.size(point.loaded_bytes_per_pass or None),
        point.binds,
    )
