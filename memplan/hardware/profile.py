"""What a machine can do: sizes, rates and latencies, each with where it comes from. Plans are timed with these.

A profile is shipped (``profiles/*.json``, from datasheets), a file of the user's, or measured on this machine once and
kept in the cache folder. No torch here.
"""

from __future__ import annotations

import math
import os
from datetime import date
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from memplan import device_kinds
from memplan.atomic_write import write_whole
from memplan.device_kinds import is_apart
from memplan.errors import HardwareError
from memplan.hardware import cards
from memplan.units import format_bytes, format_seconds

SCHEMA_VERSION = 1

_MAY_BE_ZERO = ("context_bytes", "launch_s", "load_latency_s")
_DTYPES = ("float32", "bfloat16", "float16")
_HERE = Path(__file__).parents[1]


class Figure(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number and where it comes from."""

    value: float
    """In the unit that the field's name ends with."""
    kind: Literal["datasheet", "measured", "assumed"]
    source: str
    """The document, the program that measured it, or why it was assumed."""
    date: str
    """Of the document or the measurement: ``YYYY-MM-DD``, or ``YYYY-MM`` or ``YYYY`` where no more is known."""


class HardwareProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One machine: a compute device, the RAM beside it, the link between them, and the disk.

    Raises HardwareError where a figure is not finite, is negative, or is zero where that makes no sense.
    """

    schema_version: int
    name: str
    description: str
    device: str
    """Its kind, by torch's name: ``"cpu"``, ``"cuda"`` (ROCm too) or ``"xpu"``."""
    device_bytes: Figure
    """All memory of the device; on the CPU, all RAM."""
    host_bytes: Figure | None
    """RAM; None where the profile is of a card alone."""
    matmul_flops_per_s: dict[str, Figure]
    """Rate of dense matrix products by torch's dtype name, summed in float32."""
    memory_bytes_per_s: Figure
    """Of the device's memory, reads and writes together."""
    host_to_device_bytes_per_s: Figure
    """From pinned RAM; on the CPU, one thread's copy from RAM to RAM."""
    device_to_host_bytes_per_s: Figure
    disk_bytes_per_s: Figure
    """Large reads by a few threads, past the page cache."""
    launch_s: Figure
    """Time that one operator takes whatever its size."""
    load_latency_s: Figure
    """Time that one load takes whatever its size."""
    context_bytes: Figure
    """Device memory that the process holds beside its tensors: the context, kernels, matrix libraries' workspaces."""
    operator_s: Figure | None = None
    """Time of the host for one operator of a training step, whatever its size: Python, dispatch, autograd."""
    pageable_bytes_per_s: Figure | None = None
    """To the device from RAM that is not pinned."""
    duplex_factor: Figure | None = None
    """Share of its own rate that a direction of the link reaches while the other is as busy: 1 for a full duplex."""
    page_lock_bytes: Figure | None = None
    """RAM that was pinned at once when it was tried: at least so much can be."""
    page_lock_refused_bytes: Figure | None = None
    """The least that was refused. None where nothing was: then ``page_lock_bytes`` is as much as was tried, and no
    limit.
    """
    host_to_device_of_ranks: dict[str, Figure] = {}
    """Rate of each card from pinned RAM while so many of a node load at once, by their number."""
    host_memory_bytes_per_s: Figure | None = None
    """Of the RAM beside a card, reads and writes together, all channels."""
    disk_depth: Figure | None = None
    """Reads at once from which on the disk gave nine tenths of its best rate."""
    machine: str = ""
    """Key of the machine that it was measured on; empty for one from datasheets."""

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise HardwareError(
                f"schema_version is {self.schema_version}; this memplan reads version {SCHEMA_VERSION}: "
                "make the profile again"
            )
        if fault := device_kinds.fault(self.device):
            raise HardwareError(f"{fault}: give the name that torch has for the kind of device")
        if not self.name.strip():
            raise HardwareError("name is empty: give the profile a name")
        if "float32" not in self.matmul_flops_per_s or not set(self.matmul_flops_per_s) <= set(_DTYPES):
            raise HardwareError(
                f"matmul_flops_per_s has {sorted(self.matmul_flops_per_s)}: give float32, and besides it only "
                f"{' and '.join(_DTYPES[1:])}"
            )
        for count in self.host_to_device_of_ranks:
            if not (count.isascii() and count.isdecimal() and int(count) > 1):
                raise HardwareError(
                    f"host_to_device_of_ranks has {count!r}: give rates by a number of ranks, 2 or more"
                )
        for where, figure in self._figures():
            _check(where, figure)

    def _figures(self) -> list[tuple[str, Figure]]:
        figures = [(name, getattr(self, name)) for name in self.__struct_fields__]
        figures += [(f"matmul_flops_per_s.{dtype}", figure) for dtype, figure in self.matmul_flops_per_s.items()]
        figures += [(f"host_to_device_of_ranks.{n}", figure) for n, figure in self.host_to_device_of_ranks.items()]
        return [(where, figure) for where, figure in figures if isinstance(figure, Figure)]


def names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in shipped_folder().glob("*.json")))


def load(name_or_path: str | Path) -> HardwareProfile:
    """Return a shipped profile by the name of its card, as people write it, or the profile in a JSON file.

    Nothing is measured. Raises HardwareError for an unknown name (with those that are near), for one that several
    profiles have, for an unreadable file, and for a profile that is not one (with the field that is wrong).
    """
    text = str(name_or_path)
    shipped = {name.lower(): name for name in names()}
    is_path = isinstance(name_or_path, Path) or "/" in text or os.sep in text or text.endswith(".json")
    if not is_path and text.lower() in shipped:
        return read(shipped_folder() / f"{shipped[text.lower()]}.json")
    if is_path or Path(text).is_file():
        return read(Path(text).expanduser())
    found = [profile for name in cards.matching(text, names()) if _has(profile := load(name), cards.size_of(text))]
    if len(found) == 1:
        return found[0]
    if found:
        raise HardwareError(
            f"the hardware {text!r} may be {' or '.join(profile.name for profile in found)}: give one of them"
        )
    near = cards.near(text, names())
    hint = f"near it: {', '.join(near)}; all" if near else "there are"
    raise HardwareError(
        f"there is no hardware profile named {text!r}; {hint}: {', '.join(names())}. "
        'Or give a JSON file, or "auto" to measure this machine'
    )


def _has(profile: HardwareProfile, gigabytes: int | None) -> bool:
    return gigabytes is None or round(profile.device_bytes.value / 1e9) == gigabytes


def page_lock_limit_bytes(profile: HardwareProfile) -> int | None:
    """Return how much RAM may be pinned at once; None where no limit is known: no try was ever refused."""
    if not is_apart(profile.device) or profile.page_lock_refused_bytes is None:
        return None
    locked = profile.page_lock_bytes
    return 0 if locked is None else int(locked.value)


def as_rows(profile: HardwareProfile) -> list[tuple[str, str, str]]:
    """Return each figure for people: what it is, its value, where it comes from."""
    found = []
    for where, figure in profile._figures():
        name = where.replace("matmul_flops_per_s.", "products in ")
        if name != where:
            text = f"{figure.value / 1e12:.3g} TFLOP/s"
        elif name.startswith("host_to_device_of_ranks."):
            name = f"host to device, {name.rpartition('.')[2]} ranks at once"
            text = f"{format_bytes(int(figure.value))}/s"
        elif name.endswith("_bytes_per_s"):
            name, text = name.removesuffix("_bytes_per_s"), f"{format_bytes(int(figure.value))}/s"
        elif name in ("duplex_factor", "disk_depth"):
            text = f"{figure.value:.3g}"
        elif name.endswith("_bytes"):
            name, text = name.removesuffix("_bytes"), format_bytes(int(figure.value))
        else:
            name, text = name.removesuffix("_s"), format_seconds(figure.value)
        found.append((name.replace("_", " "), text, f"{figure.kind} {figure.date}, {figure.source}"))
    return found


def save(profile: HardwareProfile, path: str | Path) -> None:
    """Write the profile as JSON, whole or not at all. Raises OSError where the folder cannot be written."""
    write_whole(Path(path), msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")


def shipped_folder() -> Path:
    """Return the folder of the shipped profiles: in the package in a wheel, beside it in a checkout."""
    packaged = _HERE / "_profiles"
    return packaged if packaged.is_dir() else _HERE.parent / "profiles"


def read(path: Path) -> HardwareProfile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HardwareError(
            f"the hardware profile {path} cannot be read ({error.strerror}): give a JSON file or one of "
            f"{', '.join(names())}"
        ) from error
    try:
        return msgspec.json.decode(data, type=HardwareProfile)
    except msgspec.DecodeError as error:
        raise HardwareError(
            f"{path} is not a hardware profile: {error}. Compare it with a shipped one or with schemas/profile.json"
        ) from error


def _check(where: str, figure: Figure) -> None:
    least_is_zero = where in _MAY_BE_ZERO
    if not math.isfinite(figure.value) or figure.value < 0 or (figure.value == 0 and not least_is_zero):
        wanted = "finite and not negative" if least_is_zero else "finite and above 0"
        raise HardwareError(f"{where} is {figure.value}: it must be {wanted}")
    if not figure.source.strip():
        raise HardwareError(f"{where} names no source: say where the figure comes from")
    try:
        date.fromisoformat(
            figure.date + "-01-01"[len(figure.date) - 4 :] if len(figure.date) in (4, 7) else figure.date
        )
    except ValueError as error:
        raise HardwareError(f"{where} is dated {figure.date!r}: write YYYY-MM-DD, YYYY-MM or YYYY") from error
