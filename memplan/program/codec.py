"""Plans and records as JSON: strict to read, the same bytes for the same value, whole or not at all on disk."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from memplan.errors import PlanFormatError
from memplan.program.record import RunRecord
from memplan.program.schema import SCHEMA_VERSION, Plan

Value = TypeVar("Value", Plan, RunRecord)
_KINDS: dict[str, type[Plan] | type[RunRecord]] = {"plan": Plan, "record": RunRecord}


def encode(value: Plan | RunRecord) -> bytes:
    """Return the JSON of a plan or record: indented, in the fields' order, ending with a newline."""
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def save(value: Plan | RunRecord, path: str | Path) -> None:
    """Write a plan or record, whole or not at all. Raises PlanFormatError where the path cannot be written."""
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = file.name
            file.write(encode(value))
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise PlanFormatError(f"{path} cannot be written: {error.strerror}; give another path") from None


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check it. Raises PlanFormatError or PlanCheckError."""
    from memplan.program.check import require

    plan = _decode(_read(path), Plan, str(path))
    require(plan)
    return plan


def load_record(path: str | Path) -> RunRecord:
    """Read a record. Raises PlanFormatError."""
    return _decode(_read(path), RunRecord, str(path))


def decode_plan(data: bytes) -> Plan:
    """Return the plan that ``data`` is the JSON of, not yet checked. Raises PlanFormatError."""
    return _decode(data, Plan, "the plan")


def schema(kind: str) -> dict[str, Any]:
    """Return the JSON Schema of a ``"plan"`` or a ``"record"``."""
    return msgspec.json.schema(_KINDS[kind])


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PlanFormatError(f"{path} cannot be read: {error.strerror}; check the path") from None


def _decode(data: bytes, kind: type[Value], where: str) -> Value:
    name = kind.__name__
    try:
        head = json.loads(data)
    except ValueError as error:
        raise PlanFormatError(f"{where} is no {name}: not JSON, or truncated ({error}); make it again") from None
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version is None:
        raise PlanFormatError(f"{where} is no {name}: it has no schema_version; give a file that memplan wrote")
    if version != SCHEMA_VERSION:
        raise PlanFormatError(
            f"{where} has schema version {version!r}, this memplan reads {SCHEMA_VERSION}: make it again with this version"
        )
    try:
        value = msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise PlanFormatError(f"{where} is no {name}: {error}; make it again, or mend what was edited") from None
    negative = _negative(head, "")
    if negative:
        raise PlanFormatError(
            f"{where} has a negative size or time at {negative}: make it again, or mend what was edited"
        )
    return value


def _negative(node: Any, path: str) -> str:
    """Return where a size or time is negative, or an empty string. Transients may be."""
    if isinstance(node, dict):
        parts = [(f"{path}.{key}", key, value) for key, value in node.items()]
    elif isinstance(node, list):
        parts = [(f"{path}[{index}]", "", value) for index, value in enumerate(node)]
    else:
        return ""
    for where, key, value in parts:
        if key.startswith("transient"):
            continue
        if key.endswith(("_bytes", "_s")) and isinstance(value, (int, float)) and value < 0:
            return where.lstrip(".")
        found = _negative(value, where)
        if found:
            return found
    return ""
