"""Loops of a script's own under ``memplan run``, whatever way they call their model in: streamed, and bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.conftest import exact

LOOP = Path(__file__).with_name("script_loop.py")
VRAM = {"prompt": "1300KiB", "within": "900KiB", "own": "1500KiB"}


def trained(out):
    return (out / "trained.safetensors").read_bytes()


WAYS = [
    "mixed",
    "positions",
    "evaluating",
    "beside",
    "prompt",
    "within",
    "forward",
    "twice",
    "looked_at",
    "checkpointed",
]
UNMAPPED = ["own", "filled", "custom"]
AGAIN = {"within", "forward", "checkpointed", "twice", "looked_at"}
"""Ways of which the first call does not say all."""


@pytest.mark.quick("beside", "within", "twice", "own")
@pytest.mark.parametrize("way", [*WAYS, *UNMAPPED])
def test_the_same_as_without(checkpoint, alone, under, tmp_path, way):
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    whole = alone(LOOP, checkpoint, tmp_path / "whole", way, **modules)
    assert whole.returncode == 0, whole.stderr[-3000:]
    done = under(VRAM.get(way, "2500KiB"), LOOP, checkpoint, tmp_path / "run", way, **modules)
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(done) == exact(whole)
    assert len(exact(done)) == 3 + (way == "looked_at")
    assert trained(tmp_path / "run") == trained(tmp_path / "whole")
    assert "inactive: " not in done.stderr
    assert "streamed from" in done.stderr
    assert ("planned anew" in done.stderr) == (way in AGAIN)
