"""The trainers with other releases of the libraries than those that are pinned, each installed beside them.

What came of it is kept by ``tests/support/full.py`` in ``docs/compatibility.md``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETS = {
    "pinned": [],
    "newest transformers": ["transformers==5.24.0"],
    "oldest transformers": ["transformers==5.17.0", "huggingface-hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9"],
    "TRL one minor behind": ["trl==1.15.0"],
    "PEFT two minors behind": ["peft==0.19.1"],
    "accelerate four minors behind": ["accelerate==1.11.0"],
}
NAMES = ("transformers", "trl", "peft", "accelerate", "lightning", "diffusers", "torch")
WHAT = ("tests/trainers/test_examples.py", "tests/trainers/test_run.py")
WHICH = "same_in_each_way or same_as_without or killed or hub"
WITHOUT_TRITON = {"TRL one minor behind": "same_in_each_way and trl_reward"}
"""TRL 1.15's SFTTrainer and DPOTrainer need triton, which torch's build for the CPU has not: without memplan they fail
too. Nothing but TRL differs in that set."""


@pytest.mark.full
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", SETS)
def test_every_trainer(name, tmp_path, record_property):
    """Their own dependencies come with those that are pinned: a second torch is not wanted."""
    if SETS[name]:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, *SETS[name]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    code = f"from importlib.metadata import version\nprint(*(f'{{n}} {{version(n)}}' for n in {NAMES}), sep=', ')"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    record_property("versions", asked.stdout.strip())
    which, marks = WHICH, "not gpu and not full"
    if name in WITHOUT_TRITON and not find_spec("triton"):
        which, marks = WITHOUT_TRITON[name], "not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", marks, "--timeout=300", "-k", which, *WHAT]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=2900, check=False)
    last = [line for line in done.stdout.splitlines() if " passed" in line or " failed" in line][-1:]
    left_out = f" (of {which} alone: the others need triton)" if which != WHICH else ""
    record_property("result", (last[0].strip("= ") if last else "no result") + left_out)
    assert done.returncode == 0, done.stdout[-4000:]
