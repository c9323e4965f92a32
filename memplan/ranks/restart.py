"""What ranks that end for want of memory leave to those that their launcher starts in their place: a smaller budget.

``torchrun`` and ``accelerate launch`` start all ranks anew with ``--max-restarts``, from one process a node that stays:
what is left is known by it. Ranks agree upon the least vram that any of them has, so that one may leave it for all.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from memplan.atomic_write import write_whole

_COUNT, _MOST = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"


def leave_vram(folder: Path, vram_bytes: int) -> bool:
    """Leave so much vram to the ranks that a launcher starts next; return whether it starts any. ``folder``: where
    memplan keeps what outlives a run.
    """
    file = _file(folder)
    if file is None or _number(_COUNT) >= _number(_MOST):
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for other in file.parent.iterdir():
            if not _is_of_a_launcher(other.name):
                other.unlink(missing_ok=True)
        write_whole(file, str(vram_bytes).encode())
    except OSError:
        return False
    return True


def left_vram(folder: Path) -> int | None:
    """Return how much vram the ranks before have left to these, or None."""
    file = _file(folder)
    if file is None or _number(_COUNT) == 0:
        return None
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def _file(folder: Path) -> Path | None:
    pid = os.getppid()
    began = _began(pid)
    return None if began is None else folder / "restarts" / f"{pid}-{began}"


def _is_of_a_launcher(name: str) -> bool:
    """Whether a file's launcher is there still."""
    pid, _, began = name.partition("-")
    return pid.isdecimal() and _began(int(pid)) == began


def _began(pid: int) -> str | None:
    """Return when a process began (clock ticks since the machine did), or None where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _number(variable: str) -> int:
    try:
        return int(os.environ.get(variable, "0"))
    except ValueError:
        return 0
