"""Every number of every table, drawing and sentence, on a terminal and on a page, is read back and computed again.

Tables are compared whole: one that is not computed again fails, and so does a row too many.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import msgspec
import pytest

from memplan.program.memory_timeline import DEVICE_KINDS, HOST_KINDS
from memplan.program.record import RunRecord
from memplan.program.results import Fit, point_of
from memplan.program.schema import Gain, Plan
from memplan.show import query_tables as answers
from memplan.show import terminal
from memplan.show.compare import compare_plans, compare_records, write_compared_files
from memplan.show.html import render
from memplan.units import GIB, KIB, MIB, format_bytes
from tests.show.figures import LANES, MEANING, TIERS, Figures, count, percent, point_cells, rate, some
from tests.show.pages import Element, read, tables
from tests.show.plans import disk_plan, make_plan, make_record, pageable_plan, parts_plan, solve_plan


def rich_plan() -> Plan:
    """Return a plan of which everything that a report may say is there to be said."""
    plan = disk_plan()
    first = next(row.index for row in plan.table.accesses if plan.policies().get(row.module) == "keep")
    rows = tuple(
        msgspec.structs.replace(row, weight_copy_bytes=MIB if row.index == first else 0) for row in plan.table.accesses
    )
    pass_s = plan.prediction.pass_s
    return msgspec.structs.replace(
        plan,
        table=msgspec.structs.replace(plan.table, accesses=rows),
        workload=msgspec.structs.replace(
            plan.workload,
            batch={"input_ids": (2, 32), "pixels": (2, 3, 8)},
            accumulation=4,
            steps=3000,
            examples=24_000,
            epochs=1,
        ),
        prediction=msgspec.structs.replace(plan.prediction, rows_bytes_per_pass=3 * KIB),
        gains=(
            Gain(of="vram", more=GIB, pass_s=0.7 * pass_s),
            Gain(of="ram", more=GIB, pass_s=0.9 * pass_s),
            Gain(of="link", more=GIB, pass_s=(1 - 2e-4) * pass_s),
            Gain(of="loss", more=1024, pass_s=0.6 * pass_s),
        ),
        notes=("a note",),
    )


PLANS = {
    "solved": solve_plan,
    "disk": disk_plan,
    "pageable": pageable_plan,
    "by hand": lambda: make_plan("dhhhkkd", recomputed=" ^^", stall_s=0.02, bound_s=0.2),
    "parts": parts_plan,
    "all of it": rich_plan,
}


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


def record_of(plan: Plan) -> RunRecord:
    return make_record(
        plan,
        pass_s=1.1 * plan.prediction.pass_s,
        extra_bytes=5 * MIB,
        learned=2,
        offload_skipped=1,
        recoveries=3,
        weight_copy_bytes=MIB,
    )


# ---- as text --------------------------------------------------------------------------------------------------------


def sections(text: str) -> list[list[str]]:
    """Return what stands between empty lines, as lines."""
    return [block.splitlines() for block in text.strip("\n").split("\n\n")]


def cells(line: str) -> tuple[str, ...]:
    return tuple(re.split(r"\s{2,}", line.strip()))


def split(section: list[str]) -> tuple[list[tuple[str, ...]], str]:
    """Return the rows of a table and the sentences under it."""
    rows = list(itertools.takewhile(lambda line: len(cells(line)) > 1, section))
    return [cells(line) for line in rows], " ".join(" ".join(section[len(rows) :]).split())


@pytest.mark.each_value
@pytest.mark.parametrize("measured", [False, True], ids=["planned", "run"])
def test_the_text(plan: Plan, measured: bool) -> None:
    record = record_of(plan) if measured else None
    want, said = Figures(plan, record), plan.prediction
    found = sections(terminal.text(plan, record, 110))
    heading, verdict, memory, time, strip, legend, ranges, *rest = found

    assert " ".join(heading[1:]) == want.subject()
    lines = [want.fits(), want.speed(), want.whole_run(), want.over()]
    assert " ".join(verdict) == " ".join(line for line in lines if line)

    # Memory.
    rows, under = split(memory)
    assert under == " ".join(line for line in (want.peak(), want.locks_said()) if line)
    dashes = ("-" * 10,) * 3
    expected: list[tuple[str, ...]] = [("Memory", "vram", "ram", "disk")]
    parts = want.parts()
    inside = [row for row in rows[1 : rows.index(dashes)] if row[0] != "of it copies"]
    assert {row[0]: row[1:] for row in inside} == parts
    copies = [row for row in rows if row[0] == "of it copies"]
    assert copies == ([("of it copies", format_bytes(want.copies_bytes))] if want.copies_bytes else [])
    expected += [
        dashes,
        ("peak", *(want.size(top or None) for top in want.tops)),
        *((name, want.size(part)) for name, part in want.locks()),
        ("free", *want.free()),
        ("budget", *map(want.size, want.limits)),
    ]
    if record is not None:
        seen = (want.size(want.vram_seen), want.size(record.ram_peak_bytes or None))
        expected += [dashes, ("measured", *seen, want.none)]
        expected += [("reserved by torch", want.size(want.vram_reserved), want.none, want.none)]
        expected += [("unaccounted", *want.unaccounted(), want.none)]
    assert [row for row in rows if row not in inside and row not in copies] == expected

    # Time.
    rows, under = split(time)
    remarks = [want.bound(), want.why(), *want.gains(), "Error: predicted against measured." if measured else ""]
    assert under == " ".join(remark for remark in remarks if remark)
    assert rows == text_times(want, record)

    # Blocks.
    assert strip[0] == f"Blocks  {len(want.blocks)} frozen, {format_bytes(sum(b.size_bytes for b in want.blocks))}"
    marks = {"device": "#", "host": "o", "disk": "."}
    under_marks = {"keep": " ", "recompute": "^", "offload": ">"}
    drawn = [line for line in strip[1:] if re.match(r" +\d", line)]
    assert [int(line.split()[0]) for line in drawn] == [
        sum(len(re.sub(r"[^#o.]", "", line.split(maxsplit=1)[1])) for line in drawn[:before])
        for before in range(len(drawn))
    ]
    assert "".join("".join(line.split()[1:]) for line in drawn) == "".join(
        marks[want.homes[block.id]] for block in want.blocks
    )
    assert "".join(strip[1:]).count("^") + "".join(strip[1:]).count(">") == sum(
        under_marks[want.policy(block.name)] != " " for block in want.blocks
    )
    signs = marks | {"recomputed": "^", "offloaded": ">"}
    assert [cells(line) for line in legend] == [
        (
            signs[name],
            name,
            "1 block" if number == "1" else f"{number} blocks",
            *filter(None, [size_text]),
            MEANING[name],
        )
        for name, number, size_text in want.legend()
    ]
    assert [cells(line) for line in ranges] == ranges_of(want)

    # The run, and notes.
    if record is not None:
        head, *stalled = rest[0], *rest[1:2]
        assert head[0] == f"Run  {want.run()}"
        waited = sum(row.stall_s for row in record.blocks)
        assert " ".join(" ".join(head[1:]).split()) == f"{want.counts()}; {want.time(waited)} of waiting."
        (table,) = stalled
        assert cells(table[0]) == ("most waited for", "home", "waited", "share", "loads", "misses")
        assert [cells(line) for line in table[1:]] == want.stalled()
        rest = rest[2:]
    notes = want.notes()
    assert [" ".join(" ".join(section).split()) for section in rest] == (
        ["Notes " + " ".join(f"- {note}" for note in notes)] if notes else []
    )
    assert said.stall_s == pytest.approx(said.pass_s - said.compute_s, abs=1e-12)


def text_times(want: Figures, record: RunRecord | None) -> list[tuple[str, ...]]:
    said = want.said
    rows: list[tuple[str, ...]] = [("Time", "predicted", *(("measured", "error") if record else ()))]
    rows.append(("compute", want.time(said.compute_s)))
    if want.recompute_s:
        rows.append(("of it recompute", want.time(want.recompute_s)))
    rows.append(("waiting", want.time(said.stall_s), *((want.time(record.stall_s),) if record else ())))
    if record is None:
        rows.append(("micro-batch", want.time(said.pass_s)))
        rows.append(("lower bound", want.time(said.bound_s)))
        rows.append(("step", want.time(said.step_s)))
        rows.append(("tokens/s", rate(want.tokens_per_s)))
        rows.append(("loads/micro-batch", count(said.loads_per_pass)))
        rows.append(("loaded/micro-batch", format_bytes(said.loaded_bytes_per_pass)))
    else:
        loaded, loads = record.loaded_bytes / record.passes, record.loads / record.passes
        rows.append(("micro-batch", *want.compared(said.pass_s, record.pass_s, want.time)))
        rows.append(("lower bound", want.time(said.bound_s)))
        rows.append(("step", want.time(said.step_s)))
        rows.append(("tokens/s", *want.compared(want.tokens_per_s, want.tokens_per_s_seen, rate)))
        rows.append(("loads/micro-batch", *want.compared(said.loads_per_pass, loads, count)))
        rows.append(("loaded/micro-batch", *want.compared(said.loaded_bytes_per_pass, loaded, whole)))
    for name, size_bytes in (
        ("offloaded", said.offloaded_bytes_per_pass),
        ("embedding rows", said.rows_bytes_per_pass),
    ):
        if size_bytes:
            rows.append((name, format_bytes(size_bytes)))
    return rows


def whole(size_bytes: float) -> str:
    return format_bytes(round(size_bytes))


def ranges_of(want: Figures) -> list[tuple[str, ...]]:
    """Which numbers are which blocks: a stack's neighbours in a line, at most six lines."""
    runs: list[list[int]] = []
    for block in want.blocks:
        if runs and block.stack and want.blocks[runs[-1][0]].stack == block.stack:
            runs[-1].append(block.id)
        else:
            runs.append([block.id])
    rows = []
    for run in runs:
        first, last = want.blocks[run[0]].name, want.blocks[run[-1]].name
        rows.append((str(run[0]), first) if len(run) == 1 else (f"{run[0]}-{run[-1]}", f"{first} ... {last}"))
    return rows if len(rows) <= 6 else [*rows[:5], (f"... {len(rows) - 6} more",), rows[-1]]


@pytest.mark.each_value
@pytest.mark.parametrize("measured", [False, True], ids=["planned", "run"])
def test_the_wide_text_has_the_same_figures(plan: Plan, measured: bool) -> None:
    record = record_of(plan) if measured else None
    narrow, wide = (terminal.text(plan, record, width) for width in (110, 160))
    assert sorted(wide.split()) == sorted(narrow.split()) or figures(wide) == figures(narrow)


def figures(text: str) -> list[str]:
    """Return all words with a digit, but for the numbers at which lines of the strip begin."""
    lines = [line for line in text.splitlines() if not re.match(r" +\d+  [#o.]", line)]
    return sorted(word for word in " ".join(lines).split() if any(letter.isdigit() for letter in word))


# ---- a page ---------------------------------------------------------------------------------------------------------


@pytest.mark.each_value
@pytest.mark.parametrize("measured", [False, True], ids=["planned", "run"])
def test_the_tables_of_a_page(plan: Plan, measured: bool) -> None:
    record = record_of(plan) if measured else None
    want = Figures(plan, record, page=True)
    near = msgspec.structs.replace(point_of(plan), vram_bytes=1 << 30, step_s=1e-3, recomputed=3, offloaded=2)
    points = (point_of(plan), near)
    found = tables(read(render.text(plan, record, points)))

    # Memory.
    head, *rows = found.pop("budget")
    assert head == ("kind", "vram", "ram", "disk")
    expected = dict(want.parts())
    if want.copies_bytes:
        expected["of it copies"] = (want.size(want.copies_bytes), want.none, want.none)
    expected["peak"] = tuple(want.size(top or None) for top in want.tops)
    for name, part in want.locks():
        expected[name] = (want.none, want.size(part), want.none)
    expected["free"] = want.free()
    expected["budget"] = tuple(map(want.size, want.limits))
    if record is not None:
        expected["measured"] = (want.size(want.vram_seen), want.size(record.ram_peak_bytes), want.none)
        expected["reserved by torch"] = (want.size(want.vram_reserved), want.none, want.none)
        expected["unaccounted"] = (*want.unaccounted(), want.none)
    assert {row[0]: row[1:] for row in rows} == expected
    assert len(rows) == len(expected)

    assert found.pop("time") == page_times(want, record)

    # Memory along the micro-batch.
    for tier in ("vram", "ram", "disk"):
        memory_along(want, tier, found)

    # The pass in time.
    waits = {index: (block, over) for index, _, block, over in want.waits()}
    head, *rows = found.pop("accesses")
    assert head == ("access", "phase", "module", "begins", "computes", "waited", "for")
    assert rows == [
        (
            str(row.index),
            row.kind,
            row.module or want.none,
            want.time(want.line.access_start_s[row.index]),
            want.time(want.line.access_end_s[row.index] - want.line.access_start_s[row.index]),
            want.time(want.line.stall_s[row.index]) if row.index in waits else want.none,
            waited_for(want, *waits[row.index]) if row.index in waits else want.none,
        )
        for row in want.rows
    ]
    assert found.pop("waits", []) == page_waits(want, record)

    # Blocks.
    assert found.pop("homes")[1:] == [
        (name, number, size_text or want.none, MEANING[name]) for name, number, size_text in want.legend()
    ]
    assert found.pop("layers")[1:] == want.runs()
    rows = []
    for name, blocks in want.layers().items():
        if len(blocks) > 1:
            rows.append((name, ""))
        for block in blocks:
            whole_name = want.blocks[block].name
            rows.append(
                (
                    whole_name.removeprefix(name + ".") if len(blocks) > 1 else whole_name,
                    want.size(want.blocks[block].size_bytes),
                    want.home(block),
                    want.policy(whole_name),
                    f"{want.loads[block]:,}",
                )
            )
    assert found.pop("blocks")[1:] == rows

    # The frontier, and the figures that the plan keeps.
    fastest = min(point.step_s for point in points)
    assert found.pop("frontier")[1:] == [
        (want.size(point.vram_bytes) + mine, *point_cells(point, fastest, want))
        for point, mine in (*((p, "") for p in sorted(points, key=lambda p: p.vram_bytes)), (points[0], " (this plan)"))
    ]
    table = plan.table
    rates = {
        "host to device": table.host_to_device_bytes_per_s,
        "device to host": table.device_to_host_bytes_per_s,
        "disk": table.disk_bytes_per_s,
    }
    if table.pageable_bytes_per_s is not None:
        rates["pageable ram"] = table.pageable_bytes_per_s
    assert found.pop("figures")[1:] == [
        *((name, f"{format_bytes(int(value))}/s", "the plan") for name, value in rates.items()),
        ("load latency", want.time(table.load_latency_s), "the plan"),
    ]
    assert not found


def page_times(want: Figures, record: RunRecord | None) -> list[tuple[str, ...]]:
    said, none = want.said, want.none
    rows: list[tuple[str, ...]] = [("what", "predicted", *(("measured", "error") if record else ()))]

    def row(name: str, cell: str, *beside: str) -> None:
        rows.append((name, cell, *((*beside, none, none)[:2] if record else ())))

    row("compute", want.time(said.compute_s))
    if want.recompute_s:
        row("of it recompute", want.time(want.recompute_s))
    row("waiting", want.time(said.stall_s), *([want.time(record.stall_s)] if record else []))
    seen = [said.pass_s, want.tokens_per_s, said.loads_per_pass, said.loaded_bytes_per_pass, *want.tops[:2]]
    if record:
        per_pass = [record.loads / record.passes, record.loaded_bytes / record.passes]
        peaks = [want.vram_seen, record.ram_peak_bytes]
        seen = [record.pass_s, want.tokens_per_s_seen, *per_pass, *peaks]

    def beside(name: str, predicted: float, measured: float, form: object) -> None:
        cells = want.compared(predicted, measured, form) if measured else (form(predicted), none, none)  # type: ignore[operator]
        row(name, *cells)

    beside("micro-batch", said.pass_s, seen[0], want.time)
    row("lower bound", want.time(said.bound_s))
    row("step", want.time(said.step_s))
    beside("tokens/s", want.tokens_per_s, seen[1], rate)
    beside("loads/micro-batch", said.loads_per_pass, seen[2], count)
    beside("loaded/micro-batch", said.loaded_bytes_per_pass, seen[3], whole)
    if said.offloaded_bytes_per_pass:
        row("offloaded", format_bytes(said.offloaded_bytes_per_pass))
    if said.rows_bytes_per_pass:
        row("embedding rows", format_bytes(said.rows_bytes_per_pass))
    if record:
        beside("vram peak", want.tops[0], seen[4], whole)
        beside("ram peak", want.tops[1], seen[5], whole)
    return rows


CHART_NAMES = {
    "activations": "other activations",
    "workspace": "other workspace",
    "idle": "unused",
    "offloaded": "offloaded activations",
    "boundaries": "layer inputs",
    "kept": "kept activations",
    "recomputed": "recomputed activations",
    "passing": "passing gradients",
}


def named(held: Mapping[str, int]) -> dict[str, int]:
    """Bytes by the words of a chart, which are not those that the table of all bytes has for larger sums."""
    return {CHART_NAMES.get(kind, kind): size for kind, size in held.items()}


@pytest.mark.parametrize("name", ["disk", "pageable", "parts"])
def test_a_word_stands_for_one_number_of_a_tier(name: str) -> None:
    """In the table of all bytes and in the charts' legends, which are on one page."""
    found = tables(read(render.text(PLANS[name]())))
    whole = {row[0]: row[1:] for row in found["budget"][1:]}
    for place, tier in enumerate(("vram", "ram")):
        for kind, size, _ in found.get(f"legend-{tier}", [("", "", "")])[1:]:
            assert size == "0 B" or whole.get(kind, (size, size, size))[place] == size, (tier, kind)


def memory_along(want: Figures, tier: str, found: dict[str, list[tuple[str, ...]]]) -> None:
    held = [
        named({"vram": moment.vram, "ram": moment.ram, "disk": {"weights": moment.disk_bytes}}[tier])
        for moment in want.moments
    ]
    sums = [sum(row.values()) for row in held]
    at = sums.index(max(sums))
    kinds = {kind for row in held for kind, size_bytes in row.items() if size_bytes}
    if len(kinds) > 1:
        legend = found.pop(f"legend-{tier}")[1:]
        assert legend[-1][:2] == ("total", want.size(max(sums)))
        assert {row[0]: row[1] for row in legend[:-1]} == {kind: want.size(held[at][kind]) for kind in kinds}
        assert kinds <= set(named(dict.fromkeys((*DEVICE_KINDS, *HOST_KINDS), 0)))
        assert not re.search(r"\d", " ".join(row[2] for row in legend))
    if any(row != held[0] for row in held):
        head, *body = found.pop(f"bytes-{tier}")
        assert set(head[4:]) == kinds
        for moment, row, inside, total in zip(want.moments, body, held, sums, strict=True):
            assert row[:4] == (str(moment.index), moment.kind, moment.module or want.none, want.size(total))
            assert row[4:] == tuple(want.size(inside[kind] or None) for kind in head[4:])


def waited_for(want: Figures, block: int | None, over: str) -> str:
    return over if block is None else f"{want.blocks[block].name} ({over})"


def page_waits(want: Figures, record: RunRecord | None) -> list[tuple[str, ...]]:
    """By layer: what is waited for as predicted, its share of all waiting, and what a run waited for it a pass."""
    said: dict[str, float] = {}
    seen: dict[str, tuple[float, int, int]] = {}
    over: dict[str, set[str]] = {}
    for _, stall_s, block, channel in want.waits():
        name = want.none if block is None else want.layer(block)
        said[name] = said.get(name, 0.0) + stall_s
        over.setdefault(name, set()).add(channel)
    for row in record.blocks if record else ():
        if row.stall_s or row.misses:
            name = want.layer(row.block)
            before = seen.get(name, (0.0, 0, 0))
            seen[name] = (before[0] + row.stall_s, before[1] + row.loads, before[2] + row.misses)
            over.setdefault(name, set()).add(LANES["disk" if want.homes[row.block] == "disk" else "h2d"])
    if not over:
        return []
    head = ("layer", "load", "predicted", "share", *(("measured", "loads of the run", "misses") if record else ()))
    rows = []
    for name in sorted(over, key=lambda name: (-seen.get(name, (0.0,))[0], -said.get(name, 0.0), name)):
        predicted = (
            (want.time(said[name]), percent(said[name] / sum(said.values()))) if name in said else (want.none,) * 2
        )
        measured: tuple[str, ...] = ()
        if record:
            stall_s, loads, misses = seen.get(name, (0.0, 0, 0))
            measured = (want.time(stall_s / record.passes), f"{loads:,}", f"{misses:,}")
        rows.append((name, ", ".join(sorted(over[name])), *predicted, *measured))
    return [head, *rows]


def test_the_words_of_a_page(plan: Plan) -> None:
    record = record_of(plan)
    want = Figures(plan, record, page=True)
    page = read(render.text(plan, record))
    (main,) = page.all("main")

    def texts(tag: str, name: str) -> list[str]:
        return [one.text() for one in main.all(tag) if one.attributes.get("class") == name]

    work = plan.workload
    how = ", ".join(part for part in (work.adapter, work.optimizer) if part)
    assert texts("p", "subject") == [f"{how} {want.subject()}"]
    assert texts("p", "verdict") == [f"Fits. {want.speed()}"]
    assert texts("p", "alarm") == [over for over in [want.over()] if over]
    plain = [p.text() for p in main.all("p") if not p.attributes.get("class")]
    run = f"{want.run()}: {want.counts()}."
    assert plain == [
        *filter(None, [want.whole_run()]),
        *([] if want.waits() or record.blocks else ["No block is waited for."]),
        run,
    ]
    line = want.line
    remarks = [want.peak(), want.locks_said(), want.bound(), want.why(), *want.gains()]
    waits = f"{want.time(line.pass_s)} long, of it {want.time(line.total_stall_s)} of waiting."
    found = texts("p", "remark")
    assert [one for one in found if re.search(r"\d", one) and "steady state" not in one] == [
        remark for remark in remarks if re.search(r"\d", remark)
    ]
    assert sum(waits in one for one in found) == 1

    # The key figures.
    keys = [one for one in main.all("dl") if one.attributes.get("class") == "key"]
    said = [tuple(part.text() for part in div.all("dt", "dd")) for div in keys[0].all("div")]
    (vram, ram, disk), limits = want.tops, want.limits
    expected = [("vram", want.size(vram), f"of {want.size(limits[0])}")]
    if ram:
        expected.append(("ram", want.size(ram), f"of {want.size(limits[1])}"))
    if disk:
        own = "of the checkpoint's own files" if limits[2] is None else f"of {want.size(limits[2])}"
        expected.append(("disk", want.size(disk), own))
    expected.append(("step", want.time(want.said.step_s), want.binds()))
    error = percent(want.said.pass_s / record.pass_s - 1, "+")
    expected.append(("micro-batch, measured", want.time(record.pass_s), f"prediction {error}"))
    expected.append(("above the lower bound", want.gap(), f"of {want.time(want.said.bound_s)} per micro-batch"))
    assert said == expected
    assert [one.text() for one in main.all("li")][-len(want.notes()) or len(main.all("li")) :] == list(want.notes())


def test_the_titles_of_drawings(plan: Plan) -> None:
    """What a screen reader says, and what a pointer finds."""
    want = Figures(plan, page=True)
    near = msgspec.structs.replace(point_of(plan), vram_bytes=1 << 30, step_s=1e-3)
    page = read(render.text(plan, None, (point_of(plan), near)))
    left = [title.text() for svg in page.all("svg") for title in svg.all("title", "desc")]
    left += [caption.text() for caption in page.all("figcaption")]
    expected: list[str] = []
    number = len(want.rows)
    tiers = {
        "vram": ("VRAM", want.limits[0]),
        "ram": ("RAM", want.limits[1]),
        "disk": ("Disk", want.limits[2]),
    }
    for tier, (title, limit) in tiers.items():
        held = [
            named({"vram": moment.vram, "ram": moment.ram, "disk": {"weights": moment.disk_bytes}}[tier])
            for moment in want.moments
        ]
        sums = [sum(row.values()) for row in held]
        peak = max(sums)
        if not peak:
            continue
        at, level = sums.index(peak), all(row == held[0] for row in held)
        expected.append(f"{title} along the micro-batch")
        expected.append(f"Bytes by kind at each of the {number} accesses of a micro-batch; at most {want.size(peak)}.")
        for kind in {kind for row in held for kind, size_bytes in row.items() if size_bytes}:
            most = max(row[kind] for row in held)
            beyond = f", at most {want.size(most)}" if most != held[at][kind] else ""
            expected.append(f"{kind}: {want.size(held[at][kind])} at the peak{beyond}")
        drawn = limit is not None and peak <= limit <= 1.25 * peak
        if drawn:
            expected.append(f"budget: {want.size(limit)}")
        along = (
            f", the same along the whole micro-batch: {want.size(peak)}"
            if level
            else (f" along the micro-batch: {want.size(peak)} at the peak")
        )
        budget = (
            "" if limit is None else f", {'the red line is' if drawn else 'below'} the budget of {want.size(limit)}"
        )
        expected.append(f"{title} {along.lstrip() if along.startswith(' ') else along}{budget}.")

    line = want.line
    end = max(line.pass_s, *line.access_end_s)
    busy = sum(row.time_s for row in want.rows if row.kind != "optimizer") + want.recompute_s
    forward, backward = (
        sum(
            line.access_end_s[row.index] - line.access_start_s[row.index]
            for row in want.rows
            if (row.kind == "backward") == back
        )
        for back in (False, True)
    )
    expected.append(f"compute: {want.time(busy)}, {percent(busy / end)} of the micro-batch")
    expected += [f"forward and loss: {want.time(forward)}", f"backward: {want.time(backward)}"]
    if line.total_stall_s > 0:
        expected.append(f"waiting: {want.time(line.total_stall_s)}")
    for channel, name in LANES.items():
        spans = [load.end_s - load.start_s for load in line.loads if load.channel == channel]
        if spans:
            expected.append(f"{name}: {want.time(sum(spans))}, {percent(sum(spans) / end)} of the micro-batch")
            expected.append(f"{len(spans):,} loads: {want.time(sum(spans))}")

    for name, blocks in want.layers().items():
        sizes = [(want.bytes_of(blocks, tier), tier) for tier in TIERS]
        said = ", ".join(f"{want.size(size_bytes)} {tier}" for size_bytes, tier in sizes if size_bytes)
        first = want.blocks[blocks[0]]
        policy = want.policy(first.name) if first.stack else "keep"
        loads = sum(want.loads[block] for block in blocks)
        loaded = f", {some(loads, 'load', 'loads')} per micro-batch" if loads else ""
        expected.append(f"{name}: {said}" + (f", {policy}" if policy != "keep" else "") + loaded)

    points = [(point_of(plan), ""), (point_of(plan), "this plan: "), (near, "")]
    for point, mine in points:
        expected.append(f"{mine}{want.size(point.vram_bytes)} of vram: a step of {want.time(point.step_s)}")
    expected.append("Device memory against the time of a step")
    sizes = sorted(point.vram_bytes for point, _ in points)
    edge = (sizes[-1] - sizes[0]) // 50
    top = want.time(1.12 * max(point.step_s for point, _ in points))
    expected.append(
        f"From {want.size(max(0, sizes[0] - edge))} to {want.size(sizes[-1] + edge)}; the ground is a step of no "
        f"time, the top {top}."
    )
    expected.append("Upwards the time of a step, from left to right the budget of vram. The large mark is this plan.")
    assert sorted(map(spaced, left)) == sorted(map(spaced, expected))
    lanes = [one for one in page.all("div") if one.attributes.get("class") == "lane"]
    assert {f"{lane.all('b')[0].text()}: {lane.all('span')[1].text()}" for lane in lanes} <= set(expected)


def spaced(text: str) -> str:
    """Return a text as it is read, wherever its elements end."""
    return re.sub(r"\s+([,.:;])", r"\1", " ".join(text.split()))


# ---- answers, and comparisons ---------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[tuple[str, ...]]]:
    return [[cells(line) for line in section] for section in sections(capsys.readouterr().out)]


def test_a_frontier_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    want = Figures(disk_plan())
    slow = point_of(want.plan)
    points = [slow, msgspec.structs.replace(slow, vram_bytes=3 * GIB, step_s=slow.step_s * (1 - 1e-4), recomputed=0)]
    answers.write_frontier("a title", points)
    title, rows = printed(capsys)
    assert title == [("a title",)]
    assert rows == [
        ("vram", "step", "slower", "recomputed", "loaded", "binds"),
        *(
            (
                format_bytes(point.vram_bytes),
                want.time(point.step_s),
                percent(point.step_s / points[1].step_s - 1, "+") if point is slow else "-",
                str(point.recomputed or "-"),
                format_bytes(point.loaded_bytes_per_pass),
                point.binds,
                "#" * 10,
            )
            for point in points
        ),
    ]


def test_the_most_that_fits_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    want = Figures(solve_plan())
    point = point_of(want.plan)
    most = {"batch": (1234, point), "sequence": (8192, point), "rank": None}
    fit = Fit(
        asked=point,
        least=None,
        least_at=point,
        whole=point,
        slowdown=0.005,
        most=most,  # type: ignore[arg-type]
        bounded=("sequence",),
        quantized={"nf4": point, "int8": None},
    )
    answers.write_fit("a title", fit)
    _, rows = printed(capsys)
    cell = (format_bytes(point.peak_bytes), want.time(point.step_s))
    assert rows == [
        ("vram", "step"),
        ("as asked", "fits", *cell),
        ("least vram", "none would do: give more RAM or", "-", "-"),
        ("disk",),
        ("least vram, 0.5% slower", *cell),
        ("all on the device", *cell),
        ("greatest batch", "1,234", *cell),
        ("greatest rank", "none fits", "-", "-"),
        ("greatest sequence", "8,192 (not for lack of memory)", *cell),
        ("as nf4", "fits", *cell),
        ("as int8", "does not fit", "-", "-"),
    ]


def test_other_ways_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    want = Figures(disk_plan())
    point = point_of(want.plan)
    slower = msgspec.structs.replace(point, step_s=point.step_s * 1.4, loaded_bytes_per_pass=7)
    answers.write_compared("a title", [("memplan", point), ("all streamed", slower), ("first resident", None)])
    _, rows = printed(capsys)
    memory = (format_bytes(point.peak_bytes), format_bytes(point.ram_bytes))
    assert rows == [
        ("placed by", "vram", "ram", "step", "slower", "loaded"),
        ("memplan", *memory, want.time(point.step_s), "-", format_bytes(point.loaded_bytes_per_pass)),
        ("all streamed", *memory, want.time(slower.step_s), "+40.0%", "7 B"),
        ("first resident", "does not fit", "-", "-", "-", "-"),
    ]


def test_two_plans_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_plan("dhhhhhhd"), make_plan("dhkddhhd", recomputed="  ^^    ", stall_s=0.01)
    write_compared_files(compare_plans(first, second), ("one", "two"))
    rows, changed = printed(capsys)
    one, two = Figures(first), Figures(second)
    expected: list[tuple[str, ...]] = [("one", "two", "change")]
    limits = zip(("vram", "ram", "disk"), one.limits, two.limits, strict=True)
    expected += [(f"{tier} budget", one.size(a), two.size(b)) for tier, a, b in limits if a != b]

    def sizes(name: str, a: int, b: int) -> None:
        if a or b:
            expected.append((name, one.size(a), one.size(b), *([one.more(b - a)] if a != b else [])))

    def others(name: str, a: float, b: float, form: object) -> None:
        assert callable(form)
        if a or b:
            change = "" if a == b else "new" if not a else "same" if abs(b / a - 1) < 5e-4 else percent(b / a - 1, "+")
            expected.append((name, form(a), form(b), *filter(None, [change])))

    for tier, number in (("vram", 0), ("ram", 1)):
        parts = [getattr(plan.prediction, f"{tier}_parts") for plan in (first, second)]
        for kind in parts[0]:
            sizes(f"{tier} {kind}", *(part[kind] for part in parts))
        if tier == "vram":
            sizes("vram peak", one.tops[number], two.tops[number])
    sizes("pinned ram", one.locked_bytes, two.locked_bytes)
    sizes("disk", one.tops[2], two.tops[2])
    others("compute", one.said.compute_s, two.said.compute_s, one.time)
    others("recompute", one.recompute_s, two.recompute_s, one.time)
    for name, key in (("waiting", "stall_s"), ("micro-batch", "pass_s"), ("step", "step_s")):
        others(name, getattr(one.said, key), getattr(two.said, key), one.time)
    others("lower bound", one.said.bound_s, two.said.bound_s, one.time)
    others("tokens/s", one.tokens_per_s, two.tokens_per_s, rate)
    others("loads/micro-batch", one.said.loads_per_pass, two.said.loads_per_pass, count)
    sizes("loaded/micro-batch", one.said.loaded_bytes_per_pass, two.said.loaded_bytes_per_pass)
    assert rows == expected
    size = first.table.blocks[1].size_bytes
    assert [line for (line,) in changed] == [
        "Changed blocks",
        f"host -> device: 2 blocks, {format_bytes(2 * size)}, of model.layers.2-3",
        f"host -> disk: 1 block, {format_bytes(size)}, of model.layers.1",
        f"keep -> recompute: 2 blocks, {format_bytes(2 * size)}, of model.layers.1-2",
    ]


def test_two_runs_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan("dhhhhhhd")
    first = make_record(plan, pass_s=0.2)
    second = make_record(plan, pass_s=0.3, passes=50, extra_bytes=MIB, misses=0, stall_s=1e-7)
    write_compared_files(compare_records(first, second), ("one", "two"))
    (rows,) = printed(capsys)
    want = Figures(plan)
    per_pass = [run.loads / run.passes for run in (first, second)]
    loaded = [run.loaded_bytes / run.passes for run in (first, second)]
    assert loaded[0] == loaded[1]
    assert rows == [
        ("one", "two", "change"),
        ("micro-batches", "40", "50", "+25.0%"),
        ("micro-batch", "200.0 ms", "300.0 ms", "+50.0%"),
        ("waiting", "30.0 ms", "100 ns", "-100.0%"),
        ("vram peak", want.size(first.vram_peak_bytes), want.size(second.vram_peak_bytes), "+1.0 MiB"),
        ("vram reserved", want.size(first.vram_reserved_bytes), want.size(second.vram_reserved_bytes), "+1.0 MiB"),
        ("ram peak", want.size(first.ram_peak_bytes), want.size(second.ram_peak_bytes)),
        ("loads/micro-batch", count(per_pass[0]), count(per_pass[1]), percent(per_pass[1] / per_pass[0] - 1, "+")),
        ("loaded/micro-batch", whole(loaded[0]), whole(loaded[1])),
        ("misses", "3", "0", "-100.0%"),
        ("out of order", "1", "1"),
    ]


def test_a_page_in_elements() -> None:
    """The reader that these tests trust finds what is there."""
    page = read("<main><p>a<b>b</b> c</p><table id=t><tr><th>x</th><td>1</td></tr></table></main>")
    assert isinstance(page, Element)
    assert page.all("p")[0].text() == "a b c"
    assert tables(page) == {"t": [("x", "1")]}
