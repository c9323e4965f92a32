"""The command line: what it hands on, what it prints, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import memplan.api
from memplan.cli import main
from memplan.errors import DoesNotFitError, ModelError
from memplan.program.schema import Plan
from memplan.show import terminal
from memplan.units import GIB, MIB
from tests.show.plans import make_record, solve_plan

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def solved() -> Plan:
    return solve_plan()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, solved: Plan) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Let ``memplan.api.plan`` note how it is called and give ``solved``."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def fake(*args: Any, **kwargs: Any) -> Plan:
        seen.append((args, kwargs))
        return solved

    monkeypatch.setattr(memplan.api, "plan", fake)
    monkeypatch.delenv("COLUMNS", raising=False)
    return seen


def refuse(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fake(*args: object, **kwargs: object) -> Plan:
        raise error

    monkeypatch.setattr(memplan.api, "plan", fake)


def test_plan_hands_on_what_was_asked(calls: list[Any], capsys: pytest.CaptureFixture[str], solved: Plan) -> None:
    arguments = (
        "plan ./model --vram 6GiB --ram 24GiB --disk 100GB --page-lock 8GiB --lora-rank 8 --lora-targets "
        "q_proj,v_proj --batch 4 --seq 1024 --quantization nf4 --kbit --no-gradient-checkpointing --accumulation 2 "
        "--examples 100 --epochs 3 --dtype fp32 --attention eager --autocast fp16 --optimizer sgd --hardware "
        "rtx-3060 --pin model.layers.3=device --pin lm_head=host --activations offload --no-elastic"
    )
    assert main([*arguments.split(), "--margin", "512M", "--verbose"]) == 0
    assert callable(calls[0][1].pop("progress"))
    assert calls == [
        (
            ("./model", (4, 1024)),
            {
                "vram": 6 * GIB,
                "ram": 24 * GIB,
                "disk": 100 * 10**9,
                "page_lock": 8 * GIB,
                "adapter": {"rank": 8, "targets": ["q_proj", "v_proj"]},
                "dtype": "fp32",
                "attention": "eager",
                "quantization": "nf4",
                "kbit": True,
                "gradient_checkpointing": False,
                "autocast": "fp16",
                "accumulation": 2,
                "examples": 100,
                "epochs": 3,
                "optimizer": "sgd",
                "hardware": "rtx-3060",
                "pins": {"model.layers.3": "device", "lm_head": "host"},
                "activations": "offload",
                "elastic": False,
                "margin": 512 << 20,
            },
        )
    ]
    out, err = capsys.readouterr()
    assert out == terminal.text(solved)
    assert err == ""


def test_plan_without_options(calls: list[Any]) -> None:
    assert main(["plan", "./model"]) == 0
    ((args, kwargs),) = calls
    assert args == ("./model", (1,))  # 512 tokens, where the model reads text
    # What was not given is as the plan has it.
    assert callable(kwargs.pop("progress"))
    assert kwargs == {"adapter": {"rank": 16, "targets": "default"}, "dtype": "bf16"}


@pytest.mark.usefixtures("calls")
def test_plan_writes_its_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, solved: Plan) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", "./model", "--out", str(out)]) == 0
    assert f"The plan is in {out}." in capsys.readouterr().out
    assert Plan.load(out) == solved
    assert main(["plan", "./model", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == terminal.as_dict(solved)


def test_plan_into_no_folder_is_refused_before_the_work(
    calls: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", "./model", "--out", str(tmp_path / "no" / "plan.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert calls == []


def test_does_not_fit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    error = DoesNotFitError("no room", least_vram_bytes=3 * GIB, limited_by="the loss", suggestions=("--batch 2",))
    refuse(monkeypatch, error)
    assert main(["plan", "./model", "--vram", "1GiB"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Does not fit: no room.\n")
    assert "3.00 GiB" in err
    assert main(["plan", "./model", "--vram", "1GiB", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "fits": False,
        "message": "no room: the loss. To make it fit: --batch 2",
        "least_vram_bytes": 3 * GIB,
        "least_ram_bytes": None,
        "least_disk_bytes": None,
        "limited_by": "the loss",
        "suggestions": ["--batch 2"],
    }


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ("plan ./model --vram 6", "SizeError", "--vram was given as '6', which is not a size"),
        ("plan ./model --ram -1GiB", "SizeError", "--ram was given as"),
        ("plan ./model --disk 3Gib/s", "SizeError", "--disk was given as"),
        ("plan ./model --page-lock half", "SizeError", "--page-lock was given as"),
        ("demo --vram much", "SizeError", "--vram was given as 'much'"),
        ("plan ./model --batch 0", "BadParameter", "0 is not in the range"),
        ("plan ./model --pin layers.3", "BadParameter", "not BLOCK=TIER"),
        ("plan ./model --pin layers.3=cloud", "BadParameter", "device, host or disk"),
        ("plan ./model --pin a=host --pin a=disk", "BadParameter", "pinned to host and to disk"),
        ("plan ./model --autocast fp8", "BadParameter", "is not one of 'bf16', 'fp16'"),
        ("plan ./model --activations away", "BadParameter", "is not one of 'keep', 'recompute', 'offload'"),
        ("plan ./model --lora-targets ,", "BadParameter", "all-linear"),
        ("plan ./model --steps 0", "BadParameter", "0 is not in the range"),
        ("plan ./model --steps 3 --examples 9", "BadParameter", "give --steps or --examples, not both"),
        ("plan ./model --epochs 3", "BadParameter", "give --examples too"),
        ("plan ./model --vrm 6GiB", "NoSuchOption", "No such option"),
        ("plan", "MissingParameter", "MODEL"),
        ("report nowhere.json", "BadParameter", "does not exist"),
        ("fly", "NoSuchCommand", "No such command"),
    ],
)
def test_bad_input(calls: list[Any], capsys: pytest.CaptureFixture[str], arguments: str, kind: str, says: str) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in " ".join(err.split())
    assert "Traceback" not in err
    assert main([*arguments.split(), "--json"]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["error"] == kind or kind.startswith("NoSuch")
    assert says in answer["message"] or kind == "MissingParameter"
    assert err == ""
    assert calls == []


def test_error_of_the_planner_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, ModelError("./model has no config.json"))
    assert main(["plan", "./model"]) == 2
    assert capsys.readouterr() == ("", "memplan: ./model has no config.json\n")
    assert main(["plan", "./model", "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == {"error": "ModelError", "message": "./model has no config.json"}


def test_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners"))
    assert main(["plan", "./model"]) == 2
    assert "needs the package peft, " in capsys.readouterr().err
    refuse(monkeypatch, ModuleNotFoundError("No module named 'memplan.no'", name="memplan.no"))
    with pytest.raises(ModuleNotFoundError):
        main(["plan", "./model"])


def test_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, KeyboardInterrupt())
    assert main(["plan", "./model"]) == 130
    assert capsys.readouterr().err.strip() == "memplan: interrupted"


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path, solved: Plan) -> None:
    record = make_record(solved, pass_s=solved.prediction.pass_s * 1.1, extra_bytes=3 * MIB)
    solved.save(tmp_path / "plan.json")
    record.save(tmp_path / "record.json")
    files = [str(tmp_path / "plan.json"), str(tmp_path / "record.json")]
    assert main(["report", files[0]]) == 0
    assert capsys.readouterr().out == terminal.text(solved)
    assert main(["report", *files]) == 0
    assert capsys.readouterr().out == terminal.text(solved, record)
    assert main(["report", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == terminal.as_dict(solved, record)


def test_report_of_another_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, solved: Plan) -> None:
    solved.save(tmp_path / "plan.json")
    make_record(msgspec.structs.replace(solved, fingerprint="cd" * 32), pass_s=1.0).save(tmp_path / "record.json")
    arguments = ["report", str(tmp_path / "plan.json"), str(tmp_path / "record.json")]
    assert main(arguments) == 2
    assert "memplan: the record is of a run of another model" in capsys.readouterr().err
    assert main([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "PlanMismatchError"


def test_report_of_no_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 1')
    assert main(["report", str(tmp_path / "plan.json")]) == 2
    assert capsys.readouterr().err.startswith("memplan: ")
    assert main(["report", str(tmp_path / "plan.json"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "PlanFormatError"


def test_demo_hands_on_what_was_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, object]] = []

    def fake(**kwargs: object) -> int:
        seen.append(kwargs)
        return 1

    # In the place of memplan.demo, which imports torch.
    demo = ModuleType("memplan.demo")
    demo.run = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "memplan.demo", demo)
    monkeypatch.setattr(memplan, "demo", demo, raising=False)
    assert main(["demo"]) == 1
    assert main(["demo", "--vram", "300MiB", "--steps", "3", "--keep", str(tmp_path), "--json"]) == 1
    assert seen == [
        {"vram": None, "steps": None, "folder": None, "as_json": False},
        {"vram": "300MiB", "steps": 3, "folder": tmp_path, "as_json": True},
    ]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ((), ("plan",), ("report",), ("demo",)):
        assert main([*command, "--help"]) == 0
        assert "Usage: memplan" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert memplan.__version__ in capsys.readouterr().out


def test_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "memplan", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command" in done.stderr
