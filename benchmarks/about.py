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

import torch

from memplan.hardware import processor_name

RESULTS = Path(__file__).parent / "results"


def about() -> dict[str, Any]:
    """Return date, commit, machine and versions."""
    git = ["git", "-C", str(RESULTS.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "..", ":!results"], capture_output=True, text=True
    ).stdout
    packages = {}
    for package in ("torch", "transformers", "peft", "accelerate"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            pass
    return {
        "date": datetime.date.today().isoformat(),
        "commit": (commit or "none") + (" and changes" if changed.strip() else ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **packages,
    }


def keep(result: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Write ``result`` with what it depends on to ``folder``, named by date, machine and ``name``; return the path."""
    found = about()
    machine = re.sub(r"[^a-z0-9]+", "-", (found["gpu"] or found["processor"] or "cpu").lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['date']}-{machine}-{name}.json"
    path.write_text(json.dumps({**found, **result}, indent=1, sort_keys=True) + "\n")
    return path
