"""Runs shapes of training scripts (``tests/shapes``) as they are, then under ``memplan run``, and tells what differs.

    python -m tests.support.shapes [FILE | FILE:SHAPE ...] [--fresh]

Each shape runs without memplan, then in the least vram that works and in a third more. The outcome goes to
``tests/results/shapes.json``, and from there as a table to ``docs/shapes.md``. A shape whose outcome is there is run
again only when it is named, or with ``--fresh``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.about import about
from tests.support.training import CPU

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "tests" / "shapes"
RESULTS = ROOT / "tests" / "results" / "shapes.json"
TABLE = ROOT / "docs" / "shapes.md"
FILES = ("loops", "kinds", "trainers", "others")
HEADINGS = {
    "loops": "Loops",
    "kinds": "Kinds of adapters",
    "trainers": "Trainers",
    "others": "Other models",
}


@dataclass(frozen=True)
class Outcome:
    """What came of one shape.

    ``differs``: what of losses, facts and files was not the same in some budget. ``loads``: blocks that were brought to
    the device in the least vram. ``said``: memplan's own lines in the least vram, or the line with which it refused.
    ``on``: when, at which commit and on what machine that was.
    """

    about: str
    is_served: bool
    differs: tuple[str, ...]
    loads: int
    said: tuple[str, ...]
    error: str = ""
    on: str = ""


def shapes(file: str) -> dict[str, str]:
    """Return the shapes of ``file`` and what each is about. It is read, not imported: that takes half a minute."""
    tree = ast.parse((SHAPES / f"{file}.py").read_text())
    functions = [part for part in tree.body if isinstance(part, ast.FunctionDef)]
    if file == "kinds":
        (kinds,) = (part for part in functions if part.name == "_kinds")
        (table,) = (part for part in ast.walk(kinds) if isinstance(part, ast.Dict))
        shown = zip(table.keys, table.values, strict=True)
        return {ast.literal_eval(key): f"`{ast.unparse(value.body)}`" for key, value in shown}
    own = [part for part in functions if not part.name.startswith("_") and part.name != "train"]
    return {part.name: ast.get_docstring(part) or part.name for part in own}


def run(file: str, shape: str, about: str, work: Path) -> Outcome:
    """Run one shape in ``work``, where models are kept between shapes."""
    code, said, plain = _process(file, shape, work, "plain", ())
    if code:
        return Outcome(about, False, (), 0, (), f"fails without memplan: {_last(said)}")
    _, said, _ = _process(file, shape, work, "least", ("--vram", "64KiB"))
    least = re.search(r"at least .* of vram \((\d+) bytes\)", said)
    budgets = [int(least[1]), int(least[1]) * 4 // 3] if least else [64 << 20]
    differs: list[str] = []
    loads, lines = 0, []
    for number, vram_bytes in enumerate(budgets):
        tag = f"run {number}"
        code, said, found = _process(file, shape, work, tag, ("--vram", f"{vram_bytes}B"))
        if code and not found:
            return Outcome(about, False, (), 0, tuple(_own(said)), _last(said))
        differs += [key for key in ("losses", "facts", "files") if plain[key] != found.get(key)]
        if number == 0:
            lines = _own(said)
            report = work / shape / f"{tag}.txt"
            counted = re.search(r"^ *([\d,]+) loads,", report.read_text(), re.M) if report.exists() else None
            loads = int(counted[1].replace(",", "")) if counted else 0
    served = (work / shape / "run 0.txt").exists()
    return Outcome(about, served, tuple(dict.fromkeys(differs)), loads, tuple(lines))


def _process(
    file: str, shape: str, work: Path, tag: str, options: tuple[str, ...]
) -> tuple[int, str, dict[str, object]]:
    """Run one process. Returns its exit code, its standard error, and what it left behind."""
    out = work / shape / tag
    command = [sys.executable, f"{file}.py", shape, str(out)]
    if options:
        hardware = work / "cpu.json"
        hardware.write_bytes(msgspec.json.encode(CPU))
        given = ("--ram", "64MiB", "--hardware", str(hardware), "--report", f"{out}.txt", *options)
        command = [sys.executable, "-m", "memplan", "run", *given, "--", *command]
    environment = {
        **os.environ, "SHAPES_MODELS": str(work / "models"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "160", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        command, cwd=SHAPES, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    result = out / "result.json"
    return done.returncode, done.stderr, json.loads(result.read_text()) if result.exists() else {}


def _own(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("memplan: ")]


def _last(said: str) -> str:
    errors = [line for line in said.splitlines() if re.match(r"[\w.]*(Error|Exception)\b|memplan: |Does not fit", line)]
    return errors[-1][:300] if errors else "".join(said.splitlines()[-1:])[:300]


def where() -> str:
    """Return date, commit and machine."""
    known = about()
    named = (known["date"], known["commit"], known["processor"], f"{known['cpus']} CPUs", f"torch {known['torch']}")
    return ", ".join(named)


def table(results: dict[str, Outcome]) -> str:
    """Return ``docs/shapes.md``."""
    served = sum(outcome.is_served and not outcome.differs for outcome in results.values())
    lines = [
        "# Shapes of training scripts",
        "",
        "Small scripts in the shapes that people write (`tests/shapes`), each run as it is, then under `memplan run` in"
        " the least vram",
        "that works and in a third more, on a CPU. *Same*: every loss, trained tensor, gradient and saved file is"
        " bit-identical in both.",
        f"Served and the same: {served} of {len(results)}. Written by `python -m tests.support.shapes`, on:",
        "",
        *(f"- {on} ({number} shapes)" for on, number in Counter(row.on for row in results.values()).items()),
    ]
    for file in FILES:
        rows = {name.partition(":")[2]: outcome for name, outcome in results.items() if name.startswith(f"{file}:")}
        if rows:
            lines += ["", f"## {HEADINGS[file]}", "", "| shape | what it does | result |", "|---|---|---|"]
            lines += [f"| `{name}` | {outcome.about} | {_result(outcome)} |" for name, outcome in rows.items()]
    return "\n".join(lines) + "\n"


def _result(outcome: Outcome) -> str:
    said = (outcome.error or " ".join(outcome.said)).removeprefix("memplan: ").replace("|", "\\|")
    if outcome.differs:
        return f"**differs**: {', '.join(outcome.differs)}"
    if outcome.is_served:
        return f"same; {outcome.loads} loads" if outcome.loads else "same"
    return f"not run: {said}" if outcome.error else f"unchanged: {said}"


def main() -> int:
    """Run what the command line names. Return 1 where a result differs or a script fails under memplan alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="FILE[:SHAPE]")
    parser.add_argument("--fresh", action="store_true", help="run all again")
    parser.add_argument("--work", type=Path, help="keep models and results here")
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = {name: msgspec.convert(row, Outcome) for name, row in known.items()}
    everything = {f"{file}:{name}": about for file in FILES for name, about in shapes(file).items()}
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(exist_ok=True)
        for name, what in everything.items():
            file, _, shape = name.partition(":")
            is_named = bool({name, file} & {*given.names})
            if not (is_named or (not given.names and (given.fresh or name not in results))):
                continue
            results[name] = replace(run(file, shape, what, work), on=where())
            print(f"{name}: {_result(results[name])}", flush=True)
            results = {key: results[key] for key in everything if key in results}
            RESULTS.write_text(json.dumps({key: asdict(row) for key, row in results.items()}, indent=1) + "\n")
    TABLE.write_text(table(results))
    return int(any(row.differs or row.error for row in results.values()))


if __name__ == "__main__":
    sys.exit(main())
