"""Reading a file that may be a plan or a record."""

from __future__ import annotations

from pathlib import Path

import msgspec

from memplan.program import codec
from memplan.program.record import RunRecord
from memplan.program.schema import Plan


class _Told(msgspec.Struct):
    """What tells a record from a plan."""

    passes: int | None = None


def load_either(path: str | Path) -> Plan | RunRecord:
    """Read a plan or a record, as the file is one or the other. Raises as the two do."""
    data = codec.read_bytes(path)
    try:
        is_record = msgspec.json.decode(data, type=_Told).passes is not None
    except (msgspec.DecodeError, UnicodeDecodeError):
        is_record = False  # what is wrong with it is said below
    return codec.decode(data, RunRecord, str(path)) if is_record else codec.decode(data, Plan, str(path)).judged()
