"""The benchmark of unequal lists runs, and its opponent is as strong as it says."""

from __future__ import annotations

import json
import random
import sys

import pytest

from benchmarks import unequal
from memplan.program.timeline import durations
from tests.place import brute


def test_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unequal", "--count", "2"])
    assert unequal.main() == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["lists"] == len(said["rows"]) == 2
    for row in said["rows"]:
        assert row["pieces"] >= row["blocks"]
        assert row["bound_s"] <= min(row["pass_s"], row["whole_pool_s"]) * (1 + 1e-9)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.full)])
def test_the_opponent_beside_every_choice_of_what_is_held(count):
    """Four or five blocks: never below the optimum of whole blocks, and within 1% of it in 95 of 100."""
    rng, near = random.Random(count), 0
    for _ in range(count):
        table, vram = unequal.random_list(rng, 4, 5)
        sizes, reads = [block.size_bytes for block in table.blocks], [access.blocks for access in table.accesses]
        times = durations(table, {})
        best = brute.optimum(times, reads, sizes, [vram] * len(times), table.host_to_device_bytes_per_s)
        found = unequal.whole_blocks_s(table, vram)
        assert best is not None
        assert found >= best * (1 - 1e-9)
        near += found <= best * 1.01
    assert near >= 0.95 * count
