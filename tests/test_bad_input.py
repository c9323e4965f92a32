"""Bad input, one by one: a clear error of our own tree, and the model exactly as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from msgspec.structs import replace

import memplan
from memplan.cli import main
from memplan.errors import (
    CheckpointError,
    DoesNotFitError,
    HardwareError,
    InputError,
    MemplanError,
    ModelError,
    PlanCheckError,
    PlanFormatError,
    PlanMismatchError,
    SizeError,
)
from memplan.model.checkpoint import read_checkpoint
from memplan.model.names import canonical
from tests.run.test_attach import assert_unchanged, state
from tests.support.training import CPU, batch_of, make


def planned(model, **arguments):
    return memplan.plan(model, batch_of("llama"), **{"vram": "1GiB", "ram": "1GiB", "hardware": CPU, **arguments})


@pytest.fixture
def model():
    return make("llama")


def refused(model, error, message, act):
    before = state(model)
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        act()
    assert isinstance(caught.value, MemplanError)
    assert_unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), rng)
    return caught.value


def test_a_budget_that_is_too_small(model):
    error = refused(model, DoesNotFitError, "of vram; the budget is 100.0 KiB", lambda: planned(model, vram="100KiB"))
    assert error.least_vram_bytes > 100 * 2**10
    assert "activations" in error.limited_by
    assert error.suggestions
    planned(model, vram=error.least_vram_bytes)
    with pytest.raises(DoesNotFitError):
        planned(model, vram=error.least_vram_bytes - 1)


@pytest.mark.each_value
@pytest.mark.parametrize("size", ["12 apples", float("nan"), -1, "-3GiB", ""])
@pytest.mark.parametrize("budget", ["vram", "ram", "disk"])
def test_sizes(model, budget, size):
    refused(model, SizeError, f"{budget} was given as", lambda: planned(model, **{budget: size}))


@pytest.mark.parametrize("given", ["fp8", "float32", ""])
def test_autocast_to_what_is_none(model, given):
    refused(model, InputError, "autocast was given as .*: give one of", lambda: planned(model, autocast=given))


def test_unknown_hardware(model):
    refused(model, HardwareError, "rtx-9999", lambda: planned(model, hardware="rtx-9999"))


def test_no_frozen_parameters(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    refused(model, ModelError, "frozen", lambda: planned(model))


def test_nothing_to_train(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    refused(model, ModelError, "train", lambda: planned(model))


def test_hooked_by_accelerate():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    plan = planned(make("llama"))
    hooked = make("llama")
    add_hook_to_module(hooked.get_base_model().model.layers[1], AlignDevicesHook(execution_device="cpu"))
    refused(hooked, ModelError, "accelerate", lambda: planned(hooked))
    refused(hooked, ModelError, "accelerate", lambda: memplan.attach(hooked, plan))


def test_a_plan_before_its_model(model):
    plan = planned(model)
    refused(model, InputError, "give the model first", lambda: memplan.attach(plan, model))
    refused(model, InputError, "give the model first", lambda: memplan.attach(model, "plan.json"))


def test_a_plan_for_another_model(model):
    other = make("gpt2")
    refused(other, PlanMismatchError, "for another model", lambda: memplan.attach(other, planned(model)))


@pytest.mark.quick("truncated")
@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda text: text[: len(text) // 2], PlanFormatError),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 99'), PlanFormatError),
        (lambda text: "[]", PlanFormatError),
        (
            lambda text: json.dumps(json.loads(text) | {"budgets": {"vram_bytes": 5, "ram_bytes": 5, "disk_bytes": 0}}),
            PlanCheckError,
        ),
    ],
    ids=["truncated", "version", "no plan", "over budget"],
)
def test_plan_files(model, tmp_path, edit, error, capsys):
    planned(model).save(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(edit((tmp_path / "plan.json").read_text()))
    refused(model, error, ".", lambda: memplan.attach(model, memplan.Plan.load(tmp_path / "plan.json")))
    assert main(["report", str(tmp_path / "plan.json")]) == 2
    assert capsys.readouterr().err.startswith("memplan: ")


@pytest.mark.quick("truncated")
@pytest.mark.parametrize("broken", ["truncated", "unreadable", "changed"])
def test_weights_on_disk(model, tmp_path, broken):
    """The plan reads the model's own files; what is wrong with one of them is said, with the file's name."""
    model.get_base_model().save_pretrained(tmp_path / "model")
    plan = planned(model, disk="1GiB", pins={"layers.2": "disk"})
    plan = replace(plan, budgets=replace(plan.budgets, disk_bytes=None))
    file = tmp_path / "model" / "model.safetensors"
    if broken == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif broken == "unreadable":
        shutil.rmtree(tmp_path / "model")
    else:  # one flipped bit in the block makes the file not the model's
        tensors = {canonical(name): tensor for name, tensor in read_checkpoint(tmp_path / "model").items()}
        stored = tensors["model.layers.2.mlp.up_proj.weight"]
        data = bytearray(file.read_bytes())
        data[stored.file_offset_bytes + 5] ^= 1
        file.write_bytes(data)
    refused(model, CheckpointError, ".", lambda: memplan.attach(model, plan, checkpoint=tmp_path / "model"))


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000: more than 4096"),
        ({"hidden_size": 10**12}, "cannot build a LlamaConfig model"),
        ({"hidden_size": -64}, "cannot build a LlamaConfig model"),
    ],
    ids=["layers", "width", "negative"],
)
def test_configurations_with_absurd_sizes(tmp_path, capsys, figures, message):
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 128} | figures
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--hardware", "t4", "--vram", "8GiB"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps were given as 0: give a whole number"),
        ({"examples": 2.5}, "examples were given as 2.5"),
        ({"epochs": 3}, "epochs were given without the examples"),
        ({"steps": 3, "examples": 4}, "give one of the two"),
        ({"examples": 4}, "the batch is no shape.*give steps, or batch as"),
    ],
)
def test_a_run_that_cannot_be_counted(model, given, message):
    refused(model, InputError, message, lambda: planned(model, **given))
