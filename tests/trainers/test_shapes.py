"""Shapes of training scripts: each is the same under ``memplan run``, or runs unchanged and a line says why."""

from __future__ import annotations

import json

import msgspec
import pytest

from tests.support.shapes import FILES, RESULTS, TABLE, Outcome, run, shapes, table

KNOWN = {name: msgspec.convert(row, Outcome) for name, row in json.loads(RESULTS.read_text()).items()}


def test_no_shape_differs():
    """Nor is one served or left alone without a word."""
    assert {*KNOWN} <= {f"{file}:{name}" for file in FILES for name in shapes(file)}
    assert len(KNOWN) >= 25
    assert not [name for name, outcome in KNOWN.items() if outcome.differs]
    assert not [name for name, outcome in KNOWN.items() if not (outcome.is_served or outcome.said or outcome.error)]


def test_the_page_shows_what_was_found():
    assert TABLE.read_text() == table(KNOWN)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


@pytest.mark.full
@pytest.mark.parametrize("name", KNOWN)
def test_a_shape_is_the_same(name, work):
    file, _, shape = name.partition(":")
    found = run(file, shape, KNOWN[name].about, work)
    assert not found.differs
    assert (found.is_served, bool(found.loads)) == (KNOWN[name].is_served, bool(KNOWN[name].loads))
