"""What a script that knows nothing of memplan does with its model after training is done to the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.conftest import exact

AFTER = Path(__file__).with_name("script_after.py")


@pytest.mark.quick("cast")
@pytest.mark.parametrize(
    "how",
    [
        "cast",
        "copied_part",
        "unloaded",
        *(
            pytest.param(how, marks=pytest.mark.full)
            for how in (
                "copied", "pickled", "merged", "merged_and_unmerged", "merged_layer", "compiled", "trained_on",
            )
        ),
    ],
)  # fmt: skip
def test_it_is_done_as_without(checkpoint, alone, under, tmp_path, how):
    whole = alone(AFTER, checkpoint, how, tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    done = under("2500KiB", AFTER, checkpoint, how, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "streamed from" in done.stderr
    assert exact(done) == exact(whole)
    assert exact(done)[-1].startswith("made")
    assert done.stderr.count("from here on the model is whole") == 1
