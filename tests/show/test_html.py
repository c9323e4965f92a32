"""The report as a page, without a browser: what it says, that it says it safely, and that its drawings are to scale."""

from __future__ import annotations

import html as escaping
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import msgspec
import pytest

from memplan import api
from memplan.cli import main
from memplan.hardware import profile as profiles
from memplan.program.memory_timeline import timeline
from memplan.program.page_lock import pageable_items
from memplan.program.record import BlockRecord, RunRecord
from memplan.program.results import Frontier, point_of
from memplan.program.schema import Plan
from memplan.program.timeline import timeline_of
from memplan.program.whole import checkpointing_only, everything_kept
from memplan.show.html import render
from memplan.units import format_bytes as size
from memplan.units import format_seconds
from tests.show.pages import Element, read, tables
from tests.show.plans import disk_plan, long_plan, make_plan, make_record, pageable_plan, solve_plan
from tests.support.tables import MIB

NONE = "–"
EVIL = (
    "<script>alert(1)</script> \"x\" 'y' &amp; </title></style></svg> {{ 7 * 7 }} \x1b[31m \N{RIGHT-TO-LEFT OVERRIDE}"
)


def seconds(value: float) -> str:
    return format_seconds(value)


def percent(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}"


PLANS = {
    "solved": solve_plan,
    "disk": disk_plan,
    "pageable": pageable_plan,
    "by hand": lambda: make_plan("dhhhkkd", recomputed=" ^^"),
}


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


def record_of(plan: Plan) -> RunRecord:
    return make_record(plan, pass_s=1.1 * plan.prediction.pass_s, extra_bytes=5 * MIB)


# ---- every number ---------------------------------------------------------------------------------------------------


def test_numbers_in_sentences_are_the_plans(plan: Plan) -> None:
    record, said, work = record_of(plan), plan.prediction, plan.workload
    held = said.compute_s - sum(
        row.recompute_s for row in plan.table.accesses if plan.policies().get(row.module) == "recompute"
    )
    moments, line = timeline(plan), timeline_of(plan)
    gap = max(0.0, said.pass_s / said.bound_s - 1)
    sizes = [*msgspec.structs.astuple(said.peaks), *msgspec.structs.astuple(plan.budgets)]
    context = said.vram_parts.get("context", 0)
    sizes += [record.vram_peak_bytes + context, record.vram_reserved_bytes + context]
    sizes += [max(moment.vram_bytes for moment in moments), max(moment.ram_bytes for moment in moments)]
    sizes += [record.vram_peak_bytes + context - plan.budgets.vram_bytes]
    sizes += [record.vram_reserved_bytes + context - plan.budgets.vram_bytes]
    slow = [plan.items[item].size_bytes for item in pageable_items(plan)]
    sizes.append(sum(slow))
    times_s = [said.pass_s, said.step_s, said.bound_s, record.pass_s, record.wall_s, 0.0]
    times_s += [line.pass_s, line.compute_s, line.total_stall_s]
    beside = (everything_kept(plan), checkpointing_only(plan) or everything_kept(plan))
    shares = [abs(said.step_s / whole.step_s - 1) for whole in beside]
    shares += [said.compute_s / held - 1, said.stall_s / held, line.compute_s / line.pass_s]
    for channel in ("h2d", "d2h", "disk"):
        times_s.append(sum(load.end_s - load.start_s for load in line.loads if load.channel == channel))
        shares.append(times_s[-1] / line.pass_s)
    known = [size(value) for value in sizes if value is not None]
    known += [seconds(value) for value in times_s] + [percent(value) for value in shares]
    known += [
        percent(said.pass_s / record.pass_s - 1, "+"),
        *(f"{n / 10:.1f}%" for n in (int(gap * 1000), int(gap * 1000) + 1)),
    ]
    known += [f"{said.step_s / whole.step_s:.1f}" for whole in beside]
    known += [str(value) for shape in work.batch.values() for value in shape] + [str(len(slow))]
    known += [
        f"{value:,}"
        for value in (work.tokens, work.accumulation, record.loads, record.misses, record.out_of_order, record.passes)
    ]
    known += [
        plan.hardware,
        plan.model,
        work.adapter,
        "0.1.0",
        *(block.name for block in plan.table.blocks),
        *plan.notes,
    ]
    allowed = set(re.findall(r"\d[\d,.]*\d|\d", " ".join(known)))

    page = read(render.text(plan, record))
    words = page.all("body")[0].text("table", "svg", "style", hidden=False)  # axes are hidden
    words = re.sub(r"\.layers\.0 … \d+|layers\.0 … \d+", "", words)  # names of layers
    assert set(re.findall(r"\d[\d,.]*\d|\d", words)) <= allowed
    assert size(said.peaks.vram_bytes) in words
    assert seconds(said.step_s) in words
    assert not re.search(r"(?<![\d.])0\.0 [KMG]iB", page.text("style"))


def test_figures_of_the_profile_with_their_sources(tmp_path: Path) -> None:
    profile = profiles.load("rtx-4090")
    made = solve_plan()
    table = msgspec.structs.replace(
        made.table,
        host_to_device_bytes_per_s=profile.host_to_device_bytes_per_s.value,
        device_to_host_bytes_per_s=profile.device_to_host_bytes_per_s.value,
        disk_bytes_per_s=profile.disk_bytes_per_s.value,
    )
    plan = msgspec.structs.replace(made, table=table, hardware="rtx-4090")
    api.report(plan, html=tmp_path / "page.html")
    found = tables(read((tmp_path / "page.html").read_text()))
    assert found["figures"][1:] == profiles.as_rows(profile)
    budget = {row[0]: row[1] for row in found["budget"]}
    total = int(profile.device_bytes.value)
    assert budget["memory of the device"] == size(total)
    assert budget["left to others"] == size(total - plan.budgets.vram_bytes)
    assert "more than there is" not in budget
    beyond = msgspec.structs.replace(plan.budgets, vram_bytes=total + 3 * MIB)
    api.report(msgspec.structs.replace(plan, budgets=beyond), html=tmp_path / "page.html")
    budget = {row[0]: row[1] for row in tables(read((tmp_path / "page.html").read_text()))["budget"]}
    assert budget["more than there is"] == "3.0 MiB"
    assert "left to others" not in budget
    # One that was measured anew since is not the one that the plan was timed with.
    api.report(msgspec.structs.replace(made, hardware="rtx-4090"), html=tmp_path / "page.html")
    assert {row[2] for row in tables(read((tmp_path / "page.html").read_text()))["figures"][1:]} == {"the plan"}


# ---- safe, small, alone ---------------------------------------------------------------------------------------------


def test_what_others_named_is_harmless() -> None:
    plan = make_plan("dhhd", rename={1: EVIL}, notes=(EVIL,))
    accesses = tuple(
        msgspec.structs.replace(row, module=EVIL) if row.module == EVIL else row for row in plan.table.accesses
    )
    table = msgspec.structs.replace(plan.table, accesses=accesses)
    plan = msgspec.structs.replace(plan, model=EVIL, hardware=EVIL, table=table)
    plan = msgspec.structs.replace(plan, workload=msgspec.structs.replace(plan.workload, adapter=EVIL, optimizer=EVIL))
    record = make_record(plan, pass_s=1.0, device=EVIL)
    text = render.text(plan, record)
    page = read(text)
    assert not page.all("script")
    shown = EVIL.replace("\x1b", "\\x1b").replace("\N{RIGHT-TO-LEFT OVERRIDE}", "\\u202e")
    assert page.all("h1")[0].children == [shown]
    titles = [title.children[0] for title in page.all("title")]
    assert any(str(title).startswith(f"{shown}: 200.0 MiB host") for title in titles)
    assert shown in page.text()
    assert "\x1b" not in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text
    assert "49" not in re.findall(r"\d+", page.all("h1")[0].text())
    for element in page.all(*{element.tag for element in _every(page)}):
        assert not any(name.startswith("on") or name in ("src", "href") for name in element.attributes), element

    frame = read(render.Frame(page=text, plain=EVIL)._repr_html_())
    assert [element.tag for element in _every(frame)] == ["style", "iframe", "details", "summary", "pre"]
    assert frame.all("pre")[0].children == [EVIL]
    assert frame.all("iframe")[0].attributes["srcdoc"] == text
    assert frame.all("iframe")[0].attributes["sandbox"] == ""


def test_a_page_needs_nothing_else(plan: Plan) -> None:
    text = render.text(plan, record_of(plan))
    page = read(text)
    assert text.startswith("<!doctype html>")
    assert not page.all("script", "link", "img", "iframe", "object", "base")
    assert re.findall(r"url\((.)", text)
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert "@import" not in text
    assert "default-src 'none'" in text
    ids = [element.attributes["id"] for element in _every(page) if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    for element in _every(page):
        for name in element.attributes.get("aria-labelledby", "").split():
            assert name in ids
        if element.tag == "svg" and element.attributes.get("role") == "img":
            assert element.attributes.get("aria-labelledby")
    used = set(re.findall(r"url\(#([\w-]+)\)", text))
    assert used <= set(ids)
    assert render.text(plan, record_of(plan)) == text


def test_a_page_of_the_longest_plan_is_small() -> None:
    plan = long_plan()
    record = make_record(plan, pass_s=1.0)
    text = render.text(plan, record)
    page = read(text)
    assert len(tables(page)["blocks"]) == 1 + 882 + 126
    assert len([mark for mark in page.all("div") if mark.attributes.get("class") == "strip"]) == 2
    assert len(text.encode()) < 400_000


def test_a_report_in_a_terminal_opens_no_template(tmp_path: Path) -> None:
    solve_plan().save(tmp_path / "plan.json")
    code = (
        "import sys; from memplan.cli import main; code = main(['report', sys.argv[1]]); assert code == 0 and not "
        "{'jinja2', 'torch', 'memplan.show.html'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "plan.json")], check=True, stdout=subprocess.DEVNULL)


# ---- asked for ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = solve_plan()
    files = {name: str(tmp_path / name) for name in ("plan.json", "record.json", "points.json", "page.html")}
    plan.save(files["plan.json"])
    record_of(plan).save(files["record.json"])
    points = Frontier(model=plan.model, hardware=plan.hardware, tokens=plan.workload.tokens, points=(point_of(plan),))
    (tmp_path / "points.json").write_bytes(msgspec.json.encode(points))
    asked = ["report", files["plan.json"], files["record.json"], "--html", files["page.html"]]
    assert main([*asked, "--frontier", files["points.json"]]) == 0
    assert files["page.html"] in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert text == render.text(plan, record_of(plan), (point_of(plan),))
    assert "The large mark is this plan" in text
    assert main(["report", files["plan.json"], "--html", files["page.html"]]) == 0
    assert "The large mark" not in (tmp_path / "page.html").read_text()

    other = msgspec.structs.replace(points, model="another")
    (tmp_path / "points.json").write_bytes(msgspec.json.encode(other))
    assert main([*asked, "--frontier", files["points.json"]]) != 0
    assert "the frontier is of another" in capsys.readouterr().err
    (tmp_path / "points.json").write_text("{}")
    assert main([*asked, "--frontier", files["points.json"]]) == 2
    assert "is no frontier" in capsys.readouterr().err
    assert main([*asked, "--json"]) == 2
    assert main(["report", files["plan.json"], "--frontier", files["points.json"]]) == 2
    assert main(["report", files["plan.json"], "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_what_the_frontier_command_prints_is_read(tmp_path: Path) -> None:
    point = point_of(solve_plan())
    printed = {"model": "m", "hardware": "h", "tokens": 8, "points": [msgspec.to_builtins(point)]}
    (tmp_path / "points.json").write_text(json.dumps(printed, indent=2))
    assert Frontier.load(tmp_path / "points.json") == Frontier(model="m", hardware="h", tokens=8, points=(point,))


def test_a_notebook_shows_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[render.Frame] = []
    display = types.ModuleType("IPython.display")
    display.display = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    plan = solve_plan()
    api.report(plan)
    assert capsys.readouterr().out == ""
    (frame,) = shown
    assert frame.page == render.text(plan)
    assert escaping.escape(frame.page) in frame._repr_html_()
    assert repr(frame).startswith(plan.model)
    plan._ipython_display_()  # what a cell that ends with the plan calls
    assert shown.pop() == frame
    with open("/dev/null", "w") as file:  # a file is a file in a notebook too
        api.report(plan, file=file)
    assert len(shown) == 1


def test_a_plan_and_a_record_are_a_line_elsewhere(plan: Plan) -> None:
    said, record = plan.prediction, record_of(plan)
    assert repr(plan) == (
        f"<Plan of {plan.model!r} on {plan.hardware!r}: {size(said.peaks.vram_bytes)} of "
        f"{size(plan.budgets.vram_bytes)} vram, a micro-batch of {seconds(said.pass_s)}>"
    )
    assert repr(record) == (
        f"<RunRecord of 40 micro-batches of {seconds(record.pass_s)} on {record.device}: {record.loads:,} loads, "
        f"3 misses, at most {size(record.vram_peak_bytes)} vram>"
    )


def test_a_block_that_was_waited_for_beside_the_plan() -> None:
    """Measured waits of blocks that the plan does not wait for are in the table too."""
    plan = make_plan("dhhkd")
    rows = (BlockRecord(block=3, loads=4, loaded_bytes=1, stall_s=0.5, misses=2),)
    found = tables(read(render.text(plan, make_record(plan, pass_s=1.0, passes=10, blocks=rows))))
    assert found["waits"][1:] == [("model.layers.2", "disk to device", NONE, NONE, "50.0 ms", "4", "2")]


def _every(element: Element) -> list[Element]:
    inside = [child for child in element.children if isinstance(child, Element)]
    return [found for child in inside for found in (child, *_every(child))]
