"""The predictor is held to every measurement that was kept: what was measured once must be predicted ever after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import truth

FILES = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*-truth.json"))
QUICK = {
    "llama",
    "llama sequence=192 vocabulary=8192 checkpointing=True",
    "qwen3 checkpointing=True dtype=bfloat16",
    "gemma2 vocabulary=8192",
    "gpt2 adapter=dropout",
    "mixtral checkpointing=True",
}


def kept(path):
    return json.loads(path.read_text())


def test_there_are_enough():
    assert FILES
    for path in FILES:
        found = kept(path)
        assert len(found["rows"]) == found["cases"] >= 60
        assert {row["case"]["architecture"] for row in found["rows"]} == set(truth.ARCHITECTURES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_was_measured_is_within_the_limits(path):
    found = truth.verdict([truth.error_of(row) for row in kept(path)["rows"]])
    assert found["median"] <= truth.MEDIAN
    assert found["worst"] <= truth.WORST
    assert found["most_under"] <= truth.UNDER
    rows = [row for row in kept(path)["rows"] if "times" in row]
    if rows:
        took = truth.verdict([truth.time_error_of(row) for row in rows])
        assert took["median"] <= truth.TIME_MEDIAN
        assert took["worst"] <= truth.TIME_WORST


def test_times_were_measured_of_the_whole_grid():
    assert any(all("times" in row for row in kept(path)["rows"]) for path in FILES)


def _rows():
    for path in FILES:
        for row in kept(path)["rows"]:
            case = truth.Case(**row["case"])
            mark = () if case.name in QUICK else pytest.mark.full
            yield pytest.param(case, row["measured"], id=f"{path.stem}-{case.name}", marks=mark)


@pytest.mark.quick(
    "2026-11-26-amd-epyc-truth-llama",
    "2026-11-26-amd-epyc-truth-qwen3 checkpointing=True dtype=bfloat16",
    "2026-11-26-amd-epyc-truth-gpt2 adapter=dropout",
    "2026-11-26-amd-epyc-truth-mixtral checkpointing=True",
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("case", "measured"), list(_rows()))
def test_it_is_predicted_today(case, measured):
    error = truth.error_of({"predicted_bytes": truth.predicted_bytes(case), "measured": measured})
    assert -truth.UNDER <= error <= truth.WORST
