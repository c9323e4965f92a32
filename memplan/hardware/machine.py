"""This machine, as far as it tells of itself: its key, its free memory, the profile that was measured on it before.

torch is opened only to ask a CUDA device.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import platformdirs
import psutil

from memplan.device_kinds import is_apart
from memplan.errors import HardwareError
from memplan.hardware.profile import HardwareProfile, read, shipped_folder
from memplan.units import GIB, MIB

DEVICE_RESERVE_BYTES = 512 * MIB
"""Left free on a CUDA device by ``vram="auto"``: matrix libraries' workspaces, a display, other processes' growth."""

HOST_RESERVE_BYTES = 2 * GIB
"""Left free in RAM by ``ram=None`` on a machine with a GPU: Python, the data loader, the page cache."""


def cache_path() -> Path:
    """Return the folder for what memplan keeps between runs: ``MEMPLAN_CACHE`` where that is set, else in the
    user's.
    """
    given = os.environ.get("MEMPLAN_CACHE")
    return Path(os.path.expanduser(given)) if given else platformdirs.user_cache_path("memplan")


def cache_folder() -> Path:
    """Return :func:`cache_path`, made if need be. Raises OSError where it cannot be made."""
    folder = cache_path()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached() -> HardwareProfile | None:
    """Return the profile that was measured on this machine before, or None. Raises HardwareError for a spoilt one."""
    path = cached_path()
    return read(path) if path.is_file() else None


def cached_path() -> Path:
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
    if not is_apart(device):
        return available_host_bytes()
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free)


def auto_vram_bytes(profile: HardwareProfile) -> int:
    """Return the bytes that ``vram="auto"`` stands for.

    On this machine's CUDA device (other GPUs are not measured): what is free, and the process's own context (a plan
    counts it), less DEVICE_RESERVE_BYTES. On the CPU: half of the RAM that is available; :func:`auto_ram_bytes` takes a
    quarter, so that both fit beside everything else. For a profile of another machine: the same of all the memory that
    it names.
    """
    here = is_here(profile)
    if not is_apart(profile.device):
        return (available_host_bytes() if here else int(profile.device_bytes.value)) // 2
    total = int(profile.device_bytes.value)
    if here:
        total = min(total, free_device_bytes("cuda") + int(profile.context_bytes.value))
    return max(0, total - DEVICE_RESERVE_BYTES)


def auto_ram_bytes(profile: HardwareProfile) -> int:
    """Return the bytes that ``ram=None`` stands for.

    With a GPU: what is available, less HOST_RESERVE_BYTES. On the CPU: a quarter of what is available. For a
    profile of another machine: the same of the RAM that it names, and of this machine's where it names none.
    """
    named = None if is_here(profile) else profile.host_bytes
    room = available_host_bytes() if named is None else int(named.value)
    return max(0, room - HOST_RESERVE_BYTES) if is_apart(profile.device) else room // 4


def notes(profile: HardwareProfile, folder: str | Path | None) -> tuple[str, ...]:
    """Return what is peculiar to this machine and bears on a plan for it. ``folder``: where the checkpoint lies."""
    if not is_here(profile):
        return ()
    found = []
    if sys.platform == "win32":
        found.append(
            "On Windows the driver lets a full card go on in the RAM that it shares, far slower and without an "
            "error: such bytes are over budget and memplan does not see them. Set CUDA's sysmem fallback policy to "
            "none. Untested."
        )
    if "microsoft" in platform.release().lower():
        if is_apart(profile.device):
            found.append(
                "WSL2 lets only a part of the RAM be pinned, often half of it; the rest is pageable and slower to "
                "copy. Raise memory= in .wslconfig if you need more."
            )
        if folder and _file_system(Path(folder)) in ("9p", "drvfs"):
            found.append(
                f"The checkpoint is on a Windows drive ({folder}), which WSL2 reads many times slower than its "
                "own: copy it there, under ~."
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


def profile_of_plan(name: str, rates_bytes_per_s: Sequence[float]) -> HardwareProfile | None:
    """Return the profile of this name, shipped or kept in the cache, that has these rates; None where there is none.

    ``rates_bytes_per_s``: to the device, from it, of the disk. A profile may have been measured anew since a plan was
    made.
    """
    for path in (*sorted(shipped_folder().glob("*.json")), *sorted((cache_path() / "profiles").glob("*.json"))):
        try:
            found = read(path)
        except HardwareError:
            continue  # one that cannot be read is no plan's
        rates = (found.host_to_device_bytes_per_s, found.device_to_host_bytes_per_s, found.disk_bytes_per_s)
        if found.name == name and [rate.value for rate in rates] == list(rates_bytes_per_s):
            return found
    return None
