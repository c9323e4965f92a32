"""Keep what a part of a visit printed, with machine, date and commit, as it ends.

python -m benchmarks.gpu.keep done NAME
python -m benchmarks.gpu.keep keep NAME EXIT_CODE SECONDS OUTPUT_FILE OUT_FOLDER
python -m benchmarks.gpu.keep collect OUT_FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.about import keep as keep_with_machine
from benchmarks.gpu.visit import STATE, commit

LAST_LINES = 40


def last_json(text: str) -> Any:
    """Return the last JSON object that a program printed, on a line of its own or as all of its output, or None."""
    found = None
    for part in (*text.splitlines(), text.strip()):
        try:
            found = json.loads(part) if part.startswith("{") else found
        except ValueError:
            pass
    return found


def is_done(name: str) -> bool:
    """Whether a part ended in an earlier call, by this code. A result of failures is one; a crash or a limit is not."""
    path = STATE / f"{name}.json"
    if not path.is_file():
        return False
    kept = json.loads(path.read_text())
    return bool(kept["complete"]) and kept["commit"] == commit()


def keep(name: str, code: int, seconds: float, output: Path, out: Path) -> Path:
    """Write a part's result to the state's folder and to ``out``; return the path there."""
    text = output.read_text(errors="replace")
    found = last_json(text)
    result = {
        "part": name,
        "exit_code": code,
        "took_s": seconds,
        "complete": code in (0, 1) and found is not None and found.get("ended", True),
        "result": found,
        "last_lines": text.splitlines()[-LAST_LINES:] if found is None else [],
    }
    path = keep_with_machine(result, f"gpu-{name}", out)
    STATE.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, STATE / f"{name}.json")
    return path


def collect(out: Path) -> None:
    """Copy to ``out`` what earlier calls of this code kept: a folder that begins empty each time then has all."""
    for path in sorted(STATE.glob("*.json")):
        kept = json.loads(path.read_text())
        if "part" in kept and kept["commit"] == commit() and not list(out.glob(f"*-gpu-{kept['part']}.json")):
            keep_with_machine(kept, f"gpu-{kept['part']}", out)  # its own date and machine are in it


def main() -> int:
    what, *given = sys.argv[1:]
    if what == "done":
        return int(not is_done(given[0]))
    if what == "keep":
        print(keep(given[0], int(given[1]), float(given[2]), Path(given[3]), Path(given[4])))
        return 0
    collect(Path(given[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
