"""Plans and records as JSON: strict to read, the same bytes for the same value, whole or not at all on disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from memplan.atomic_write import read, reason, write
from memplan.errors import PlanFormatError

SCHEMA_VERSION = 2
"""Of the files: a file of another version is refused."""

Value = TypeVar("Value", bound=msgspec.Struct)


def encode(value: msgspec.Struct) -> bytes:
    """Return the JSON of a plan or record: indented, in the fields' order, ending with a newline.

    Raises PlanFormatError for a number that JSON has no word for (NaN, infinite).
    """
    strange = _not_finite(msgspec.to_builtins(value), "")
    if strange:
        raise PlanFormatError(
            f"{strange} is NaN or infinite, which no file can hold: mend the rate or time it came from"
        )
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def save(value: msgspec.Struct, path: str | Path) -> None:
    """Write a plan or record, whole or not at all: :mod:`memplan.atomic_write` says what is written through. ``-`` is
    standard output. Raises PlanFormatError where the file cannot be written.
    """
    write(path, encode(value), PlanFormatError)


def load(kind: type[Value], path: str | Path) -> Value:
    """Read a value of a kind, not yet checked. Raises PlanFormatError."""
    return decode(read_bytes(path), kind, str(path))


def read_bytes(path: str | Path) -> bytes:
    try:
        return read(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise PlanFormatError(f"{path} cannot be read: {reason(error)}; check the path") from None


def decode(data: bytes, kind: type[Value], where: str) -> Value:
    """Return the value of a kind that ``data``, which came from ``where``, is the JSON of. Raises PlanFormatError."""
    name = kind.__name__
    try:
        head = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PlanFormatError(f"{where} is no {name}: not JSON, or truncated ({error}); re-create it") from None
    version = head.get("schema_version") if isinstance(head, dict) else None
    if version is None:
        raise PlanFormatError(f"{where} is no {name}: it has no schema_version; give a file that memplan wrote")
    if version != SCHEMA_VERSION:
        raise PlanFormatError(
            f"{where} has schema version {version!r}, this memplan reads {SCHEMA_VERSION}: re-create it with this "
            f"version"
        )
    try:
        value = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # also what json takes and JSON has not: NaN, UTF-16
        raise PlanFormatError(f"{where} is no {name}: {error}; re-create it, or undo the edit") from None
    negative = _negative(head).lstrip(".")
    if negative:
        raise PlanFormatError(f"{where} has a negative size or time at {negative}: re-create it, or undo the edit")
    return value


def _not_finite(node: Any, path: str) -> str:
    """Return where a number is NaN or infinite, or an empty string."""
    if isinstance(node, float):
        return "" if math.isfinite(node) else path.lstrip(".")
    if isinstance(node, dict):
        parts = ((f"{path}.{key}", value) for key, value in node.items())
    elif isinstance(node, (list, tuple)):
        parts = ((f"{path}[{index}]", value) for index, value in enumerate(node))
    else:
        return ""
    return next((found for where, value in parts if (found := _not_finite(value, where))), "")


def _negative(node: Any) -> str:
    """Return the path to a size or time that is negative, or an empty string. Transients may be."""
    # Paths are made on the way back alone: a long plan has tens of thousands of values.
    if isinstance(node, list):
        return next((f"[{index}]{found}" for index, value in enumerate(node) if (found := _negative(value))), "")
    if not isinstance(node, dict):
        return ""
    for key, value in node.items():
        if isinstance(value, (int, float)):
            if value < 0 and key.endswith(("_bytes", "_s")) and not key.startswith("transient"):
                return f".{key}"
        elif (found := _negative(value)) and not key.startswith("transient"):
            return f".{key}{found}"
    return ""
