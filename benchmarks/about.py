"""What a result depends on, and where it is kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from memplan.hardware.machine import processor_name

RESULTS = Path(__file__).parent / "results"


PACKAGES = ("torch", "transformers", "peft", "accelerate", "diffusers", "bitsandbytes", "deepspeed")


def about() -> dict[str, Any]:
    """Return date, commit, machine and versions. ``COMMIT`` in the environment: that of a copy without its history."""
    git = ("git", "-C", str(RESULTS.parent))
    commit = _said(*git, "rev-parse", "--short=12", "HEAD")
    changed = _said(*git, "status", "--porcelain", "--", "..", ":!results")
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            pass
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (commit or os.environ.get("COMMIT") or "none") + (" and changes" if changed else ""),
        "gpu": None,
        **(_gpu() if torch.cuda.is_available() else {}),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def _gpu() -> dict[str, Any]:
    """Return what is known of the CUDA device."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_bytes": torch.cuda.get_device_properties().total_memory,
        "cuda": torch.version.cuda,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None,
    }


def _said(*command: str) -> str:
    """Return what a command prints; nothing where there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def keep(result: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Write ``result`` with what it depends on to ``folder``, named by date, machine and ``name``; return the path."""
    found = about()
    machine = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or found["processor"] or "cpu").lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['date']}-{machine}-{name}.json"
    path.write_text(json.dumps({**found, **result}, indent=1, sort_keys=True) + "\n")
    return path
