"""Text at 80 and 120 columns, piped and on a terminal: no line is wider, nothing is cut, no bytes are written as
none.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable

import msgspec
import pytest

from memplan.place.baselines import WAYS
from memplan.program.results import Fit, Point
from memplan.program.schema import Gain, Plan
from memplan.show import query_tables as answers
from memplan.show import terminal
from memplan.show.compare import compare_plans, compare_records, write_compared_files
from memplan.units import GIB, MIB
from tests.show.plans import disk_plan, long_plan, make_plan, make_record, parts_plan, solve_plan

WIDEST = Point(
    vram_bytes=1023 * GIB + 999 * MIB,
    peak_bytes=1023 * GIB + 990 * MIB,
    ram_bytes=2048 * GIB,
    disk_bytes=0,
    pass_s=11 * 3600.0 + 59 * 60,
    step_s=23 * 3600.0 + 59 * 60,
    bound_s=1.0,
    compute_s=1.0,
    loaded_bytes_per_pass=2048 * GIB - 1,
    recomputed=1260,
    offloaded=0,
    binds="compute",
)
SMALLEST = msgspec.structs.replace(
    WIDEST, vram_bytes=1, peak_bytes=1, ram_bytes=1, step_s=8e3, loaded_bytes_per_pass=1, recomputed=0
)


def large_plan() -> Plan:
    """Return a plan whose figures are as wide as any: of a 405B, over hours, on a machine with a long name."""
    plan = make_plan("d" + "hhk" * 42 + "d", recomputed=" " + "^" * 60, stall_s=2e-5)
    said, budgets = plan.prediction, plan.budgets
    peaks = msgspec.structs.replace(said.peaks, ram_bytes=1800 * GIB)
    return msgspec.structs.replace(
        plan,
        hardware="a-machine-with-a-long-name-of-its-own.json",
        workload=msgspec.structs.replace(
            plan.workload,
            batch=dict.fromkeys(("input_ids", "attention_mask", "labels", "position_ids"), (16, 131_072))
            | {"pixel_values": (16, 3, 1024, 1024)},
            steps=1_000_000,
            examples=16_000_000,
            epochs=1,
        ),
        budgets=msgspec.structs.replace(budgets, vram_bytes=1000 * GIB, ram_bytes=2048 * GIB, disk_bytes=3000 * GIB),
        prediction=msgspec.structs.replace(
            said,
            peaks=peaks,
            ram_parts={"weights": 1800 * GIB - 1, "staging": 1},
            pass_s=4e4,
            step_s=8e4,
            bound_s=3.9e4,
            loaded_bytes_per_pass=1600 * GIB,
            offloaded_bytes_per_pass=1,
            rows_bytes_per_pass=3,
        ),
        gains=(Gain(of="loss", more=131_072, pass_s=4e4 - 1), Gain(of="link", more=GIB, pass_s=4e4 - 1e-7)),
    )


PLANS: dict[str, Callable[[], Plan]] = {
    "solved": solve_plan,
    "disk": disk_plan,
    "parts": parts_plan,
    "long": long_plan,
    "large": large_plan,
}

WHICH = [*(pytest.param(name, marks=pytest.mark.full) if name == "long" else name for name in PLANS), "answers"]


def fit_of(point: Point) -> Fit:
    return Fit(
        asked=None,
        least=None,
        least_at=point,
        whole=point,
        slowdown=0.0625,
        most={"batch": (1_048_576, point), "sequence": (1_048_576, point), "rank": (1_048_576, point)},
        bounded=("batch", "rank", "sequence"),
        quantized={"nf4-nested": point, "int8": None},
    )


def show_all(plan: Plan) -> None:
    """Print everything that a command may print of a plan."""
    record = make_record(
        plan, pass_s=plan.prediction.pass_s * 1.3, passes=100_000, learned=3, recoveries=2, offload_skipped=7
    )
    terminal.write(plan)
    terminal.write(plan, record)
    other = msgspec.structs.replace(plan, budgets=msgspec.structs.replace(plan.budgets, vram_bytes=1, ram_bytes=7))
    names = ("llama-3.1-405b-nf4-on-one-card.json", "llama-3.1-405b-nf4-on-one-card-and-more-ram.json")
    write_compared_files(compare_plans(plan, other), names)
    write_compared_files(compare_records(record, msgspec.structs.replace(record, pass_s=1e-7)), names)


def show_answers() -> None:
    answers.write_frontier("llama-3.1-405b: 131072 tokens a pass, on rtx-4060-ti-16gb", [WIDEST, SMALLEST])
    answers.write_fit("llama-3.1-405b: the most that fits in auto of vram, on rtx-4060-ti-16gb", fit_of(WIDEST))
    ways = [("memplan", SMALLEST), *((way, WIDEST) for way in WAYS), ("another", None)]
    answers.write_compared("llama-3.1-405b: 131072 tokens a pass, on rtx-4060-ti-16gb, in vram of 16.00 GiB", ways)


def holds(text: str, width: int) -> None:
    lines = text.splitlines()
    assert lines
    assert max(lines, key=len) == "" or len(max(lines, key=len)) <= width, max(lines, key=len)
    nothing = re.search(r"(?<![\d.,])0(\.0+ ?%|(\.0+)? ([KMG]iB|µs|us|ms|ns))", text)  # exactly none: 0 B, 0 s, 0%
    assert not nothing, text.splitlines()[text[: nothing.start()].count("\n")]
    # Of cuts by rich there is a mark; the report's own stands between two names, or before a count.
    assert not re.search(r"…(?! )|(?<! )…", text)
    assert not re.search(r"\biB|\d [KMG]i\b", text), "a unit is torn"


@pytest.mark.each_value
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("which", WHICH)
def test_piped(which: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_answers() if which == "answers" else show_all(PLANS[which]())
    shown = capsys.readouterr().out
    holds(shown, width)
    assert shown.isascii()
    assert "\x1b" not in shown


@pytest.mark.each_value
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("which", WHICH)
def test_on_a_terminal(which: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    show_answers() if which == "answers" else show_all(PLANS[which]())
    shown = screen.getvalue()
    assert "\x1b[" in shown
    holds("\n".join(line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()), width)


def test_piped_without_columns_it_is_80_wide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show_answers()
    show_all(disk_plan())
    holds(capsys.readouterr().out, 80)
