"""The package as it is published: built, installed in a fresh environment, and used as the tutorial says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path

import msgspec
import pytest

from tests.support import pages
from tests.support.pages import ROOT
from tests.support.training import CPU
from tests.trainers.small import save_small_qwen

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=3000, check=False,
        env={**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def fresh(folder: Path) -> Path:
    """Return the Python of a new environment."""
    run(sys.executable, "-m", "venv", folder, folder=folder.parent)
    return folder / "bin" / "python"


def install(python: Path) -> tuple[object, ...]:
    return (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and a source archive."""
    folder = tmp_path_factory.mktemp("dist")
    python = fresh(folder / "builder")
    run(*install(python), "build", folder=folder)
    run(python, "-m", "build", "--outdir", folder, ROOT, folder=folder)
    return folder


@pytest.mark.full
def test_what_the_wheel_holds(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        told = message_from_string(archive.read(f"memplan-{PROJECT['version']}.dist-info/METADATA").decode())
        for path in sorted((ROOT / "schemas").iterdir()):
            schema = json.loads(archive.read(f"memplan/_schemas/{path.name}"))
            assert schema["$id"].endswith(f"/schemas/{path.name}")
    assert {f"memplan/_profiles/{path.name}" for path in (ROOT / "profiles").iterdir()} <= set(names)
    assert "memplan/py.typed" in names
    assert not [name for name in names if not name.startswith(("memplan/", "memplan-"))]
    needed = [one for one in told.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert {"transformers", "peft"} <= {one.split(">")[0] for one in needed}
    assert str(told.get_payload()).startswith("# memplan")
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "docs/tutorial.md", "examples/free_t4.ipynb"} <= held


@pytest.mark.full
def test_a_fresh_environment_goes_from_install_to_a_merged_model(built: Path, tmp_path: Path) -> None:
    """With the tutorial's own words. Needs the package registry."""
    folder, small = tmp_path / "work", tmp_path / "qwen"
    python, (wheel,) = fresh(tmp_path / "venv"), built.glob("*.whl")
    memplan = python.parent / "memplan"
    run(*install(python), wheel, folder=tmp_path)
    folder.mkdir()
    assert run(memplan, "--version", folder=folder).strip().endswith(PROJECT["version"])
    said = ("plan", "llama-3.2-1b", "--vram", "8GiB", "--ram", "8GiB", "--hardware", "t4", "--json")
    plan = json.loads(run(memplan, *said, folder=folder, MEMPLAN_CACHE=str(tmp_path / "cache")))
    assert plan["fits"]
    assert plan["peaks"]["vram_bytes"] <= 8 << 30
    run(*install(python), f"{wheel}[trl]", folder=tmp_path)
    small.mkdir()
    save_small_qwen(small)
    (folder / "cpu.json").write_bytes(msgspec.json.encode(CPU))
    swaps = pages.tutorial_swaps(small, folder)
    caches = {"MEMPLAN_CACHE": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "rows"), "PYTHONPATH": ""}
    told = pages.run(ROOT / "docs" / "tutorial.md", folder, swaps, python=str(python), **caches)
    assert any("streamed" in one.output for one in told)
    assert (folder / "merged" / "model.safetensors").is_file()


@pytest.mark.full
def test_the_documents_build_without_a_warning(tmp_path: Path) -> None:
    """Needs the package registry."""
    python = fresh(tmp_path / "venv")
    run(*install(python), *(one.split(">")[0] for one in PROJECT["optional-dependencies"]["docs"]), folder=tmp_path)
    run(python, "-m", "sphinx", "--fail-on-warning", "--quiet", ROOT / "docs", tmp_path / "out", folder=tmp_path)
    pages = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.html")}
    assert {"tutorial.html", "howto/budget.html", "reference/python.html", "alternatives.html"} <= pages


def test_what_is_said_of_the_project_agrees() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {PROJECT['version']}\n" in cited
    assert f"license: {PROJECT['license']}\n" in cited
    assert f"repository-code: {PROJECT['urls']['Homepage']}\n" in cited
    tried = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for classifier in PROJECT["classifiers"]:
        kind, _, version = classifier.rpartition(" :: ")
        if kind == "Programming Language :: Python" and version[0].isdigit():
            assert f'"{version}"' in tried
            assert f"python{version}" in makefile
