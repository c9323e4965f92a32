"""Graphs are kept by all that they follow from, and a plan from one needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import memplan
from memplan.analyze import graph_cache as kept
from memplan.analyze.trace import trace
from memplan.errors import ModelError
from memplan.hardware.profile import save
from tests.support.graphs import analyze_once
from tests.support.training import CPU

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 64}
GIVEN = {"adapter": {"rank": 2}, "vram": "1GiB", "ram": "1GiB", "hardware": CPU}


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "ours", True)
    monkeypatch.chdir(tmp_path)  # where a model lies is part of it
    LlamaConfig(**SMALL).save_pretrained("model")
    return Path("model")


@pytest.fixture(autouse=True)
def traces(monkeypatch):
    """How often a graph was asked for: which one it is, is for other tests."""
    seen = []
    monkeypatch.setattr(trace, "analyze", lambda *args, **options: seen.append(args) or analyze_once(*args, **options))
    return seen


def test_once_for_all_plans_alike(model, traces):
    first = memplan.plan(model, (1, 8), **GIVEN)
    assert memplan.plan(str(model), (1, 8), **GIVEN) == first
    assert memplan.plan(model / "config.json", (1, 8), **GIVEN) == first
    less = memplan.plan(model, (1, 8), **{**GIVEN, "vram": "900KiB"})  # other budgets, the same graph
    assert less.table == first.table
    assert len(traces) == 1


@pytest.mark.quick("batch", "optimizer")
@pytest.mark.parametrize(
    "other",
    [
        {"batch": (2, 8)},
        {"adapter": {"rank": 4}},
        {"accumulation": 2},
        {"optimizer": "sgd"},
        {"attention": "eager"},
        pytest.param({"autocast": "bf16"}, marks=pytest.mark.full),
        pytest.param({"dtype": "bf16"}, marks=pytest.mark.full),
        pytest.param({"quantization": "int8"}, marks=pytest.mark.full),
        pytest.param({"activations": "offload"}, marks=pytest.mark.full),
    ],
    ids=lambda other: next(iter(other)),
)
def test_anything_else_is_another(model, traces, other):
    memplan.plan(model, (1, 8), **GIVEN)
    given = {**GIVEN, **other}
    memplan.plan(model, given.pop("batch", (1, 8)), **given)
    assert len(traces) == 2


def test_another_configuration_is_another(model, traces):
    memplan.plan(model, (1, 8), **GIVEN)
    LlamaConfig(**{**SMALL, "num_hidden_layers": 4}).save_pretrained(model)
    assert sum(block.kind == "layer" for block in memplan.plan(model, (1, 8), **GIVEN).table.blocks) == 4
    monkey = {**json.loads((model / "config.json").read_text()), "hidden_size": -3}
    (model / "config.json").write_text(json.dumps(monkey))
    with pytest.raises(ModelError):
        memplan.plan(model, (1, 8), **GIVEN)


def test_what_is_no_file_is_not_kept(model, traces, tmp_path):
    config = LlamaConfig(**SMALL)
    for _ in range(2):
        memplan.plan(config, (1, 8), **GIVEN)
        memplan.plan(
            model, {"input_ids": torch.ones(1, 8, dtype=torch.long)}, loss=lambda out: out.logits.sum(), **GIVEN
        )
    assert len(traces) == 4
    assert not list((tmp_path / "cache").rglob("graphs/*"))


def test_in_a_process_of_someone_elses_nothing_is_kept(model, traces, monkeypatch, tmp_path):
    """Its libraries may be patched, its contexts count."""
    memplan.plan(model, (1, 8), **GIVEN)
    monkeypatch.setattr(kept, "ours", False)
    memplan.plan(model, (1, 8), **GIVEN)
    assert len(traces) == 2


def test_a_folder_that_may_only_be_read(model, traces, monkeypatch):
    first = memplan.plan(model, (1, 8), **GIVEN)
    monkeypatch.setattr(kept.os, "utime", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert memplan.plan(model, (1, 8), **GIVEN) == first
    assert len(traces) == 1


def test_a_spoilt_file_is_as_none(model, traces, tmp_path):
    first = memplan.plan(model, (1, 8), **GIVEN)
    (file,) = (tmp_path / "cache" / "graphs").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert memplan.plan(model, (1, 8), **GIVEN) == first
    assert len(traces) == 2


def test_the_oldest_go(model, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "MOST", 2)
    for length in (8, 9, 10):
        memplan.plan(model, (1, length), **GIVEN)
    assert len(list((tmp_path / "cache" / "graphs").iterdir())) == 2


def test_a_folder_that_cannot_be_written(model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "file"))
    assert memplan.plan(model, (1, 8), **GIVEN)


@pytest.mark.full
def test_the_command_opens_no_torch_then(model, tmp_path):
    save(CPU, tmp_path / "cpu.json")
    command = [
        "plan",
        str(model),
        "--vram",
        "1GiB",
        "--ram",
        "1GiB",
        "--hardware",
        str(tmp_path / "cpu.json"),
        "--json",
    ]
    code = (
        "import sys; from memplan.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, "
        "file=sys.stderr); sys.exit(code)"
    )
    runs = [subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr.strip().endswith(end) for run, end in zip(runs, ("True", "False"), strict=True)] == [True, True]
