"""Writes the JSON Schemas of the files that memplan reads and writes, from the types themselves.

python tests/support/schemas.py
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from memplan.hardware.profile import HardwareProfile
from memplan.program.record import RunRecord
from memplan.program.schema import Plan

FOLDER = Path(__file__).parents[2] / "schemas"
TYPES = {"plan": Plan, "profile": HardwareProfile, "record": RunRecord}


def schema(name: str) -> str:
    """Return the text of ``schemas/NAME.json``."""
    made = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://github.com/memplan/memplan/raw/main/schemas/{name}.json",
        **msgspec.json.schema(TYPES[name]),
    }
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name in TYPES:
        (FOLDER / f"{name}.json").write_text(schema(name), encoding="utf-8")
