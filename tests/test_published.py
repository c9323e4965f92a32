"""Published trainings: rows that have their settings, and a few of them planned and held to what cards showed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.published import __main__ as published
from benchmarks.published.runs import rows, runs

FILES = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*-published.json"))


def test_each_row_is_planned_or_left_out_for_a_reason():
    planned, left_out = runs()
    assert sorted([*(run.row for run in planned), *left_out]) == list(range(len(rows())))
    assert len(planned) >= 60
    assert all(left_out.values())
    assert all(run.published_bytes > 0 and run.card for run in planned)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_cards_showed_is_predicted(path):
    found = json.loads(path.read_text())
    assert found["planned"] >= 60
    again = published.verdict(found["rows"])
    assert again == found["verdict"]
    stock = again["stock libraries"]
    assert stock["memory"]["median"] <= published.MEMORY_MEDIAN
    assert again["all"]["time"]["median"] <= published.TIME_MEDIAN


@pytest.mark.full
@pytest.mark.parametrize("name", ["lora--rank64", "miss--default"])
def test_a_row_as_it_is_planned_now(name):
    (run,) = [run for run in runs()[0] if run.name == name]
    found = published.row_of(run)
    assert found["trainable"] == run.trainable
    assert abs(found["memory_error"]) <= 0.02
    assert abs(found["time_error"]) <= published.TIME_MEDIAN
