"""What a machine can do: sizes, rates and latencies, each with where it comes from. Plans are timed with these.

A profile is shipped (``profiles/*.json``, from datasheets), a file of the user's, or measured on this machine once and
kept in the cache folder. No torch here at import: it is opened only to ask a CUDA device, or to measure.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs
import psutil
from msgspec import Struct

from memplan import cards
from memplan.errors import HardwareError
from memplan.files import write_whole
from memplan.units import GIB, MIB, format_bytes, format_seconds

SCHEMA_VERSION = 1

DEVICE_RESERVE_BYTES = 512 * MIB
"""Left free on a CUDA device by ``vram="auto"``: matrix libraries' workspaces, a display, other processes' growth."""

HOST_RESERVE_BYTES = 2 * GIB
"""Left free in RAM by ``ram=None`` on a machine with a CUDA device: Python, the data loader, the page cache."""

_MAY_BE_ZERO = ("context_bytes", "launch_s", "load_latency_s")
_DTYPES = ("float32", "bfloat16", "float16")
_HERE = Path(__file__).parent


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
    device: Literal["cpu", "cuda"]
    device_bytes: Figure
    """All memory of the device; on the CPU, all RAM."""
    host_bytes: Figure | None
    """RAM; None where the profile is of a card alone."""
    matmul_flops_per_s: dict[str, Figure]
    """Rate of dense matrix products by torch's dtype name, summed in float32."""
    memory_bytes_per_s: Figure
    """Of the device's memory, reads and writes together."""
    host_to_device_bytes_per_s: Figure
    """From page-locked RAM; on the CPU, one thread's copy from RAM to RAM."""
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
    """To the device from RAM that is not page-locked."""
    duplex_factor: Figure | None = None
    """Share of its own rate that a direction of the link reaches while the other is as busy: 1 for a full duplex."""
    page_lock_bytes: Figure | None = None
    """RAM that was page-locked at once when it was tried: at least so much can be."""
    page_lock_refused_bytes: Figure | None = None
    """The least that was refused. None where nothing was: then ``page_lock_bytes`` is as much as was tried, and no limit."""
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
        if not self.name.strip():
            raise HardwareError("name is empty: give the profile a name")
        if "float32" not in self.matmul_flops_per_s or not set(self.matmul_flops_per_s) <= set(_DTYPES):
            raise HardwareError(
                f"matmul_flops_per_s has {sorted(self.matmul_flops_per_s)}: give float32, and besides it only "
                f"{' and '.join(_DTYPES[1:])}"
            )
        for where, figure in self._figures():
            _check(where, figure)

    def _figures(self) -> list[tuple[str, Figure]]:
        figures = [(name, getattr(self, name)) for name in self.__struct_fields__]
        figures += [(f"matmul_flops_per_s.{dtype}", figure) for dtype, figure in self.matmul_flops_per_s.items()]
        return [(where, figure) for where, figure in figures if isinstance(figure, Figure)]


def names() -> tuple[str, ...]:
    """Return the names of the shipped profiles, sorted."""
    return tuple(sorted(path.stem for path in _folder().glob("*.json")))


def load(name_or_path: str | Path) -> HardwareProfile:
    """Return a shipped profile by the name of its card, as people write it, or the profile in a JSON file.

    Nothing is measured. Raises HardwareError for an unknown name (with those that are near), for one that several profiles
    have, for an unreadable file, and for a profile that is not one (with the field that is wrong).
    """
    text = str(name_or_path)
    shipped = {name.lower(): name for name in names()}
    is_path = isinstance(name_or_path, Path) or "/" in text or os.sep in text or text.endswith(".json")
    if not is_path and text.lower() in shipped:
        return _read(_folder() / f"{shipped[text.lower()]}.json")
    if is_path or Path(text).is_file():
        return _read(Path(text).expanduser())
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
    """Return how much RAM may be page-locked at once; None where no limit is known: no try was ever refused."""
    if profile.device == "cpu" or profile.page_lock_refused_bytes is None:
        return None
    locked = profile.page_lock_bytes
    return 0 if locked is None else int(locked.value)


def behind(name: str, rates_bytes_per_s: Sequence[float]) -> HardwareProfile | None:
    """Return the profile of this name, shipped or kept in the cache, that has these rates; None where there is none.

    ``rates_bytes_per_s``: to the device, from it, of the disk. A profile may have been measured anew since a plan was made.
    """
    for path in (*sorted(_folder().glob("*.json")), *sorted((cache_path() / "profiles").glob("*.json"))):
        try:
            found = _read(path)
        except HardwareError:
            continue  # one that cannot be read is no plan's
        rates = (found.host_to_device_bytes_per_s, found.device_to_host_bytes_per_s, found.disk_bytes_per_s)
        if found.name == name and [rate.value for rate in rates] == list(rates_bytes_per_s):
            return found
    return None


def listed(profile: HardwareProfile) -> list[tuple[str, str, str]]:
    """Return each figure for people: what it is, its value, where it comes from."""
    found = []
    for where, figure in profile._figures():
        name = where.replace("matmul_flops_per_s.", "products in ")
        if name != where:
            text = f"{figure.value / 1e12:.3g} TFLOP/s"
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


def cache_path() -> Path:
    """Return the folder for what memplan keeps between runs: ``MEMPLAN_CACHE`` where that is set, else in the user's."""
    given = os.environ.get("MEMPLAN_CACHE")
    return Path(os.path.expanduser(given)) if given else platformdirs.user_cache_path("memplan")


def cache_folder() -> Path:
    """Return :func:`cache_path`, made if need be. Raises OSError where it cannot be made."""
    folder = cache_path()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept() -> HardwareProfile | None:
    """Return the profile that was measured on this machine before, or None. Raises HardwareError for a spoilt one."""
    path = _kept_path()
    return _read(path) if path.is_file() else None


def auto(progress: Callable[[str], None] | None = None) -> HardwareProfile:
    """Return this machine's profile: the cached one, else it is measured (some seconds) and cached.

    ``progress`` is called with a short text before each measurement. The cache's key is the platform, the processor,
    the CPUs that it may use, the GPU, and torch's version.
    """
    try:
        found = kept()
    except HardwareError:
        found = None  # of an older memplan, or cut short by a full disk: it is measured again and written over
    if found is None or found.operator_s is None:  # of a memplan that did not measure this yet
        return measured(progress)
    return found


def measured(progress: Callable[[str], None] | None = None) -> HardwareProfile:
    """Measure this machine now, keep the profile for the plans to come, and return it. Raises HardwareError."""
    from memplan import calibrate

    profile = calibrate.measure(progress=progress)
    path = _kept_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(profile, path)
    except OSError:
        pass  # a cache that cannot be written costs the next start some seconds, no more
    return profile


def _kept_path() -> Path:
    return cache_path() / "profiles" / f"{machine_key()}.json"


def machine_key() -> str:
    """Return what tells this machine from others as far as rates go, fit for a file's name.

    torch is opened only where it may know a GPU to ask for its name.
    """
    gpu = "cpu"
    if not version("torch").endswith("+cpu"):
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS") or cpus
    parts = (
        platform.system(),
        platform.machine(),
        processor_name(),
        f"{os.cpu_count()} cpus {threads} threads",
        gpu,
        f"torch {version('torch')}",
    )
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(parts).lower()).strip("-")


def processor_name() -> str:
    """Return the processor's name for people, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # no such file outside Linux
    return platform.processor() or platform.machine()


def available_host_bytes() -> int:
    """Return the RAM that can be had now without swapping, a container's limit regarded."""
    return min([psutil.virtual_memory().available, *_container_room_bytes()])


def is_limited() -> bool:
    """Whether a container's limit leaves less RAM than the machine has available."""
    return min(_container_room_bytes(), default=math.inf) < psutil.virtual_memory().available


def free_device_bytes(device: Literal["cpu", "cuda"]) -> int:
    """Return the memory of the device that can be had now; for ``"cpu"`` that is :func:`available_host_bytes`."""
    if device == "cpu":
        return available_host_bytes()
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


def auto_vram_bytes(profile: HardwareProfile) -> int:
    """Return the bytes that ``vram="auto"`` stands for.

    On this machine's CUDA device: what is free, and the process's own context (a plan counts it), less
    DEVICE_RESERVE_BYTES. On the CPU: half of the RAM that is available; :func:`auto_ram_bytes` takes a quarter, so that
    both fit beside everything else. For a profile of another machine: the same of all the memory that it names.
    """
    here = is_here(profile)
    if profile.device == "cpu":
        return (available_host_bytes() if here else int(profile.device_bytes.value)) // 2
    total = int(profile.device_bytes.value)
    if here:
        total = min(total, free_device_bytes("cuda") + int(profile.context_bytes.value))
    return max(0, total - DEVICE_RESERVE_BYTES)


def auto_ram_bytes(profile: HardwareProfile) -> int:
    """Return the bytes that ``ram=None`` stands for.

    With a CUDA device: what is available, less HOST_RESERVE_BYTES. On the CPU: a quarter of what is available. For a
    profile of another machine: the same of the RAM that it names, and of this machine's where it names none.
    """
    named = None if is_here(profile) else profile.host_bytes
    room = available_host_bytes() if named is None else int(named.value)
    return room // 4 if profile.device == "cpu" else max(0, room - HOST_RESERVE_BYTES)


def notes(profile: HardwareProfile, folder: str | Path | None) -> tuple[str, ...]:
    """Return what is peculiar to this machine and bears on a plan for it. ``folder``: where the checkpoint lies."""
    if not is_here(profile):
        return ()
    found = []
    if sys.platform == "win32":
        found.append(
            "On Windows the driver lets a full card go on in the RAM that it shares, far slower and without an error: such "
            "bytes are over budget and memplan does not see them. Set CUDA's sysmem fallback policy to none. Untested."
        )
    if "microsoft" in platform.release().lower():
        if profile.device == "cuda":
            found.append(
                "WSL2 lets only a part of the RAM be page-locked, often half of it: what goes beyond is copied from "
                "pageable memory, slower. Raise memory= in .wslconfig where that binds."
            )
        if folder and _file_system(Path(folder)) in ("9p", "drvfs"):
            found.append(
                f"The checkpoint lies on a drive of Windows ({folder}), which WSL2 reads many times slower than its own: "
                "copy it there, under ~."
            )
    return tuple(found)


def _file_system(path: Path, mounts: str | Path = "/proc/mounts") -> str | None:
    """Return the kind of file system that a path lies on, as far as the system tells it."""
    path = path.resolve()
    kinds = {}
    try:
        for line in Path(mounts).read_text().splitlines():
            _, where, kind, *_ = line.split()
            kinds[Path(where.replace("\\040", " "))] = kind
    except (OSError, ValueError):
        return None
    return next((kinds[folder] for folder in (path, *path.parents) if folder in kinds), None)


def is_here(profile: HardwareProfile) -> bool:
    """Whether the profile was measured on this machine."""
    return bool(profile.machine) and profile.machine == machine_key()


def _container_room_bytes() -> list[int]:
    """Return what each memory limit of the control group leaves; psutil sees only the whole machine."""
    room = []
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
            stat = Path(limit_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            # The page cache counts as used there, but gives way: what of it lies idle can be had.
            idle = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
            room.append(max(0, int(limit) - used + (int(idle[1]) if idle else 0)))
    return room


def _folder() -> Path:
    """Return the folder of the shipped profiles: in the package in a wheel, beside it in a checkout."""
    packaged = _HERE / "_profiles"
    return packaged if packaged.is_dir() else _HERE.parent / "profiles"


def _read(path: Path) -> HardwareProfile:
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
