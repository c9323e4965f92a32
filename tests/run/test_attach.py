"""All or nothing, in both directions; what would harm is refused before anything is changed."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

import memplan
from memplan.errors import (
    CheckpointError,
    DoesNotFitError,
    ModelError,
    MovedWeightsError,
    PlanCheckError,
    PlanMismatchError,
    RunError,
    StrayReadError,
    TransferError,
)
from memplan.model.names import canonical
from memplan.run.attach import attach
from memplan.run.memory.disk import DiskReader
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.training import (
    CPU,
    as_it_lies,
    assert_equal,
    assert_only_whole_blocks,
    batch_of,
    make,
    train,
    whole_run,
)


def state(model):
    """Everything of a model that attach may touch: parameters as objects, their values, hooks, forwards."""
    modules = {
        name: (dict(m._forward_pre_hooks), dict(m._forward_hooks), m.__dict__.get("forward"), m.__dict__.get("_apply"))
        for name, m in model.named_modules()
    }
    parameters = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    return modules, parameters


def assert_unchanged(model, before):
    modules, parameters = before
    now_modules, now = state(model)
    assert {n: [list(h) for h in m[:2]] + list(m[2:]) for n, m in modules.items()} == {
        n: [list(h) for h in m[:2]] + list(m[2:]) for n, m in now_modules.items()
    }
    assert parameters.keys() == now.keys()
    for name, (parameter, value, requires_grad) in parameters.items():
        assert now[name][0] is parameter
        assert torch.equal(now[name][1], value), name
        assert now[name][2] == requires_grad
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # its own memory, no part of an arena


@pytest.fixture
def model():
    return make("llama")


@pytest.fixture
def plan(model):
    return plan_for(model, "llama")


def test_detach_gives_the_model_back(model, plan, tmp_path):
    before = state(model)
    handle = attach(model, plan, cache=tmp_path)
    assert any(as_it_lies(p).isnan().any() for p in model.parameters())
    assert handle.detach() is model
    assert_unchanged(model, before)
    assert_only_whole_blocks(tmp_path)
    handle.detach()
    assert_equal(train(model, "llama"), whole_run("llama"))


def test_training_goes_on_after_detach(model, plan, tmp_path):
    whole = make("llama")
    with attach(model, plan, cache=tmp_path):
        assert_equal(train(whole, "llama"), train(model, "llama"))
    assert_equal(train(whole, "llama"), train(model, "llama"))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failure_half_way_leaves_the_model_as_it_was(model, plan, tmp_path, monkeypatch, after):
    from memplan.run.memory import home

    before = state(model)
    fill = home.Weights.fill
    calls = []

    def failing(self, block, part, **more):
        calls.append(block)
        if len(calls) > after:
            raise CheckpointError("the disk is gone")
        fill(self, block, part, **more)

    monkeypatch.setattr(home.Weights, "fill", failing)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        attach(model, plan, cache=tmp_path)
    assert_unchanged(model, before)
    assert_only_whole_blocks(tmp_path)


def test_a_plan_for_another_model(plan):
    for other in (make("gpt2"), make("plain")):
        before = state(other)
        with pytest.raises(PlanMismatchError, match="for another model"):
            attach(other, plan)
        assert_unchanged(other, before)


def test_a_larger_adapter_than_planned(plan):
    from peft import LoraConfig, get_peft_model

    base = make("llama").get_base_model()
    other = make("llama").unload()
    del base
    larger = get_peft_model(other, LoraConfig(r=32, target_modules="all-linear"))
    with pytest.raises(PlanMismatchError, match="of adapters"):
        attach(larger, plan)


def test_a_plan_that_breaks_its_budget(model, plan):
    before = state(model)
    tight = replace(plan, budgets=replace(plan.budgets, vram_bytes=plan.prediction.peaks.vram_bytes - 512))
    with pytest.raises(PlanCheckError, match="the plan is invalid"):
        attach(model, tight)
    assert_unchanged(model, before)


def test_a_second_plan_is_refused(model, plan, tmp_path):
    with attach(model, plan, cache=tmp_path), pytest.raises(ModelError, match="under a plan already"):
        attach(model, plan, cache=tmp_path)


def test_a_model_hooked_by_accelerate(model, plan):
    from accelerate import cpu_offload

    hooked = cpu_offload(make("llama"), torch.device("cpu"))
    with pytest.raises(ModelError, match="accelerate"):
        attach(hooked, plan)
    with pytest.raises(ModelError, match="accelerate"):
        memplan.plan(hooked, batch_of("llama"), vram="1GiB", hardware=CPU)


def test_no_disk_budget_and_no_checkpoint(model, plan):
    before = state(model)
    with pytest.raises(CheckpointError, match="no checkpoint holds its weights"):
        attach(model, replace(plan, budgets=replace(plan.budgets, disk_bytes=None)))
    assert_unchanged(model, before)


def test_reads_from_the_checkpoints_own_files(model, tmp_path):
    """Where the files hold the very bytes of the model, nothing is written."""
    plan = plan_for(model, "llama")
    plan = replace(plan, budgets=replace(plan.budgets, disk_bytes=None))
    tensors = {canonical(n): p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    save_file(tensors, tmp_path / "model.safetensors")
    with attach(model, plan, checkpoint=tmp_path, checked=True):
        assert_equal(whole_run("llama"), train(model, "llama"))
    name = next(t.name for b in plan.table.blocks if plan.home_of(b.id) == "disk" for t in b.tensors)
    tensors[name] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint holds its weights"):
        attach(model, plan, checkpoint=tmp_path)


def test_a_worker_that_fails_is_heard(model, plan, tmp_path, monkeypatch):
    """The error comes in the training thread, with the block and the file; the model can be had back."""
    before = state(model)
    handle = attach(model, plan, cache=tmp_path)
    read = DiskReader.read

    def failing(self, extents, what, **more):
        extents = list(extents)
        raise TransferError(f"{what} could not be read from {extents[0][0].path}")

    monkeypatch.setattr(DiskReader, "read", failing)
    with pytest.raises(TransferError, match=r"the block .*layers\.\d could not be read from .*\.block"):
        train(model, "llama")
    monkeypatch.setattr(DiskReader, "read", read)
    for parameter in model.parameters():
        parameter.grad = None
    handle.detach()
    _modules, parameters = before
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name][0]
        if not parameter.requires_grad:
            assert torch.equal(parameter, parameters[name][1])


def test_moves_that_change_nothing_go_through_and_others_are_refused(model, plan, tmp_path):
    with attach(model, plan, cache=tmp_path):
        assert model.to("cpu") is model
        model.float()
        for move in (lambda: model.to(torch.float64), model.half, lambda: model.to("meta"), model.bfloat16):
            with pytest.raises(MovedWeightsError, match="memplan streams its weights"):
                move()
        assert_equal(whole_run("llama"), train(model, "llama"))


def test_copies_are_refused(model, plan, tmp_path):
    with attach(model, plan, cache=tmp_path):
        with pytest.raises(RunError, match="copied or pickled"):
            copy.deepcopy(model)
        with pytest.raises(RunError, match="copied or pickled"):
            torch.save(model, io.BytesIO())
    copy.deepcopy(model)


def test_materialise_makes_all_weights_readable(model, plan, tmp_path):
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, plan, cache=tmp_path):
        with memplan.materialise(model):
            for name, tensor in model.state_dict().items():
                if name in expected:
                    assert torch.equal(tensor, expected[name]), name
        assert any(as_it_lies(p).isnan().any() for p in model.parameters())
        assert_equal(whole_run("llama"), train(model, "llama"))
    with memplan.materialise(model):
        pass


def test_what_is_away_is_loud(model, tmp_path):
    """What is in the place of a weight that is away is NaN; in the checked mode a use that no trigger saw raises."""
    # Nothing recomputed: that would announce a layer by its forward too.
    options = {"ram": "1GiB", "activations": "keep", "hardware": CPU, "gains": False}
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(model, batch_of("llama"), vram=1, **options)
    plan = memplan.plan(model, batch_of("llama"), vram=caught.value.least_vram_bytes, **options)
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        away = next(b for b in plan.table.blocks if plan.home_of(b.id) != "device")
        parameters = {canonical(n): p for n, p in model.named_parameters()}
        assert as_it_lies(parameters[away.tensors[0].name]).isnan().all()
        inside.conductor(handle).pause("here")
        inside.conductor(handle).resume()
        loss = model(**batch_of("llama")).loss
        inside.conductor(handle).backward_begins = lambda module, call: None
        with pytest.raises((StrayReadError, RunError), match=r"while the block was away|that was not there"):
            loss.backward()


def test_optimizer_built_before_attach_trains_the_same(tmp_path):
    whole, planned = make("llama"), make("llama")
    plan = plan_for(planned, "llama")
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (whole, planned)]
    with attach(planned, plan, cache=tmp_path):
        for _ in range(3):
            for model, optimizer in zip((whole, planned), optimizers, strict=True):
                model(**batch_of("llama")).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        for a, b in zip(whole.parameters(), planned.parameters(), strict=True):
            assert not a.requires_grad or torch.equal(a, b)


def test_a_loss_that_is_kept_does_not_keep_the_arenas(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path) as handle:
        arena = weakref.ref(inside.device_arena(handle).bytes.untyped_storage())
        loss = model(**batch_of("llama")).loss
        loss.backward()
        loads = handle.record.loads
    assert handle.record.loads == loads > 0
    assert arena() is None
    del loss
