"""The documents: their Python compiles, what is marked to run runs, and what they name is there.

A block of Python after a line ``<!-- run -->`` is run; those of one file run in order, each in a process of its own, in
one empty folder.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import memplan
from memplan.cli import group
from memplan.request import NAMES
from memplan.run.attach import attach

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


def texts() -> Iterator[tuple[str, str]]:
    """Yield every text within memplan, messages and docstrings alike, with where it stands; fields of f-strings are
    left out.
    """
    for file in sorted((ROOT / "memplan").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            where = f"{name(file)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                yield (
                    where,
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values),
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield where, node.value
    for file in sorted((ROOT / "memplan").rglob("*.html")):
        yield name(file), file.read_text(encoding="utf-8")


def options_of(command: click.Command) -> set[str]:
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help", "--version"}, *map(options_of, inner))


def wrong_in(text: str) -> list[str]:
    """Return what a text recommends and is not there: options, commands, names and arguments of memplan, extras."""
    wrong = [option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if option not in options_of(group)]
    for command, rest in re.findall(r"memplan ([a-z]+)((?: +(?:--[a-z][\w-]*|[A-Z]+|\S+\.json))+)", text):
        known = options_of(group.commands[command]) if command in group.commands else set()
        wrong += [f"memplan {command} {word}" for word in re.findall(r"--[a-z][\w-]*", rest) if word not in known]
    wrong += [f"memplan {one}" for one in re.findall(r"`memplan ([a-z]+)", text) if one not in group.commands]
    for path in re.findall(r"(?<![\w./-])memplan\.((?:\w+\.)*\w+)", text):
        if not path.endswith(("json", "py")) and not there(path):
            wrong.append(f"memplan.{path}")
    for called, keyword in re.findall(r"(?<![\w.])(?:memplan\.)?(\w+)\(\.\.\., (\w+)=", text):
        function = getattr(memplan, called, None)
        taken = set(inspect.signature(attach if called == "attach" else function).parameters if function else {})
        if keyword not in (taken | set(NAMES) if "options" in taken else taken):
            wrong.append(f"{called}(..., {keyword}=)")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wrong += [f"memplan[{extra}]" for extra in re.findall(r"memplan\[(\w+)\]", text) if extra not in extras]
    return wrong


def there(path: str) -> bool:
    """Whether a dotted name within memplan is a module or stands in one."""
    found: object = memplan
    for index, part in enumerate(path.split(".")):
        if not hasattr(found, part):
            try:
                importlib.import_module("memplan." + ".".join(path.split(".")[: index + 1]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.full
def test_what_messages_recommend_is_there() -> None:
    found = {where: wrong for where, text in texts() if (wrong := wrong_in(text))}
    assert found == {}


@pytest.mark.parametrize(
    "text",
    ["or memplan run --traced", "--no-such", "give memplan report plan.json --out x", "attach(..., traces=True)",
     "`memplan fly`", "memplan.replan(x)", "memplan.show.nothing", "pip install 'memplan[all]'"],
)  # fmt: skip
def test_what_is_not_there_is_found(text: str) -> None:
    assert wrong_in(text)


@pytest.mark.parametrize("file", FILES, ids=name)
def test_make_targets_are_there(file: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^ +)make ([\w-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_the_blocks_are_found() -> None:
    assert len(blocks(ROOT / "README.md", "python")) >= 5
    assert len(blocks(ROOT / "README.md", "console")) == 4
