"""The documents: their Python compiles, and what they name is there. ``test_docs_code`` runs it."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import memplan
from memplan.cli import group
from memplan.request import NAMES
from memplan.run.attach import attach
from tests.support.pages import ROOT, blocks, docs_script

gains, reference = docs_script("gains"), docs_script("reference")
FILES = sorted([*ROOT.glob("*.md"), *(f for f in (ROOT / "docs").rglob("*.md") if "_build" not in f.parts)])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HOSTED = re.compile(r"https://github\.com/memplan/memplan/(?:blob|raw|tree)/main/([\w./-]+)")


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_python_compiles(file: Path) -> None:
    for block in blocks(file):
        if block.language == "python":
            compile(block.text, name(file), "exec", dont_inherit=True)


def anchors(file: Path) -> set[str]:
    """Return what headings of a page are linked by, on GitHub and by Sphinx alike."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_links_lead_somewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for target, anchor in LINK.findall(text):
        page = file.parent / target if target else file
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), f"{target}#{anchor}"
    for target in HOSTED.findall(text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("file", FILES, ids=name)
def test_commands_and_options_are_there(file: Path) -> None:
    for block in blocks(file):
        for line in re.findall(r"^\$ memplan (.*)$", block.text, re.MULTILINE):
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
    text = re.sub(r"benchmarks/\w+\.py(?: --[\w-]+)*", "", text)  # they have options of their own
    wrong = [option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if option not in options_of(group)]
    for command, rest in re.findall(r"memplan ([a-z]+)((?: +(?:--[a-z][\w-]*|[A-Z]+|\S+\.json))+)", text):
        known = options_of(group.commands[command]) if command in group.commands else set()
        wrong += [f"memplan {command} {word}" for word in re.findall(r"--[a-z][\w-]*", rest) if word not in known]
    wrong += [f"memplan {one}" for one in re.findall(r"`memplan ([a-z]+)", text) if one not in group.commands]
    for path in re.findall(r"(?<![\w./-])memplan\.((?:\w+\.)*\w+)", text):
        if not path.endswith(("json", "py", "toml")) and not there(path):
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
    assert [block.language for block in blocks(ROOT / "README.md")].count("console") == 3


def test_readme_is_short_and_links_wherever_it_is_shown() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 800
    assert not LINK.findall(text), "a package index shows it too: absolute links alone"


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 800


def test_readme_has_the_predicted_gains() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert gains.filled(text, "gains", gains.table(json.loads(gains.KEPT.read_text()))) == text, (
        "run: python docs/gains.py"
    )


@pytest.mark.full
@pytest.mark.parametrize("case", gains.CASES)
def test_gains_are_predicted_today(case: str) -> None:
    kept, found = json.loads(gains.KEPT.read_text())[case], gains.planned(case)
    assert found == {
        key: pytest.approx(value, rel=0.005) if type(value) is not str else value for key, value in kept.items()
    }


@pytest.mark.full
def test_the_tutorial_has_what_its_command_prints() -> None:
    text = gains.TUTORIAL.read_text(encoding="utf-8")
    assert gains.filled(text, "screen", gains.screen()) == text, "run: python docs/gains.py"


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_reference_is_the_codes(page: str) -> None:
    committed = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert committed == reference.PAGES[page](), "run: python docs/reference.py"


def test_each_parameter_of_a_public_function_is_explained() -> None:
    for called in (getattr(memplan, one) for one in memplan.__all__ if inspect.isfunction(getattr(memplan, one))):
        value = attach if called is memplan.attach else called
        names = [one.removesuffix("_") for one in inspect.signature(value).parameters]
        assert set(names) == set(reference.parameters_of(value)), value
