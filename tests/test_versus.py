"""The comparison with peers runs, ends what it began, and the README says what was kept of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks import readme
from benchmarks.versus import parts
from benchmarks.versus.harness import compare
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


def test_gradients_are_compared():
    whole = {"a": np.array([1.0, -2.0], np.float32), "b": np.array([0.5], np.float32)}
    assert compare(whole, dict(whole)) == {"gradient_error": 0.0, "gradients_equal": True}
    assert compare(whole, {**whole, "b": np.array([0.4], np.float32)})["gradient_error"] == pytest.approx(0.05)
    assert compare(whole, {"b": whole["b"]}) == {"gradient_error": 1.0, "gradients_equal": False}
    assert compare(whole, {**whole, "b": np.array([np.nan], np.float32)})["gradient_error"] == float("inf")


def test_parts_have_names_of_their_own():
    assert len(parts.ALL) == len(parts.CPU) + 1 + len(parts.CUDA)


def test_the_readme_has_the_kept_results():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text, readme.section(readme.results())) == text
