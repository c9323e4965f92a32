"""The committed JSON Schemas are those of the types."""

from __future__ import annotations

import json

import pytest

from tests.support.schemas import FOLDER, TYPES, schema


@pytest.mark.parametrize("name", TYPES)
def test_the_committed_schema_is_the_types(name: str) -> None:
    committed = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert committed == schema(name), "run `make schemas` and read what changed"


@pytest.mark.parametrize("name", TYPES)
def test_unknown_fields_are_refused_everywhere(name: str) -> None:
    definitions = json.loads(schema(name))["$defs"]
    for title, definition in definitions.items():
        assert definition.get("additionalProperties") is False, title


def test_there_are_no_others() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(TYPES)
