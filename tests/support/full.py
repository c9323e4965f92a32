"""Runs the tests marked ``full``, one process each, and picks up where it stopped.

    python tests/support/full.py [--fresh] [-k EXPRESSION] [--timeout SECONDS]

After each test the state is written to ``.test-full/``; a test that passed is not run again until the code, the tests
or the versions change. The summary is ``tests/results/full.json``, with what tests recorded by ``record_property``,
and the same as a table in ``full.md``. Exits with 0 where none failed, else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

ROOT = Path(__file__).parents[2]
STATE = ROOT / ".test-full"
RESULTS = ROOT / "tests" / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "msgspec", "bitsandbytes", "torchao", "lightning")
NO_TESTS = 5
"""pytest's exit code where nothing was left to run: a test for a GPU where there is none."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--fresh", action="store_true", help="run all again")
    options.add_argument("-k", dest="expression", help="as pytest's; the summary then holds only these")
    options.add_argument("--timeout", type=int, default=3600, help="seconds for one test")
    given = options.parse_args()

    (STATE / "logs").mkdir(parents=True, exist_ok=True)
    names = collect(given.expression)
    if not names:
        print("no test is marked full" + (f" and matches {given.expression!r}" if given.expression else ""))
        return 1
    key, done = fingerprint(), {} if given.fresh else read_state()
    parts: dict[str, dict[str, Any]] = done.get("parts", {}) if done.get("key") == key else {}
    for number, name in enumerate(names, start=1):
        if parts.get(name, {}).get("outcome") == "passed":
            print(f"[{number}/{len(names)}] {name}: passed before", flush=True)
            continue
        print(f"[{number}/{len(names)}] {name} ...", flush=True)
        parts[name] = run(name, given.timeout)
        print(f"    {parts[name]['outcome']} in {parts[name]['seconds']} s", flush=True)
        write(STATE / "state.json", json.dumps({"key": key, "parts": parts}, indent=2))
    return summarise({name: parts[name] for name in names}, given.expression)


def collect(expression: str | None) -> list[str]:
    """Return the ids of the tests marked ``full``, in pytest's order. Leaves with pytest's words where it fails."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "full", "--no-header"]
    done = subprocess.run(
        [*command, *(["-k", expression] if expression else [])], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, NO_TESTS):
        sys.exit(f"the tests cannot be collected:\n{done.stdout}\n{done.stderr}")
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def run(name: str, timeout_s: int) -> dict[str, Any]:
    """Run one test in a process of its own; its output goes to a log, its properties come back."""
    slug = hashlib.sha256(name.encode()).hexdigest()[:12]
    log, report = STATE / "logs" / f"{slug}.txt", STATE / "logs" / f"{slug}.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w") as output:
        output.write(f"{name}\n")
        output.flush()
        # pytest ends a test that hangs; the outer limit is for one that does not let itself be ended.
        command = [sys.executable, "-m", "pytest", "-m", "full", f"--timeout={timeout_s}"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", name]
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=timeout_s + 60
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    seconds = round(time.monotonic() - start, 1)
    case = ElementTree.parse(report).find(".//testcase") if report.is_file() else None
    if code == 0:
        outcome = "skipped" if case is not None and case.find("skipped") is not None else "passed"
    else:
        outcome = "left out" if code == NO_TESTS else "failed"
    properties = {} if case is None else {item.get("name"): item.get("value") for item in case.iter("property")}
    return {"outcome": outcome, "seconds": seconds, "properties": properties, "log": str(log.relative_to(ROOT))}


def summarise(parts: dict[str, dict[str, Any]], expression: str | None) -> int:
    """Write the summary and print it. Return the exit code."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    counts = Counter(part["outcome"] for part in parts.values())
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "only": expression}
    summary = {
        **about,
        "machine": machine(),
        "versions": versions(),
        "counts": dict(sorted(counts.items())),
        "parts": [
            {"test": name, **{key: value for key, value in part.items() if key != "log"}}
            for name, part in parts.items()
        ],
    }
    write(RESULTS / "full.json", json.dumps(summary, indent=2) + "\n")
    table = ["| test | outcome | seconds | recorded |", "|---|---|---|---|"]
    for name, part in parts.items():
        recorded = ", ".join(f"{key} {value}" for key, value in part["properties"].items())
        table.append(f"| {name} | {part['outcome']} | {part['seconds']} | {recorded} |")
    text = "\n".join(table)
    write(RESULTS / "full.md", f"Written by `make test-full` on {about['date']}, commit {about['commit']}.\n\n{text}\n")
    tried = [part for name, part in parts.items() if name.startswith("tests/test_compatibility.py")]
    if tried:
        write(ROOT / "docs" / "compatibility.md", compatibility(tried, about))
    print(f"\n{text}\n")
    for name, part in parts.items():
        if part["outcome"] == "failed":
            print(f"failed: {name}, see {part['log']}")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped'] + counts['left out']} skipped")
    return 1 if counts["failed"] else 0


def compatibility(parts: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the table of releases that the trainers were tried with."""
    head = "versions", "outcome", "tests"
    rows = [(p["properties"].get("versions", "?"), p["outcome"], p["properties"].get("result", "?")) for p in parts]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
    return (
        "# Compatibility\n\nEach trainer as it is, under `memplan run` and with memplan's own lines, with these "
        f"releases. Written by `make test-full` (`tests/test_compatibility.py`) on {about['date']}, commit "
        f"{about['commit']}.\n\n{table}\n"
    )


def fingerprint() -> str:
    """Return a digest of the code, the tests and the versions: what a result depends on."""
    digest = hashlib.sha256(json.dumps([platform.python_version(), versions()]).encode())
    for folder in ("memplan", "tests", "profiles", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json", ".txt") and RESULTS not in path.parents:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    digest.update((ROOT / "pyproject.toml").read_bytes())
    return digest.hexdigest()


def read_state() -> dict[str, Any]:
    """Return what was written last; empty where there is nothing that can be read."""
    try:
        state = json.loads((STATE / "state.json").read_text())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def commit() -> str:
    """Return the commit, and whether the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "--verify", "-q", "HEAD")
        # The results themselves are no change of what was tested.
        changed = git("status", "--porcelain", "--", ".", ":!tests/results")
    except OSError:
        return "unknown"
    return (head or "none") + (" and changes" if changed else "")


def machine() -> dict[str, Any]:
    """Return what the tests ran on."""
    import torch

    from memplan.hardware.machine import processor_name

    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


if __name__ == "__main__":
    raise SystemExit(main())
