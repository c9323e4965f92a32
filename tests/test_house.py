"""The house: few files to a folder, each folder's way through it told, no circle of imports, and journeys that name
what there is.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memplan"
MOST_FILES = 14
FOLDERS = sorted({file.parent for file in PACKAGE.rglob("*.py")} - {PACKAGE / "trainers" / "startup"})


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> networkx.DiGraph:
    """Which file imports which, wherever in it, types' imports included. The package's own face counts for nobody."""
    files = {module_of(file): file for file in PACKAGE.rglob("*.py")}
    graph = networkx.DiGraph()
    for module, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [name if name in files else node.module for name in named]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            else:
                continue
            graph.add_edges_from((module, name) for name in found if name in files and name != module)
    graph.remove_node("memplan")
    return graph


def test_no_circle_of_imports():
    circles = [sorted(found) for found in networkx.strongly_connected_components(imports()) if len(found) > 1]
    assert not circles


@pytest.mark.parametrize("folder", FOLDERS, ids=module_of)
def test_a_folder_has_few_files_and_says_which(folder):
    files = [file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "__main__")]
    assert len(files) <= MOST_FILES
    if folder != PACKAGE and files:
        told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        untold = [name for name in files if not re.search(rf"``(?:\w+/)?{name}``", told)]
        assert not untold or len(files) < 4, (
            f"name {untold} in {folder.relative_to(ROOT)}/__init__.py, and what it is for"
        )


def test_tests_look_inside_a_handle_by_one_file():
    """So that what memplan renames within is renamed there alone."""
    reach = re.compile(r"\bhandle(_of\(\w+\))?\._[a-z]")
    files = [file for file in (ROOT / "tests").rglob("*.py") if reach.search(file.read_text(encoding="utf-8"))]
    assert [file.name for file in files] == ["inside.py"]


def test_one_file_of_run_knows_a_vendor():
    vendor = re.compile(r"torch\.(cuda|xpu|hip)\b|cudart|[\"']cuda[\"']|__cuda_array_interface__")
    known = {file for file in (PACKAGE / "run").rglob("*.py") if vendor.search(file.read_text(encoding="utf-8"))}
    # By name: which of torch's methods and attributes tell of a weight that is away.
    names = {PACKAGE / "run" / "access" / "away.py", PACKAGE / "run" / "access" / "metadata.py"}
    assert known - names == {PACKAGE / "run" / "transfer" / "device.py"}


JOURNEYS = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(memplan(?:\.\w+)+)`", JOURNEYS))))
def test_what_journeys_name_is_there(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return
    raise AssertionError(name)


def test_three_journeys_are_told():
    assert len(re.findall(r"^### .*journey", JOURNEYS, re.MULTILINE)) == 3
    assert len(re.findall(r"`memplan(?:\.\w+)+`", JOURNEYS)) > 30
