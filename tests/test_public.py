"""What is public, and that reading a plan stays light: subprocesses say which modules were imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import memplan
from memplan import errors

ROOT = Path(__file__).parents[1]

PUBLIC = [
    "Call",
    "CheckpointError",
    "DoesNotFitError",
    "Handle",
    "HardwareError",
    "InputError",
    "MemplanError",
    "ModelError",
    "MovedWeightsError",
    "Plan",
    "PlanCheckError",
    "PlanError",
    "PlanFormatError",
    "PlanMismatchError",
    "PlanOptions",
    "RunError",
    "RunRecord",
    "SizeError",
    "StrayReadError",
    "TooSlowError",
    "TransferError",
    "__version__",
    "attach",
    "fit",
    "frontier",
    "handle_of",
    "load",
    "materialise",
    "memory_timeline",
    "placing",
    "plan",
    "report",
    "wrap",
]


def imported_by(code: str, *arguments: str) -> set[str]:
    """Return the modules that a fresh interpreter holds after ``code``."""
    code += "\nimport sys\nprint(chr(10).join(['MODULES', *sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    return set(done.stdout.partition("MODULES\n")[2].split())


def test_all_is_this_list_and_sorted() -> None:
    assert memplan.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


def test_every_public_name_is_there() -> None:
    for name in PUBLIC:
        assert getattr(memplan, name) is not None
    assert set(PUBLIC) <= set(dir(memplan))
    for name in ("attach", "materialise", "memory_timeline", "placing", "plan", "report", "wrap"):
        assert callable(getattr(memplan, name))


def test_every_error_is_public() -> None:
    tree = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert tree <= set(PUBLIC)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'plans'"):
        memplan.plans  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    assert memplan.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_import_is_light() -> None:
    heavy = {"torch", "networkx", "rich", "click", "msgspec", "numpy"}
    assert not heavy & imported_by("import memplan; memplan.DoesNotFitError")


def test_plan_and_record_are_light() -> None:
    assert not {"torch", "networkx", "rich"} & imported_by("import memplan; memplan.Plan, memplan.RunRecord")


def test_report_command_is_light(plan_file: Path) -> None:
    code = "import sys; from memplan.cli import main; assert main(sys.argv[1:]) == 0"
    modules = imported_by(code, "report", str(plan_file))
    assert "rich" in modules
    assert not {"torch", "networkx", "numpy", "scipy", "transformers", "psutil"} & modules
    assert "rich" not in imported_by(code, "report", str(plan_file), "--json")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    from tests.show.plans import solve_plan

    solve_plan().save(tmp_path / "plan.json")
    return tmp_path / "plan.json"
