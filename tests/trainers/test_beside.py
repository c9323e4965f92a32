"""All models of a process share one budget: those that are trained, and those that are only read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from memplan import api
from memplan.errors import DoesNotFitError
from memplan.trainers.hf_trainer import put_under
from memplan.trainers.loading.deferred_placement import ask, wait
from memplan.trainers.other_models import Scope, name_of
from memplan.units import MIB
from tests.support.training import CPU
from tests.trainers.conftest import exact, least_vram

TWO = Path(__file__).with_name("script_two.py")
IDS = torch.tensor([[3, 4, 5, 6] * 4])
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.fixture
def model(checkpoint):
    made = LlamaForCausalLM.from_pretrained(checkpoint)
    return get_peft_model(made, LoraConfig(r=4, target_modules="all-linear")).train()


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def given(scope, model, more=(), **options):
    """What a plan within the scope would be made with."""
    seen = []

    def planned(within):
        seen.append(within)
        raise DoesNotFitError("it", least_vram_bytes=None, limited_by="nothing", suggestions=())

    with pytest.raises(DoesNotFitError):
        scope.plan(model, planned, {"vram": "8MiB", "ram": "8MiB", **options}, more)
    return seen[0]


def test_alone_it_has_all(model):
    scope = Scope()
    scope.loaded.add(model.get_base_model())
    assert given(scope, model, hardware=CPU) == {"vram": "8MiB", "ram": "8MiB", "hardware": CPU}


def test_what_is_only_read_takes_room_where_it_lies(model, checkpoint):
    scope, teacher = Scope(), LlamaForCausalLM.from_pretrained(checkpoint)
    for loaded in (False, True):  # held by a trainer, or loaded by from_pretrained
        more = [] if loaded else [teacher, model]
        if loaded:
            scope.loaded.add(teacher)
        rest = 8 * MIB - bytes_of(teacher)
        assert given(scope, model, more, hardware=CPU) == {"vram": 8 * MIB, "margin": 0, "ram": rest, "hardware": CPU}
        assert given(scope, model, more, hardware="t4") == {"vram": 8 * MIB, "margin": 0, "ram": rest, "hardware": "t4"}
    ask(teacher, torch.device("cuda"))
    assert given(scope, model, hardware="t4") == {"vram": rest, "margin": 0, "ram": 8 * MIB, "hardware": "t4"}
    assert given(scope, model, hardware="t4", vram=1000, ram=0) == {"vram": 0, "margin": 0, "ram": 0, "hardware": "t4"}
    del teacher
    assert given(scope, model, hardware="t4")["vram"] == "8MiB"


def test_what_waits_to_be_trained_takes_none_yet(model, checkpoint):
    scope = Scope()
    other = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules=["q_proj"]))
    wait(other, lambda *call: None)
    scope.loaded |= {other, other.get_base_model()}
    assert given(scope, model, hardware=CPU)["ram"] == "8MiB"
    assert scope.trained_beside(model) == [other]
    assert scope.trained_beside(other) == []


def test_what_is_under_a_plan_takes_what_that_predicts(model, checkpoint):
    scope = Scope()
    other = get_peft_model(LlamaForCausalLM.from_pretrained(checkpoint), LoraConfig(r=4, target_modules=["q_proj"]))
    handle = put_under(other, api.plan(other, BATCH, vram="1100KiB", ram="8MiB", hardware=CPU), scope)
    peaks = handle.plan.prediction.peaks
    assert peaks.ram_bytes > 0
    expected = {"vram": 8 * MIB - peaks.vram_bytes, "margin": 0, "ram": 8 * MIB - peaks.ram_bytes, "hardware": CPU}
    assert given(scope, model, hardware=CPU) == expected

    def planned(options):
        return api.plan(model, BATCH, **options)

    options = {"vram": "1500KiB", "ram": "8MiB", "hardware": CPU}
    with pytest.raises(DoesNotFitError) as refused:
        scope.plan(model, planned, options)
    for named in (name_of(model), name_of(other), "1.5 MiB of vram", f"({refused.value.least_vram_bytes} bytes)"):
        assert named in str(refused.value)
    plan = scope.plan(model, planned, {**options, "vram": refused.value.least_vram_bytes})
    assert f"{name_of(other)} beside this model takes" in plan.notes[-1]
    assert plan.prediction.peaks.vram_bytes + peaks.vram_bytes <= refused.value.least_vram_bytes
    scope.loaded.add(other)
    assert given(scope, model, hardware=CPU) == expected
    handle.detach()
    assert given(scope, model, hardware=CPU)["ram"] == 8 * MIB - bytes_of(other)


@pytest.mark.quick("both")
@pytest.mark.parametrize("how", ["both", "reference", pytest.param("one_after_the_other", marks=pytest.mark.full)])
def test_a_loop_with_two_models(checkpoint, alone, under, tmp_path, how):
    """At the least vram that the refusal says they need together, and above it, with a report."""
    given = [checkpoint, checkpoint / "other"]
    outs = [tmp_path / name for name in ("whole", "least", "more")]
    for out in outs:
        out.mkdir()
    whole = alone(TWO, *given, outs[0], how)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert len(exact(whole)) == (4 if how == "one_after_the_other" else 3)
    refused = under("64KiB", TWO, *given, outs[1], how)
    assert refused.returncode == 1
    assert exact(refused) == []
    least = least_vram(refused)
    for out, vram in zip(outs[1:], (least, least + 300_000), strict=True):
        report = tmp_path / "report.txt"
        done = under(f"{vram}B", TWO, *given, out, how, report=report)
        assert done.returncode == 0, done.stderr[-3000:]
        assert exact(done) == exact(whole)
        assert (out / "trained.safetensors").read_bytes() == (outs[0] / "trained.safetensors").read_bytes()
        assert done.stderr.count("streamed from") >= (1 if how == "reference" else 2)
        assert report.read_text().count("measured") >= (2 if how == "both" else 1)
