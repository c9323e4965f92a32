"""Runs the tests marked ``full``, one process for each file, and picks up where it stopped.

    python tests/support/full.py [--fresh] [-k EXPRESSION] [--timeout SECONDS] [--beside N] [PATH ...]

After each file the state is written to ``.test-full/``; a test that passed is not run again until the code, the tests
or the versions change. Tests that a process which died left undone are run one by one. The summary is
``tests/results/full.json``, with what tests recorded by ``record_property``, and a table of the test functions in
``full.md``. Exits with 0 where none failed, else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    options.add_argument("--beside", type=int, default=1, help="how many files at a time")
    options.add_argument("paths", nargs="*", help="folders or files under tests; the summary then holds only these")
    given = options.parse_args()

    (STATE / "logs").mkdir(parents=True, exist_ok=True)
    names = collect(given.expression, given.paths)
    if not names:
        print("no test is marked full" + (f" and matches {given.expression!r}" if given.expression else ""))
        return 1
    key, done = fingerprint(), {} if given.fresh else read_state()
    parts: dict[str, dict[str, Any]] = done.get("parts", {}) if done.get("key") == key else {}
    left: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if parts.get(name, {}).get("outcome") != "passed":
            left[name.partition("::")[0]].append(name)
    print(f"{len(names)} tests, {sum(map(len, left.values()))} to run", flush=True)
    with ThreadPoolExecutor(given.beside) as pool:
        for ended in as_completed([pool.submit(run_file, tests, given.timeout) for tests in left.values()]):
            new = ended.result()
            parts.update(new)
            counts = Counter(part["outcome"] for part in new.values())
            print(
                f"{next(iter(new)).partition('::')[0]}: {', '.join(f'{n} {outcome}' for outcome, n in counts.items())} "
                f"in {sum(part['seconds'] for part in new.values()):.0f} s",
                flush=True,
            )
            write(STATE / "state.json", json.dumps({"key": key, "parts": parts}, indent=2))
    return summarise({name: parts[name] for name in names}, " ".join([*given.paths, given.expression or ""]).strip())


def collect(expression: str | None, paths: list[str]) -> list[str]:
    """Return the ids of the tests marked ``full``, in pytest's order. Leaves with pytest's words where it fails."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "full", "--no-header"]
    done = subprocess.run(
        [*command, *(["-k", expression] if expression else []), *paths], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode not in (0, NO_TESTS):
        sys.exit(f"the tests cannot be collected:\n{done.stdout}\n{done.stderr}")
    return [line for line in done.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def run_file(names: list[str], timeout_s: int) -> dict[str, dict[str, Any]]:
    """Run the tests of one file in one process, and alone what that process left undone."""
    parts = run(names, timeout_s)
    for name in names:
        if name not in parts:
            # The process died. In it, or before it could say so; alone it is plain which.
            parts |= run([name], timeout_s)
        if name not in parts:
            parts[name] = {"outcome": "failed", "seconds": 0.0, "properties": {}, "log": log_of([name])}
    return parts


def log_of(names: list[str]) -> str:
    """Return where the output of these goes, relative to the top."""
    slug = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    return str((STATE / "logs" / f"{slug}.txt").relative_to(ROOT))


def run(names: list[str], timeout_s: int) -> dict[str, dict[str, Any]]:
    """Run some tests in a process of their own, and return what became of those that came to an end."""
    log = ROOT / log_of(names)
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    with log.open("w") as output:
        # By name, whatever their marks: which cases the quick suite holds depends on what is collected beside them.
        # pytest ends a test that hangs; the outer limit is for one that does not let itself be ended.
        command = [sys.executable, "-m", "pytest", "-m", "", f"--timeout={timeout_s}"]
        command += ["-o", "junit_family=xunit1", f"--junitxml={report}", *names]
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout_s * len(names) + 60,
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
    found = {"log": str(log.relative_to(ROOT))}
    if code == NO_TESTS:
        return {name: {"outcome": "left out", "seconds": 0.0, "properties": {}, **found} for name in names}
    parts: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        name = f"{case.get('file')}::{case.get('name')}"
        properties = {item.get("name"): item.get("value") for item in case.iter("property")}
        seconds = round(float(case.get("time", 0)), 1)
        # A test whose end fails is reported twice.
        if name in names and parts.get(name, {}).get("outcome") != "failed":
            parts[name] = {"outcome": outcome, "seconds": seconds, "properties": properties, **found}
    return parts


def summarise(parts: dict[str, dict[str, Any]], expression: str) -> int:
    """Write the summary and print it. Return the exit code."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    counts = Counter(part["outcome"] for part in parts.values())
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "only": expression or None}
    summary = {
        **about,
        "machine": machine(),
        "versions": versions(),
        "counts": dict(sorted(counts.items())),
        "parts": [
            {"test": name, **{key: value for key, value in part.items() if key != "log" and value != {}}}
            for name, part in parts.items()
        ],
    }
    write(RESULTS / "full.json", json.dumps(summary, separators=(",", ":")).replace('{"test"', '\n{"test"') + "\n")
    functions: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, part in parts.items():
        functions[name.partition("[")[0]].append(part)
    table = ["| test | outcome | seconds | recorded |", "|---|---|---|---|"]
    for name, cases in functions.items():
        outcomes = Counter(case["outcome"] for case in cases)
        recorded = [", ".join(f"{key} {value}" for key, value in case["properties"].items()) for case in cases]
        table.append(
            f"| {name} | {', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())} "
            f"| {sum(case['seconds'] for case in cases):.1f} | {'; '.join(dict.fromkeys(filter(None, recorded)))} |"
        )
    text = "\n".join(table)
    write(RESULTS / "full.md", f"Written by `make test-full` on {about['date']}, commit {about['commit']}.\n\n{text}\n")
    tried = [part for name, part in parts.items() if name.startswith("tests/test_compatibility.py")]
    if tried:
        write(ROOT / "docs" / "compatibility.md", compatibility(tried, about))
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
