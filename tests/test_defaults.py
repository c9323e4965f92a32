"""Defaults of options in the environment and in a file, the names that are known, and the margin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan import api
from memplan.cli import main
from memplan.errors import InputError
from memplan.hardware import profile as profiles
from memplan.hardware.budgets import most_vram_bytes
from memplan.model import models
from memplan.units import GIB, MIB
from tests.show.plans import solve_plan
from tests.support.causal_types import config_of
from tests.support.training import CPU


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Run in an empty directory; note what ``memplan.api.plan`` is asked."""
    found: list[dict[str, Any]] = []

    def plan(*args: Any, **options: Any) -> Any:
        found.append({"args": args, **options})
        return solve_plan()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "plan", plan)
    return found


def test_the_command_line_goes_before_the_environment_and_that_before_a_file(
    asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "mine"\n\n[tool.memplan]\nvram = "6G"\nram = "20G"\nlora-rank = 8\nbatch = 4\nqlora = true\n'
        'pin = ["model.layers.3=device"]\n'
    )
    monkeypatch.setenv("MEMPLAN_RAM", "30G")
    monkeypatch.setenv("MEMPLAN_GPU", "4090")
    monkeypatch.setenv("MEMPLAN_VRAM", "7G")
    assert main(["plan", "llama-3.1-8b", "--vram", "8G"]) == 0
    (said,) = asked
    assert said["args"] == ("llama-3.1-8b", (4,))
    assert (said["vram"], said["ram"]) == (8 * GIB, 30 * GIB)
    assert said["adapter"]["rank"] == 8
    assert said["hardware"] == "4090"
    assert said["qlora"] is True
    assert said["pins"] == {"model.layers.3": "device"}
    assert "from pyproject.toml: " in capsys.readouterr().err


def test_memplan_toml_goes_before_pyproject(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.memplan]\nvram = "6G"\n')
    (tmp_path / "memplan.toml").write_text('vram = "9G"\n')
    assert main(["plan", "llama-3.1-8b"]) == 0
    assert asked[0]["vram"] == 9 * GIB


def test_a_project_that_says_nothing_of_memplan_changes_nothing(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.other]\nvram = 3\n")
    assert main(["plan", "llama-3.1-8b"]) == 0
    (tmp_path / "pyproject.toml").write_text("this is [ no TOML\n")
    assert main(["plan", "llama-3.1-8b"]) == 0
    assert "vram" not in asked[0]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('vramm = "6G"\n', "'vramm', which is no option; near it: vram"),
        ("vram = {a = 1}\n", "give text, a number, true or false, or a list"),
        ('vram = "6 parsecs"\n', "is not a size"),
        ("lora-rank = 0\n", "lora-rank"),
        ("vram = [\n", "memplan.toml cannot be read"),
    ],
)
def test_a_slip_in_the_file_is_refused(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "memplan.toml").write_text(text)
    assert main(["plan", "llama-3.1-8b"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert asked == []


def test_models_and_hardware_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in models.table())
    assert main(["models", "qwen3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert found == {
        name: {"hub": one.hub, "parameters": one.parameters} for name, one in models.table().items() if "qwen3" in name
    }
    assert main(["hardware"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in profiles.names())
    assert main(["hardware", "RTX 4090", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["hardware"]) == ["rtx-4090"]
    assert main(["hardware", "4O90"]) == 2
    assert "near it: rtx-4090" in capsys.readouterr().err
    assert main(["models", "lamma-3.1-8b"]) == 2
    assert "near it: llama-3.1-8b" in capsys.readouterr().err


def test_the_margin_is_left_free() -> None:
    options: dict[str, Any] = {"adapter": {"rank": 4, "targets": "all-linear"}, "hardware": CPU, "ram": "1GiB"}
    whole = memplan.plan(config_of("llama"), (2, 16), vram="64MiB", **options)
    less = memplan.plan(config_of("llama"), (2, 16), vram="64MiB", margin="16MiB", **options)
    assert less.budgets.vram_bytes == whole.budgets.vram_bytes - 16 * MIB == 48 * MIB
    assert any("16.0 MiB are left free" in note for note in less.notes)
    assert less.least_vram_bytes == whole.least_vram_bytes
    with pytest.raises(InputError, match=r"leaves nothing of the vram of 64\.0 MiB"):
        memplan.plan(config_of("llama"), (2, 16), vram="64MiB", margin="64MiB", **options)


def test_the_least_vram_of_a_plan_is_what_a_refusal_says() -> None:
    options: dict[str, Any] = {"adapter": {"rank": 4, "targets": "all-linear"}, "hardware": CPU, "ram": "1GiB"}
    plan = memplan.plan(config_of("llama"), (2, 16), vram="64MiB", **options)
    assert plan.least_vram_bytes is not None
    with pytest.raises(memplan.DoesNotFitError) as refused:
        memplan.plan(config_of("llama"), (2, 16), vram=plan.least_vram_bytes - 512, **options)
    assert refused.value.least_vram_bytes == plan.least_vram_bytes
    memplan.plan(config_of("llama"), (2, 16), vram=plan.least_vram_bytes, **options)


def test_a_card_of_24_gb_may_have_24_gib() -> None:
    assert most_vram_bytes(profiles.load("rtx-4090")) == 24 * GIB
