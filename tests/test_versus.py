"""The comparison with peers runs, ends what it began, and docs/benchmarks.md says what was kept of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import peers_page
from benchmarks.about import about
from benchmarks.gpu import timeline
from benchmarks.versus import __main__ as main
from benchmarks.versus import parts
from benchmarks.versus.harness import NO_TURN, Rounds, compare
from benchmarks.versus.models import small
from benchmarks.versus.training import Setting
from benchmarks.versus.worker import Worker, WorkerError

ROOT = Path(__file__).parents[1]
QUICK = ("whole", "memplan-25", "accelerate-cpu")


def run(folder, *more):
    """Run the smallest part in a process of its own; return its rows by contender."""
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.versus",
        "--part",
        parts.TINY.name,
        "--out",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(temporary)}
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert not list(temporary.iterdir()), "it left files behind"
    result = json.loads(done.stdout.strip().splitlines()[-1])
    (kept,) = folder.glob("*-versus-cpu-tiny.json")
    assert json.loads(kept.read_text())["rows"] == result["parts"][0]["rows"]
    return {row["contender"]: row for row in result["parts"][0]["rows"]}


def assert_holds(rows):
    for name, row in rows.items():
        if name == "whole" or name.startswith(("memplan", "spread")):
            assert "error" not in row, row
            assert row["losses_equal"], name
            assert row["gradients_equal"], name
            assert row["gradient_error"] == 0, name
            assert row["step_s"] > 0, name
        if name.startswith(("memplan", "spread")):
            assert row["device_peak_bytes"] <= row["vram_bytes"], name
            assert row["device_peak_bytes"] < rows["whole"]["device_peak_bytes"], name
    assert rows["memplan-25"]["loads_per_pass"] > 0
    # Its hooks put other parameters in the place of those that the optimizer was given.
    assert rows["accelerate-cpu"]["gradients_missing"] > 0
    assert rows["accelerate-cpu"]["gradient_error"] == 1


@pytest.mark.full
def test_the_smallest_part(tmp_path):
    rows = run(tmp_path, "--only", *QUICK, "--rounds", "1")
    assert set(rows) == set(QUICK)
    assert_holds(rows)


@pytest.mark.full
def test_all_contenders(tmp_path):
    rows = run(tmp_path, "--profile")
    assert set(rows) == set(parts.TINY.contenders)
    assert_holds(rows)
    assert "error" not in rows["fsdp2-offload"]
    looked_at = [row["profile"] for row in rows.values() if row.get("over_bound") and row["over_bound"] > 0.03]
    assert all(0 < found["in_operators_s"] <= found["step_s"] * 1.05 for found in looked_at)


def alive(group):
    """Return the processes of a group that run; those that nobody has asked after yet do not."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def setting(tmp_path):
    return Setting(
        model=small("llama", width=64, layers=2), shape=(1, 8), checkpoint=tmp_path / "none", plans=tmp_path,
        scratch=tmp_path / "scratch", device="cpu", checkpointing=False, card_bytes=None,
    )  # fmt: skip


def test_a_contender_that_fails_says_why_and_leaves_nothing(tmp_path):
    worker = Worker("memplan-25", setting(tmp_path))
    with pytest.raises(WorkerError, match=r"memplan-25\.json"):
        worker.ask("begin", seconds=60)
    assert not (tmp_path / "scratch").exists()


def test_a_contender_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.versus.worker.CLOSE_S", 0.1)
    monkeypatch.setattr("benchmarks.versus.worker._Commands.first", lambda self: subprocess.run(["sleep", "300"]))
    worker = Worker("whole", setting(tmp_path))
    with pytest.raises(WorkerError, match="did not answer within 1 s"):
        worker.ask("first", seconds=1)
    assert not worker._process.is_alive()
    assert not alive(worker._process.pid)


def test_without_a_checkpoint_each_row_says_why(tmp_path, monkeypatch):
    def full(self, name, what, *args):
        raise WorkerError("OSError: no room")

    monkeypatch.setattr(Rounds, "_alone", full)
    rows = Rounds(parts.TINY, tmp_path).run(profile=True)["rows"]
    assert {row["contender"] for row in rows} == set(parts.TINY.contenders)
    assert {row["error"] for row in rows} == {"no checkpoint could be made: OSError: no room"}


def test_what_had_no_turn_has_one_in_the_next_call(tmp_path, monkeypatch):
    """Beside the whole model again; what had one stays, unless the code or the machine is another."""
    asked = []

    class TwoTurns:
        def __init__(self, part, folder):
            self.part = part

        def run(self, *, profile):
            names, call = self.part.contenders, len(asked)
            asked.append(names)
            turns = [{"contender": name, "call": call} for name in names[:3]]
            return {"part": self.part.name, "rows": turns + [{"contender": n, "error": NO_TURN} for n in names[3:]]}

    given = argparse.Namespace(keep=False, only=None, rounds=None, seconds=None, folder=tmp_path, profile=False)
    monkeypatch.setattr(main, "Rounds", TwoTurns)
    monkeypatch.setattr(main, "import_all", lambda names: None)
    names = parts.TINY.contenders
    for _ in range(len(names) // 2):
        result = main._one(parts.TINY, given, tmp_path, tmp_path, [])
    assert asked == [names, *(("whole", *names[at:]) for at in range(3, len(names), 2))]
    assert [row["contender"] for row in result["rows"]] == list(names)
    assert [row["call"] for row in result["rows"][:5]] == [len(asked) - 1, 0, 0, 1, 1]
    assert main._one(parts.TINY, given, tmp_path, tmp_path, []) == json.loads(
        main.kept("cpu-tiny", tmp_path).read_text()
    )
    assert len(asked) == len(names) // 2
    path = main.kept("cpu-tiny", tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": result["rows"][:-1], "commit": "another"}))
    assert len(main._one(parts.TINY, given, tmp_path, tmp_path, [])["rows"]) == len(names) - 1
    result["rows"][-1] = {"contender": names[-1], "error": NO_TURN}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": result["rows"]}))
    main._one(parts.TINY, given, tmp_path, tmp_path, [])
    assert asked[-1] == names


def test_a_result_says_what_it_depends_on_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("COMMIT", "0123456789ab")
    found = about()
    assert found["commit"] == "0123456789ab"
    assert {"date", "gpu", "processor", "cpus", "ram_bytes", "torch", "transformers", "peft"} <= set(found)


STUB = """#!/usr/bin/env bash
case $* in
    -c*) exit 0 ;;
    *gpu.keep*) exec {python} "$@" ;;
    *gpu.table*) exec {python} "$@" ;;
esac
echo "$@" >> {calls}
case $* in
    *calibrate*) printf 'measuring\\n' >&2; printf '{{\\n  "name": "a card"\\n}}\\n' ;;
    *truth*) printf '{{broken\\n{{"cases": 0}}\\n'; exit 1 ;;
    *cards*) printf '{{"rows": [], "untried": [], "ended": false}}\\n'; echo Traceback >&2; exit 1 ;;
    *peers*) printf '{{"model": "m", "tokens": 1, "card_gib": 8, "rows": [], "untried": ["one"]}}\\n'; exit 75 ;;
    *) echo "1 failed"; exit 2 ;;
esac
"""


def visit(tmp_path, *names, python=None, **more):
    """Run gpu.sh dry; return what it printed, and what it kept by part."""
    environment = {
        **os.environ, "GPU_DRY": "cpu", "GPU_STATE": str(tmp_path / "state"), "OUT": str(tmp_path / "out"),
        "PYTHON": str(python or sys.executable), "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *names], env=environment, capture_output=True, text=True
    )
    kept = {path.stem.partition("-gpu-")[2]: path for path in (tmp_path / "out").glob("*.json")}
    return done, {part: json.loads(path.read_text()) for part, path in kept.items()}


@pytest.mark.full
def test_parts_of_a_visit_are_kept_and_not_run_again(tmp_path):
    """Failures are results; what crashed, printed nothing or had rows left is run again."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB.format(python=sys.executable, calls=calls))
    stub.chmod(0o755)
    parts_run = ("calibrate", "truth", "cards-bf16", "peers", "tests")
    for _ in range(2):
        done, kept = visit(tmp_path, *parts_run, python=stub)
        assert done.returncode == 1, done.stderr
    assert set(kept) == set(parts_run)
    assert {part: one["complete"] for part, one in kept.items()} == {
        "calibrate": True, "truth": True, "cards-bf16": False, "peers": False, "tests": False,
    }  # fmt: skip
    assert kept["calibrate"]["result"] == {"name": "a card"}
    assert (kept["truth"]["result"], kept["truth"]["exit_code"]) == ({"cases": 0}, 1)
    assert kept["tests"]["last_lines"] == ["1 failed"]
    again = ["benchmarks.gpu.cards", "benchmarks.gpu.peers", "benchmarks.gpu.suite"]
    first = ["calibrate", "benchmarks.truth", *again]
    for call, what in zip(calls.read_text().splitlines(), first + again, strict=True):
        assert what in call
    assert "calibrate: done before" in done.stdout
    assert "**Dry: tiny shapes on a CPU. No figure here is a measurement.**" in done.stdout
    assert "- one: no time was left" in done.stdout
    assert "## One micro-batch, kernel by kernel\n\nNot run." in done.stdout
    assert not list((ROOT / "benchmarks" / "results").glob("*-gpu-calibrate.json"))


@pytest.mark.full
def test_a_visit_whose_time_is_over_says_so(tmp_path):
    done, kept = visit(tmp_path, "calibrate", "timeline", GPU_SECONDS="10")
    assert done.returncode == 1
    assert done.stdout.count("no time is left; another call goes on here") == 2
    assert not kept


@pytest.mark.full
def test_a_dry_visit_runs_every_part(tmp_path):
    done, kept = visit(tmp_path)
    assert set(kept) == {"tests", "cards-bf16", "cards-nf4", "peers", "calibrate", "truth", "timeline"}
    cut_short = {part for part, one in kept.items() if not one["complete"]}
    assert not cut_short, done.stdout + done.stderr
    assert kept["tests"]["result"]["passed"] > 0
    assert not kept["tests"]["result"]["failures"]
    for part in ("cards-bf16", "cards-nf4"):
        rows = {row["row"]: row for row in kept[part]["result"]["rows"]}
        assert len(rows) == 8
        assert "DoesNotFitError" in rows["64 tokens, 4 GiB"]["error"]
        for name, row in rows.items():
            if "12 GiB" in name:
                assert row["losses_equal"], name
                assert row["device_peak_bytes"] <= row["card_bytes"], name
                assert abs(row["peak_error"]) < 0.02, name
    peers = {row["row"]: row for row in kept["peers"]["result"]["rows"]}
    assert peers["memplan"]["gradients_equal"]
    assert "command line" in peers["streamft"]["error"]
    assert kept["timeline"]["result"]["host_events"] > 0
    assert kept["truth"]["result"]["cases"] > 0


def test_a_timeline_tells_copies_beside_compute_from_waiting_and_idling():
    kernels = [(0.0, 10.0), (10.0, 20.0), (50.0, 60.0)]
    copies = [(5.0, 30.0), (25.0, 35.0), (55.0, 58.0)]
    found = timeline.account(kernels, copies)
    assert found["device_span_s"] == pytest.approx(60e-6)
    assert found["compute_s"] == pytest.approx(30e-6)
    assert found["copying_s"] == pytest.approx(33e-6)
    assert found["overlap_s"] == pytest.approx(18e-6)
    assert found["overlap_share"] == pytest.approx(18 / 33)
    assert found["waiting_s"] == pytest.approx(15e-6)
    assert (found["idle_gaps"], found["longest_idle_us"]) == (1, [15.0])
    assert timeline.account([(0.0, 1.0)], [])["overlap_share"] is None


def test_gradients_are_compared():
    whole = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([0.5], np.float32)}
    assert compare(whole, dict(whole)) == {"gradient_error": 0.0, "gradients_equal": True}
    assert compare(whole, {**whole, "b": np.array([0.4], np.float32)})["gradient_error"] == pytest.approx(0.05)
    assert compare(whole, {"b": whole["b"]}) == {"gradient_error": 1.0, "gradients_equal": False}
    assert compare(whole, {**whole, "b": np.array([np.nan], np.float32)})["gradient_error"] == float("inf")


def test_parts_have_names_of_their_own():
    assert len(parts.ALL) == len(parts.CPU) + 1 + len(parts.CUDA)


def test_the_page_has_the_kept_results():
    text = peers_page.PAGE.read_text(encoding="utf-8")
    assert peers_page.filled(text, peers_page.section(peers_page.results())) == text


def test_who_ran_nowhere_has_no_row():
    ran = {"contender": "whole", "step_s": 1.0, "of_whole": 1.0, "gradients_equal": True, "gradient_error": 0.0}
    absent = {"contender": "deepspeed-cpu", "error": "ModuleNotFoundError: no deepspeed"}
    one = {
        "rows": [ran, absent], "device": "cpu", "gpu": None, "processor": "a CPU", "torch": "2", "commit": "c",
        "part": "p", "tokens": 1,
    }  # fmt: skip
    told = peers_page.section([one])
    assert "whole model" in told
    assert "DeepSpeed" not in told
