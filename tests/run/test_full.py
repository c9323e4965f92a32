"""The large products, one process a file (``make test-full``)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest

from tests.run.test_parity import compare
from tests.support.training import CHECKPOINTING, KINDS

pytestmark = pytest.mark.full


@pytest.mark.each_value
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_is_equal_to_the_bit(kind, checkpointing, tmp_path, record_property):
    """Dropout × accumulation × checked × the budget from the least that works up."""
    cases = itertools.product((0.0, 0.2), (1, 4), (False, True), (0.0, 0.1, 0.3, 0.6, 0.9))
    count = 0
    for dropout, accumulation, checked, share in cases:
        options = {"dropout": dropout, "accumulation": accumulation, "checked": checked, "share": share}
        compare(kind, checkpointing=checkpointing, **options, tmp_path=tmp_path).detach()
        count += 1
    record_property("cases", count)


def test_demo(tmp_path, record_property):
    """The main job as a user runs it: exit code 0 means the same bits, within the budget, loaded by stock PEFT."""
    command = [sys.executable, "-m", "memplan", "demo", "--json", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["adapters_identical"]
    assert result["losses_identical"]
    peak = result["peak_bytes"]
    record_property("step_ratio", round(result["step_ratio"], 3))
    record_property("predicted_over_measured_peak", round(peak["predicted"] / peak["planned"], 4))
    assert peak["planned"] <= result["vram_bytes"]
