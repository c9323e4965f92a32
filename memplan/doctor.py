"""What memplan finds on this machine, and what it means for plans and runs. Nothing is measured or changed."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct

from memplan.errors import HardwareError
from memplan.hardware import machine, numa
from memplan.hardware import profile as profiles
from memplan.units import format_bytes

_NEEDED = ("torch", "accelerate")
_TRAINERS = ("transformers", "peft", "trl", "lightning", "diffusers")
_QUANTIZERS = ("bitsandbytes", "torchao")


class Finding(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was looked at."""

    what: str
    found: str
    meaning: str = ""
    """What follows from it, or what to do; empty where all is well."""
    is_problem: bool = False


def findings() -> tuple[Finding, ...]:
    """Return what there is, in the order in which it should be read. Opens torch, where it is installed, for the
    GPU.
    """
    found = [
        Finding(
            what="machine",
            found=f"{platform.system()} {platform.release()}, {machine.processor_name()}, {os.cpu_count()} CPUs",
        ),
        _ram(),
        *_devices(),
        *_packages(),
        _cache(),
    ]
    profile = _kept_profile()
    found.append(_measured(profile))
    if profile is not None:
        found += [Finding(what="note", found=note) for note in machine.notes(profile, Path.cwd())]
    return tuple(found)


def _ram() -> Finding:
    total, available = psutil.virtual_memory().total, machine.available_host_bytes()
    meaning = ""
    if machine.is_limited():
        meaning = "a container's limit leaves less than the machine has; plans go by what is left of it"
    return Finding(what="RAM", found=f"{format_bytes(available)} available of {format_bytes(total)}", meaning=meaning)


def _devices() -> list[Finding]:
    if find_spec("torch") is None:
        return [Finding(what="GPU", found="not looked for: torch is not installed", is_problem=True)]
    try:
        return _seen_by_torch()
    except Exception as error:  # of the driver, or of libraries that are not there: whatever it is, it is to be said
        reason = " ".join(str(error).split()) or type(error).__name__
        return [Finding(what="GPU", found=f"torch failed to query the GPU: {reason}", is_problem=True)]


def _seen_by_torch() -> list[Finding]:
    import torch

    on_cpu = "the CPU is the compute device: vram is the RAM that a step may use, and blocks stream from RAM and disk"
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or getattr(torch.version, "hip", None)
        why = (
            f"this torch is built for {built_for}, but sees no device"
            if built_for
            else "this torch is built for the CPU alone"
        )
        return [Finding(what="GPU", found=f"none: {why}", meaning=on_cpu)]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        meaning = ""
        if properties.major < 8:
            meaning = "it has no bfloat16 of its own: train in float16, or in float32"
        found.append(
            Finding(
                what=f"GPU {index}",
                found=f"{properties.name}, {format_bytes(free)} free of {format_bytes(total)}, "
                f"compute capability {properties.major}.{properties.minor}",
                meaning=meaning,
            )
        )
        where, advice = numa.advice(_pci_address(properties))
        if where:
            found.append(Finding(what=f"GPU {index}", found=where, meaning=advice))
    setting = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "expandable_segments" not in setting:
        found.append(
            Finding(
                what="allocator",
                found="expandable_segments is not set",
                meaning="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps what torch reserves near what is used",
            )
        )
    if torch.cuda.device_count() > 1:
        found.append(
            Finding(
                what="GPUs",
                found=f"{torch.cuda.device_count()}",
                meaning="one process trains on one: choose with CUDA_VISIBLE_DEVICES",
            )
        )
    return found


def _pci_address(properties: Any) -> str:
    """Return a GPU's address as Linux writes it; empty where this torch does not tell."""
    numbers = [int(getattr(properties, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device")]
    return "" if min(numbers) < 0 else "{:04x}:{:02x}:{:02x}.0".format(*numbers)


def _packages() -> list[Finding]:
    found = []
    for what, names, needed in (
        ("libraries", _NEEDED, True),
        ("trainers", _TRAINERS, False),
        ("quantizers", _QUANTIZERS, False),
    ):
        versions = {name: _version(name) for name in names}
        missing = [name for name, text in versions.items() if text is None]
        meaning = f"not installed: {', '.join(missing)}" if missing else ""
        if needed and missing:
            meaning += "; pip install " + " ".join(missing)
        there = [f"{name} {text}" for name, text in versions.items() if text is not None]
        found.append(
            Finding(what=what, found=", ".join(there) or "none", meaning=meaning, is_problem=bool(needed and missing))
        )
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cache() -> Finding:
    try:
        folder = machine.cache_folder()
    except OSError as error:
        return Finding(
            what="cache",
            found=f"{machine.cache_path()} cannot be made ({error.strerror})",
            meaning="set MEMPLAN_CACHE to a writable folder for measured profiles and packed blocks",
            is_problem=True,
        )
    writable = os.access(folder, os.W_OK)
    return Finding(
        what="cache",
        found=f"{folder}, {format_bytes(shutil.disk_usage(folder).free)} free",
        meaning="" if writable else "it cannot be written: set MEMPLAN_CACHE to a folder that can",
        is_problem=not writable,
    )


def _kept_profile() -> profiles.HardwareProfile | None:
    try:
        return machine.cached()
    except (HardwareError, PackageNotFoundError):
        return None


def _measured(profile: profiles.HardwareProfile | None) -> Finding:
    if profile is None:
        return Finding(
            what="rates",
            found="not measured yet",
            meaning="the first plan measures them, or: memplan calibrate",
        )
    link, limit = profile.host_to_device_bytes_per_s.value, profiles.page_lock_limit_bytes(profile)
    return Finding(
        what="rates",
        found=f"measured {profile.disk_bytes_per_s.date}: link {format_bytes(int(link))}/s, "
        f"disk {format_bytes(int(profile.disk_bytes_per_s.value))}/s, "
        f"float32 products {profile.matmul_flops_per_s['float32'].value / 1e12:.3g} TFLOP/s"
        + ("" if limit is None else f", at most {format_bytes(limit)} of RAM pinned"),
    )
