"""The report: every number is the plan's or the record's, in any width, whatever the names are."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from memplan.errors import DoesNotFitError, PlanMismatchError
from memplan.program.page_lock import page_locked_bytes, pageable_items
from memplan.program.schema import Plan
from memplan.show import sentences, summary, terminal
from memplan.show.csv import write_csv
from memplan.show.rows import VRAM_LABELS
from memplan.units import GIB, MIB, format_bytes
from tests.show.plans import (
    BACKWARD_S,
    EMBEDDING_BYTES,
    FORWARD_S,
    LAYER_BYTES,
    LOSS_S,
    RECOMPUTE_S,
    make_plan,
    make_record,
    pageable_plan,
    solve_plan,
)

SMALL = "d" + "hhd" * 4 + "d"
LONG = "d" + "khhhd" * 24 + "hhhd" + "d"


@pytest.fixture(autouse=True)
def _no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def cells(report: str, label: str, after: str = "") -> list[str]:
    """Return the cells of the first line that starts with ``label``, from the line on that starts with ``after``."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(after))
    line = next(line.strip() for line in lines[start:] if line.strip().startswith(label + " "))
    return [cell.strip() for cell in line[len(label) :].split("  ") if cell.strip()]


@pytest.mark.each_value
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("homes", [SMALL, LONG])
def test_plain_text_is_ascii_and_keeps_its_width(homes: str, measured: bool, width: int) -> None:
    plan = make_plan(homes, stall_s=0.02, recomputed=" ^^^", notes=("fp32 adapters, 40 µs, " * 9,), device="cpu")
    record = make_record(plan, pass_s=1.2, extra_bytes=5 * MIB) if measured else None
    report = terminal.text(plan, record, width)
    assert report.isascii()
    assert report.endswith("\n")
    assert max(map(len, report.splitlines())) <= width
    assert all(line == line.rstrip() for line in report.splitlines())
    assert terminal.text(plan, record, width) == report


def test_width_is_80_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(LONG)
    assert terminal.text(plan) == terminal.text(plan, width=80)
    monkeypatch.setenv("COLUMNS", "120")
    assert terminal.text(plan) == terminal.text(plan, width=120)
    monkeypatch.setenv("COLUMNS", "wide")
    assert terminal.text(plan) == terminal.text(plan, width=80)


def test_verdict_is_derived_from_the_plan() -> None:
    plan = make_plan(SMALL, stall_s=0.03, recomputed=" ^^^^")
    count = len(SMALL)
    kept_s = count * (FORWARD_S + BACKWARD_S) + LOSS_S
    peaks, budgets = plan.prediction.peaks, plan.budgets
    report = terminal.text(plan)
    assert f"Fits: {format_bytes(peaks.vram_bytes)} of {format_bytes(budgets.vram_bytes)} vram" in report
    assert f"{format_bytes(peaks.ram_bytes)} of 24.00 GiB ram." in report
    assert f"by {4 * RECOMPUTE_S / kept_s:.1%} recompute and {0.03 / kept_s:.1%} waiting." in report
    # All weights on the device do not fit these budgets: beside gradient checkpointing, as people train then.
    step_s = plan.prediction.step_s
    checkpointed_s = plan.workload.accumulation * (kept_s + (count - 2) * RECOMPUTE_S)
    assert f", PCIe-bound: {1 - step_s / checkpointed_s:.1%} faster than checkpointing only." in report
    fits = make_plan("dddd")
    fits = msgspec.structs.replace(fits, budgets=msgspec.structs.replace(fits.budgets, vram_bytes=12 * GIB))
    assert summary.facts(fits).baseline == "everything kept"
    known = summary.facts(plan)
    for ratio, words in ((1.0002, "as fast as"), (1.19, "19.0% slower than"), (2.51, "2.5 times as long as"), (
        10.168, "10 times as long as")):  # fmt: skip
        said = sentences.speed(dataclasses.replace(known, step_ratio=ratio))
        assert said == f"{words} checkpointing only"


def test_memory_shows_each_part_the_budget_and_what_is_free() -> None:
    plan = make_plan(SMALL.replace("hhd", "hkd", 1))
    report = terminal.text(plan)
    held = plan.prediction.vram_parts["weights"]
    assert cells(report, "weights") == [format_bytes(size) for size in (held, 7 * LAYER_BYTES, LAYER_BYTES)]
    for kind, size in plan.prediction.vram_parts.items():
        if size:
            assert cells(report, VRAM_LABELS.get(kind, kind), "Memory")[0] == format_bytes(size)
    assert "buffers" not in report
    assert cells(report, "staging") == ["-", "64.0 MiB", "-"]
    assert cells(report, "free", "Memory") == ["200.0 MiB", format_bytes(24 * GIB - 7 * LAYER_BYTES - 64 * MIB), "-"]


def test_few_bytes_are_never_nothing() -> None:
    plan = make_plan(SMALL)
    assert cells(terminal.text(plan), "batch", "Memory")[0] == "16.0 KiB"
    assert " 0.0" not in terminal.text(plan).replace(" 0.0%", "")


def test_time_shows_rates_loads_and_the_bound() -> None:
    plan = make_plan(SMALL, stall_s=0.03, bound_s=(len(SMALL) * (FORWARD_S + BACKWARD_S) + LOSS_S + 0.03) / 1.00301)
    report = terminal.text(plan)
    prediction = plan.prediction
    assert cells(report, "micro-batch", "Time") == [f"{prediction.pass_s * 1e3:.1f} ms"]
    assert cells(report, "tokens/s") == [f"{2 * 2048 / prediction.step_s:,.0f}"]
    assert cells(report, "loads/micro-batch") == [str(2 * 8 - 4)]
    assert cells(report, "loaded/micro-batch") == [format_bytes(12 * LAYER_BYTES)]
    # 0.301% is not within 0.3%.
    assert "At most 0.4% above the lower bound of these blocks" in report
    assert "At the lower bound" in terminal.text(make_plan(SMALL))


def test_what_is_read_at_home_or_learned_is_said() -> None:
    plan = make_plan(SMALL)
    prediction = msgspec.structs.replace(plan.prediction, rows_bytes_per_pass=3 * MIB)
    record = msgspec.structs.replace(make_record(plan, pass_s=1.0), learned=2)
    text = terminal.text(msgspec.structs.replace(plan, prediction=prediction), record)
    assert "embedding rows" in text
    assert "3.0 MiB" in text
    assert "the sequence learned again 2 times" in text.replace("\n", " ")
    assert "embedding rows" not in terminal.text(plan, make_record(plan, pass_s=1.0))
    assert "learned" not in terminal.text(plan, make_record(plan, pass_s=1.0))


def test_strip_has_one_mark_a_block_and_wraps() -> None:
    plan = make_plan(LONG, recomputed=" " + "^" * 20)
    lines = terminal.text(plan).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("Blocks  126 frozen")))
    drawn = lines[start + 1 : lines.index("", start)]
    marks = "".join(line.split(maxsplit=1)[1].replace(" ", "") for line in drawn if line.split()[0].isdigit())
    assert marks == LONG.replace("d", "#").replace("h", "o").replace("k", ".")
    assert "".join(drawn).count("^") == 20
    assert [line.split()[0] for line in drawn if line.split()[0].isdigit()] == ["0", "60", "120"]
    for place in range(1, 21):
        column = drawn[0].index("#") + place + place // 10
        assert drawn[1][column] == "^"
    report = terminal.text(plan)
    assert cells(report, "#  device")[0] == f"{LONG.count('d')} blocks"
    assert cells(report, ".  disk")[:2] == ["24 blocks", format_bytes(24 * LAYER_BYTES)]
    assert "1-124  model.layers.0 ... model.layers.123" in report


def test_many_unlike_blocks_are_cut_in_the_middle() -> None:
    report = terminal.text(make_plan("d" * 40, stack=""))
    assert "... 34 more" in report
    assert "39  lm_head" in report


def test_run_stands_beside_the_prediction() -> None:
    plan = make_plan(SMALL, stall_s=0.01)
    record = make_record(plan, pass_s=plan.prediction.pass_s * 1.25, extra_bytes=77 * MIB)
    report = terminal.text(plan, record)
    peak = plan.prediction.peaks.vram_bytes
    assert cells(report, "measured", "Memory")[0] == format_bytes(peak + 77 * MIB)
    assert cells(report, "unaccounted") == ["+77.0 MiB", "0 B", "-"]
    assert cells(report, "micro-batch", "Time")[2] == "-20.0%"
    assert cells(report, "waiting", "Time")[1] == "30.0 ms"
    assert cells(report, "loads/micro-batch")[1] == f"{(40 * 12 + 8) / 40:.1f}"
    assert "3 misses, 1 access out of order; 48.0 ms of waiting." in report
    stalled = report[report.index("most waited for") :].splitlines()[1:]
    assert [line.split()[0] for line in stalled[:5]] == [f"model.layers.{i}" for i in (10, 9, 7, 6, 4)]
    assert stalled[5].split()[:2] == ["3", "others"]


def test_run_over_the_budget_is_said() -> None:
    plan = make_plan(SMALL)
    report = terminal.text(plan, make_record(plan, pass_s=1.0, extra_bytes=210 * MIB))
    assert "The run went 10.0 MiB over the vram budget." in report


def test_run_in_which_nothing_was_measured() -> None:
    plan = make_plan(SMALL)
    record = make_record(plan, pass_s=0.0, passes=0, vram_peak_bytes=0, ram_peak_bytes=0, blocks=(), device="cpu")
    report = terminal.text(plan, record)
    assert cells(report, "measured", "Memory") == ["-", "-", "-"]
    assert cells(report, "micro-batch", "Time")[1:] == ["-"]
    assert "no block was waited for" in report
    assert "The run was on cpu, the plan is for cuda" in report
    measured = terminal.as_dict(plan, record)["measured"]
    assert isinstance(measured, dict)
    assert measured["pass_s"] is measured["loads_per_pass"] is measured["peaks"]["vram_bytes"] is None
    assert measured["errors"] == {}


def test_names_are_harmless() -> None:
    names = {1: "[red]<script>", 2: "[/]\x1b[31mé", 3: "x" * 300}
    plan = make_plan("dhhhhhhd", rename=names, notes=("[bold]note[/bold]",), stack="")
    record = make_record(plan, pass_s=1.0)
    report = terminal.text(plan, record)
    assert "[red]<script>" in report
    assert "[/]\\x1b[31m\\xe9" in report
    assert "[bold]note[/bold]" in report
    assert max(map(len, report.splitlines())) <= 80
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system=None, width=100).print(terminal.render(plan, record))
    assert "[red]<script>" in out.getvalue()
    assert "\x1b[31mé" not in out.getvalue()


def test_terminal_gets_marks_and_others_get_text(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(SMALL)
    out = io.StringIO()
    terminal.write(plan, file=out)
    assert out.getvalue() == terminal.text(plan)
    monkeypatch.setenv("TERM", "xterm-256color")
    tty = io.StringIO()
    tty.isatty = lambda: True  # type: ignore[method-assign]
    terminal.write(plan, file=tty)
    assert "█" in tty.getvalue()
    assert "\x1b[" in tty.getvalue()


def test_as_dict_is_recomputed_from_the_plan() -> None:
    plan = make_plan("dhkhhd", recomputed=" ^", stall_s=0.05)
    compute_s = 6 * (FORWARD_S + BACKWARD_S) + LOSS_S + RECOMPUTE_S
    result = terminal.as_dict(plan)
    assert result["fits"] is True
    assert result["pass_s"] == pytest.approx(compute_s + 0.05)
    assert result["step_s"] == pytest.approx(2 * (compute_s + 0.05) + 0.004)
    assert result["slowdown"] == pytest.approx((RECOMPUTE_S + 0.05) / (compute_s - RECOMPUTE_S))
    assert result["bound_gap"] == 0
    assert result["tokens_per_s"] == pytest.approx(4096 / plan.prediction.step_s)
    assert result["peaks"] == {
        "vram_bytes": sum(plan.prediction.vram_parts.values()),
        "ram_bytes": 3 * LAYER_BYTES + 64 * MIB,
        "disk_bytes": LAYER_BYTES,
    }
    homes = ["device", "host", "disk", "host", "host", "device"]
    sizes = [EMBEDDING_BYTES, *[LAYER_BYTES] * 4, EMBEDDING_BYTES]
    policies = ["keep", "recompute", "keep", "keep", "keep", "keep"]
    assert result["blocks"] == [
        {"name": block.name, "home": home, "pageable": False, "bytes": size, "activations": policy}
        for block, home, size, policy in zip(plan.table.blocks, homes, sizes, policies, strict=True)
    ]
    assert result["loads_per_pass"] == plan.prediction.loads_per_pass
    assert "measured" not in result
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_what_of_ram_is_page_locked() -> None:
    plan = pageable_plan()
    locked, ram = page_locked_bytes(plan), plan.prediction.peaks.ram_bytes
    said = terminal.text(plan, width=100)
    assert re.search(rf"of it pinned +{re.escape(format_bytes(locked))}\n", said)
    assert re.search(rf"of it pageable +{re.escape(format_bytes(ram - locked))}\n", said)
    assert "No more than 150.0 MiB of ram may be pinned: " in said
    result = terminal.as_dict(plan)
    assert (result["page_locked_bytes"], result["pageable_bytes"]) == (locked, ram - locked)
    assert result["budgets"]["page_lock_bytes"] == 150 * MIB
    slow = {block["name"] for block in result["blocks"] if block["pageable"]}
    assert slow == {plan.table.blocks[plan.items[item].block].name for item in pageable_items(plan)}
    assert "pinned" not in terminal.text(make_plan("dhhd", device="cpu"))


def test_the_sheet_says_it_too(tmp_path: Path) -> None:
    plan = pageable_plan()
    write_csv(plan, tmp_path / "blocks.csv")
    with open(tmp_path / "blocks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    slow = {plan.items[item].block for item in pageable_items(plan)}
    assert {int(row["block"]) for row in rows if row["pageable"] == "1"} == slow
    assert all(row["home"] == "host" for row in rows if row["pageable"] == "1")


def test_the_time_of_a_whole_run() -> None:
    plan = make_plan("dhhd")
    assert terminal.as_dict(plan)["run_s"] is None
    assert "epoch" not in terminal.text(plan)

    def of(step_s: float, **fields: int) -> Plan:
        return msgspec.structs.replace(
            plan,
            workload=msgspec.structs.replace(plan.workload, **fields),
            prediction=msgspec.structs.replace(plan.prediction, step_s=step_s),
        )

    long = of(3.05, steps=3750, examples=10_000, epochs=3)
    assert "About 3 h 10 min for 3 epochs of 10,000 examples (3,750 steps)." in terminal.text(long)
    result = terminal.as_dict(long)
    assert [result[key] for key in ("steps", "examples", "epochs")] == [3750, 10_000, 3]
    assert result["run_s"] == pytest.approx(3750 * 3.05)
    assert "About 2.00 s for 1 step." in terminal.text(of(2.0, steps=1))
    assert "About 4.00 s for 1 epoch of 1 example (2 steps)." in terminal.text(of(2.0, steps=2, examples=1, epochs=1))


def test_as_dict_has_the_memory_of_every_access() -> None:
    plan = solve_plan()
    rows = terminal.as_dict(plan)["memory"]
    assert [(row["index"], row["kind"], row["module"]) for row in rows] == [
        (access.index, access.kind, access.module) for access in plan.table.accesses
    ]
    assert max(row["vram_bytes"] for row in rows) == plan.prediction.peaks.vram_bytes
    for row in rows:
        assert row["vram_bytes"] == sum(row["vram_parts"].values())
        assert row["ram_bytes"] == sum(row["ram_parts"].values()) == plan.prediction.peaks.ram_bytes
        assert 0 not in row["vram_parts"].values()
    assert json.loads(json.dumps(rows)) == rows


def test_copies_of_weights_are_part_of_the_activations_at_the_peak() -> None:
    """Of layers whose activations are kept, and only from their forward to their backward."""
    plan = make_plan("dhhhd", recomputed="  ^")
    assert terminal.as_dict(plan)["weight_copy_bytes"] == 0
    rows = [
        msgspec.structs.replace(row, weight_copy_bytes=10 * MIB if row.kind == "forward" and 0 < row.index < 4 else 0)
        for row in plan.table.accesses
    ]
    plan = msgspec.structs.replace(plan, table=msgspec.structs.replace(plan.table, accesses=tuple(rows)))

    def at(index: int) -> object:
        prediction = msgspec.structs.replace(plan.prediction, vram_peak_at=index)
        return terminal.as_dict(msgspec.structs.replace(plan, prediction=prediction))["weight_copy_bytes"]

    # 5 forwards, the loss, 5 backwards from the last module to the first, the optimizer; the second layer recomputes.
    assert [at(index) for index in range(12)] == [MIB * ten for ten in (0, 10, 10, 20, 20, 20, 20, 20, 10, 10, 0, 0)]
    assert cells(terminal.text(plan), "of it copies", "Memory")[-1] == "20.0 MiB"


def test_copies_of_weights_that_the_plan_has_not_are_shown() -> None:
    plan = make_plan(SMALL)
    assert "copies" not in terminal.text(plan, make_record(plan, pass_s=0.5))
    record = make_record(plan, pass_s=0.5, weight_copy_bytes=43 * MIB)
    assert "43.0 MiB of copies of weights saved that are not in the plan" in " ".join(
        terminal.text(plan, record).split()
    )
    measured = terminal.as_dict(plan, record)["measured"]
    assert isinstance(measured, dict)
    assert measured["weight_copy_bytes"] == 43 * MIB


def test_as_dict_with_a_record() -> None:
    plan = make_plan(SMALL, stall_s=0.02)
    record = make_record(plan, pass_s=0.5, extra_bytes=GIB)
    result = terminal.as_dict(plan, record)["measured"]
    assert isinstance(result, dict)
    peak = plan.prediction.peaks.vram_bytes
    assert result["unaccounted"] == {"vram_bytes": GIB, "ram_bytes": 0}
    assert result["errors"]["pass_s"] == pytest.approx(plan.prediction.pass_s / 0.5 - 1)
    assert result["errors"]["vram_bytes"] == pytest.approx(peak / (peak + GIB) - 1)
    assert result["tokens_per_s"] == 2048 / 0.5
    assert [row["name"] for row in result["blocks"]] == [f"model.layers.{i}" for i in (0, 1, 3, 4, 6, 7, 9, 10)]
    assert all(math.isfinite(error) for error in result["errors"].values())


def test_part_of_a_recomputed_layer_is_recomputed() -> None:
    plan = make_plan("dhhd", recomputed=" ^", rename={2: "model.layers.0.mlp"})
    blocks = terminal.as_dict(plan)["blocks"]
    assert isinstance(blocks, list)
    # Its own policy goes first; without one, its layer's.
    assert blocks[2]["activations"] == "keep"
    plan = msgspec.structs.replace(plan, activations=plan.activations[:1])
    blocks = terminal.as_dict(plan)["blocks"]
    assert isinstance(blocks, list)
    assert blocks[2]["activations"] == "recompute"


def test_record_of_another_plan_is_refused() -> None:
    plan = make_plan(SMALL)
    for record in (
        make_record(plan, pass_s=1.0, fingerprint="cd" * 32),
        make_record(make_plan(SMALL[:-1] + "hh"), pass_s=1.0),
    ):
        for show in (terminal.render, terminal.text, terminal.as_dict):
            with pytest.raises(PlanMismatchError, match="record of a run under this plan"):
                show(plan, record)


def test_failure() -> None:
    error = DoesNotFitError(
        "2.00 GiB of vram were given, the loss of [red]lm_head alone needs more",
        least_vram_bytes=3 * GIB,
        limited_by="the loss",
        suggestions=("--batch 2", "--seq 256"),
    )
    assert terminal.failure_dict(error) == {
        "fits": False,
        "message": str(error),
        "least_vram_bytes": 3 * GIB,
        "least_ram_bytes": None,
        "least_disk_bytes": None,
        "limited_by": "the loss",
        "suggestions": ["--batch 2", "--seq 256"],
    }
    report = terminal.failure_text(error)
    assert "[red]lm_head" in report
    assert cells(report, "Least vram") == ["3.00 GiB"]
    assert cells(report, "Try") == ["--batch 2"]
