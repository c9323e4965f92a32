"""The documents: their Python compiles, what is marked to run runs, and what they name is there.

A block of Python after a line ``<!-- run -->`` is run; those of one file run in order, each in a process of its own, in
one empty folder.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memplan.cli import group

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "stages").glob("*.md")])
BLOCK = re.compile(r"^(?P<run><!-- run -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def blocks(file: Path, language: str) -> list[re.Match[str]]:
    return [match for match in BLOCK.finditer(file.read_text(encoding="utf-8")) if match["language"] == language]


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_python_compiles(file: Path) -> None:
    for block in blocks(file, "python"):
        compile(block["text"], name(file), "exec", dont_inherit=True)


MARKED = [file for file in FILES if "<!-- run -->" in file.read_text(encoding="utf-8")]
QUICK = ("README.md",)


@pytest.mark.parametrize(
    "file", [f if name(f) in QUICK else pytest.param(f, marks=pytest.mark.full) for f in MARKED], ids=name
)
def test_what_is_marked_runs(file: Path, tmp_path: Path) -> None:
    marked = [block for block in blocks(file, "python") if block["run"]]
    assert len(marked) == file.read_text(encoding="utf-8").count("<!-- run -->"), "a mark stands before no block"
    for block in marked:
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block["text"]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, f"{block['text']}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


@pytest.mark.parametrize("file", FILES, ids=name)
def test_commands_and_options_are_there(file: Path) -> None:
    for block in blocks(file, "console"):
        for line in re.findall(r"^\$ memplan (.*)$", block["text"], re.MULTILINE):
            command, *words = line.partition(" -- ")[0].split()
            known = {option for parameter in group.commands[command].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("file", FILES, ids=name)
def test_make_targets_are_there(file: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ +)make ([\w-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_the_blocks_are_found() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 5
    assert len(blocks(ROOT / "README.md", "console")) == 4
