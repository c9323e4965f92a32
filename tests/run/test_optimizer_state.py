"""An optimizer's state that waits in RAM: the same bits, the memory that was said, and whatever else is done with
it.
"""

from __future__ import annotations

import contextlib
import gc
import io
from functools import partial

import pytest
import torch
from msgspec.structs import replace
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import _global_optimizer_pre_hooks

import memplan
from memplan.cost.build import cost_table
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place
from memplan.program.check.judge import check
from memplan.program.schema import Budgets, Plan, Workload
from memplan.run.attach import attach
from memplan.run.modules.optimizer_state import _State
from memplan.units import GIB, MIB
from tests.support import inside
from tests.support.counting import LiveBytes, held_by
from tests.support.graphs import graph_of
from tests.support.training import CPU, KINDS, LENGTH, _base, assert_equal, batch_of, loss_of, make, train, whole_run


def plan_for(model, kind="llama", vram=None, home="host", accumulation=1, length=LENGTH):
    """A plan under which something streams and the state waits in RAM."""
    graph = graph_of(model, batch_of(kind, length=length), loss_of, accumulation=accumulation)
    key = (id(graph), CPU.name, vram, home, accumulation)  # graphs stay to the end
    if key not in _plans:
        _plans[key] = _plan_for(graph, vram, home, accumulation)
    return _plans[key]


_plans: dict[tuple[object, ...], Plan] = {}


def _plan_for(graph, vram, home, accumulation):
    table = cost_table(graph, CPU)
    names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": CPU.name}
    work = Workload(batch={}, tokens=graph.tokens, accumulation=accumulation, optimizer="adamw", adapter="")
    within = Budgets(vram_bytes=vram or 1, ram_bytes=GIB, disk_bytes=GIB)
    if vram is None:
        within = replace(within, vram_bytes=int(1.2 * least_vram_bytes(table, within, optimizer_state=home)))
    return place(table, within, workload=work, optimizer_state=home, **names)


def wide():
    """A model whose adapters are large beside it."""
    torch.manual_seed(0)
    return get_peft_model(_base("llama")[0], LoraConfig(r=8, target_modules="all-linear")).train()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def state_of(optimizer):
    return [v for held in optimizer.state.values() for v in held.values() if torch.is_tensor(v) and v.numel() > 1]


def step(model, optimizer, seed=0, length=LENGTH):
    loss_of(model(**batch_of("llama", seed=seed, length=length))).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_waits(handle, optimizer):
    (room,) = inside.optimizer_rooms(handle)
    state = state_of(optimizer)
    assert state
    assert all(held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr() for held in state)


@pytest.mark.quick("llama-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps(kind, checked, tmp_path):
    whole = whole_run(kind, accumulation=4)
    model = make(kind)
    plan = plan_for(model, kind, accumulation=4)
    assert plan.optimizer_state == "host"

    @contextlib.contextmanager
    def around(optimizer):
        if optimizer.state:
            assert_waits(handle, optimizer)
        yield

    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        assert_equal(whole, train(model, kind, accumulation=4, around_step=around))
        assert handle.record.loads > 0


@pytest.mark.quick("momentum", "amsgrad-fused", "foreach", "adagrad")
@pytest.mark.parametrize(
    "kind",
    [
        lambda held: torch.optim.SGD(held, lr=1e-2, momentum=0.9),
        lambda held: torch.optim.AdamW(held, lr=1e-2, amsgrad=True, fused=True),
        lambda held: torch.optim.AdamW(held, lr=1e-2, foreach=True),
        lambda held: torch.optim.Adafactor(held, lr=1e-2),
        lambda held: torch.optim.Adagrad(held, lr=1e-2),
    ],
    ids=["momentum", "amsgrad-fused", "foreach", "adafactor", "adagrad"],
)
def test_other_optimizers(kind, tmp_path):
    """Built before the model is attached: Adagrad has its state from the beginning."""
    found = []
    for planned in (False, True):
        model = make("llama")
        plan = plan_for(model) if planned else None
        optimizer = kind(trained(model))
        with attach(model, plan, cache=tmp_path) if planned else contextlib.nullcontext() as handle:
            for turn in range(3):
                step(model, optimizer, turn)
            if planned:
                assert_waits(handle, optimizer)
        found.append([p.detach().clone() for p in trained(model)] + [held.clone() for held in state_of(optimizer)])
    assert all(map(torch.equal, *found))


def test_the_device_has_room_for_something_else(tmp_path):
    """What is measured is what was said, and less than with the state there by all of it."""
    peaks, said = {}, {}
    for home in ("device", "host"):
        model = wide()
        plan = plan_for(model, home=home, vram=int(2.5 * MIB), length=64)
        assert plan.optimizer_state == home
        optimizer = torch.optim.AdamW(trained(model))
        with attach(model, plan, cache=tmp_path) as handle:
            step(model, optimizer, length=64)
            apart = inside.on_host(handle)
            with (
                handle.watch_memory(optimizer),
                LiveBytes(held_by(model, optimizer), apart, inside.device_arena(handle)) as count,
            ):
                for _ in range(2):
                    step(model, optimizer, length=64)
            record = handle.record
        assert record.vram_peak_bytes == pytest.approx(count.peak, rel=0.01)
        assert record.ram_peak_bytes == pytest.approx(plan.prediction.peaks.ram_bytes, abs=64 << 10)
        peaks[home], said[home] = count.peak, plan.prediction
        assert count.peak <= said[home].peaks.vram_bytes <= plan.budgets.vram_bytes
        assert count.peak == pytest.approx(said[home].peaks.vram_bytes, rel=0.10)
    state = said["host"].ram_parts["optimizer"]
    assert state == said["device"].vram_parts["optimizer"] > 0.15 * said["device"].peaks.vram_bytes
    assert said["host"].pass_s < said["device"].pass_s


def test_the_least_is_less_by_the_state():
    least = {}
    for home in ("device", "host"):
        with pytest.raises(memplan.DoesNotFitError) as caught:
            plan_for(wide(), home=home, vram=1, length=64)
        least[home] = caught.value.least_vram_bytes
        assert ("optimizer_state" in str(caught.value)) == (home == "device")
    assert least["host"] < 0.9 * least["device"]
    assert plan_for(wide(), vram=least["host"], length=64).optimizer_state == "host"


def pass_of(model, optimizer, seed, handle):
    optimizer.zero_grad()
    loss = loss_of(model(**batch_of("llama", seed=seed)))
    loss.backward()
    if handle is not None and optimizer.state:
        assert_waits(handle, optimizer)
    return loss


def test_a_step_with_a_closure_has_the_state_behind_the_pass(tmp_path):
    """As Lightning steps: forward and backward run inside the optimizer's step."""
    found = []
    for planned in (False, True):
        model = make("llama")
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(attach(model, plan_for(model), cache=tmp_path)) if planned else None
            for turn in range(3):
                closure = partial(pass_of, model, optimizer, turn, handle)
                optimizer.step(closure) if turn else optimizer.step(closure=closure)
        found.append([p.detach().clone() for p in trained(model)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("adopted", [False, True], ids=["loaded", "adopted"])
def test_a_state_from_a_checkpoint(adopted, tmp_path):
    """Saved while it waits, loaded into an optimizer that has a state already or none yet: the run goes on to the same
    bits.
    """
    whole = make("llama")
    optimizer = torch.optim.AdamW(trained(whole), lr=1e-2)
    for turn in range(4):
        step(whole, optimizer, turn)

    model, file = make("llama"), io.BytesIO()
    first = torch.optim.AdamW(trained(model), lr=1e-2)
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        for turn in range(2):
            step(model, first, turn)
        torch.save(first.state_dict(), file)
        file.seek(0)
        if adopted:
            second = torch.optim.AdamW(trained(model), lr=1e-2)
            second.load_state_dict(torch.load(file))
            handle.adopt(second)
            assert len(inside.optimizer_rooms(handle)) == 2
        else:
            second = first
            for held in state_of(first):
                held.fill_(torch.nan)
            first.load_state_dict(torch.load(file))
            assert_waits(handle, first)
        for turn in (2, 3):
            step(model, second, turn)
        assert all(map(torch.equal, trained(model), trained(whole)))


def test_given_back_with_the_model(tmp_path):
    whole, model = make("llama"), make("llama")
    optimizers = [torch.optim.AdamW(trained(m), lr=1e-2) for m in (whole, model)]
    step(whole, optimizers[0])
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        step(model, optimizers[1])
        (room,) = inside.optimizer_rooms(handle)
    room.fill_(0xFF)  # nobody reads it any more
    for turn in (1, 2):
        for m, optimizer in zip((whole, model), optimizers, strict=True):
            step(m, optimizer, turn)
    assert all(map(torch.equal, trained(model), trained(whole)))


def test_an_optimizer_of_something_else_is_left_alone(tmp_path):
    model, other = make("llama"), torch.nn.Linear(64, 64)
    theirs = torch.optim.AdamW(other.parameters())
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        other(torch.ones(2, 64)).sum().backward()
        theirs.step()
        handle.adopt(theirs)
        assert inside.optimizer_rooms(handle) == []


def test_a_step_that_fails_loses_nothing(tmp_path):
    whole, model = make("llama"), make("llama")
    ours, theirs = (torch.optim.AdamW(trained(m), lr=1e-2) for m in (model, whole))
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        for m, optimizer in ((model, ours), (whole, theirs)):
            step(m, optimizer)

        def closure():
            raise ValueError("no batch")

        for wrong in (closure, None):
            rate = ours.param_groups[0]["lr"]
            if wrong is None:
                ours.param_groups[0]["betas"] = None
            with pytest.raises((ValueError, TypeError)):
                ours.step(wrong)
            ours.param_groups[0].update(betas=(0.9, 0.999), lr=rate)
        for m, optimizer in ((model, ours), (whole, theirs)):
            step(m, optimizer, 1)
        assert_waits(handle, ours)
        assert all(map(torch.equal, trained(model), trained(whole)))


def test_the_judge_counts_it():
    plan = plan_for(make("llama"))
    state = plan.prediction.ram_parts["optimizer"]
    assert state > 0
    low = replace(plan, budgets=replace(plan.budgets, ram_bytes=plan.prediction.peaks.ram_bytes - 1))
    assert any("of ram are needed" in fault for fault in check(low))
    lives = tuple(
        replace(life, born=life.born - 1) if life.kind == "optimizer" else life for life in plan.table.lifetimes
    )
    early = replace(plan, table=replace(plan.table, lifetimes=lives))
    assert any("not for its step alone" in fault for fault in check(early))


def test_what_it_may_be():
    with pytest.raises(memplan.InputError, match="give one of device, host"):
        memplan.plan(make("llama"), batch_of("llama"), vram="1GiB", optimizer_state="disk", hardware=CPU)


def test_of_a_model_that_was_dropped_nothing_stays(tmp_path):
    """Whoever forgets to detach leaves no hook behind that would take another model's optimizer."""
    before = len(_global_optimizer_pre_hooks)
    model = make("llama")
    optimizer = torch.optim.AdamW(trained(model))
    handle = attach(model, plan_for(model), cache=tmp_path)
    step(model, optimizer)
    assert len(_global_optimizer_pre_hooks) == before + 1
    del model, handle, optimizer
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before


def test_one_that_cannot_come_back_keeps_no_other(tmp_path, monkeypatch):
    model = make("llama")
    held = trained(model)
    optimizers = [torch.optim.AdamW(part) for part in (held[::2], held[1::2])]
    handle = attach(model, plan_for(model), cache=tmp_path)
    loss_of(model(**batch_of("llama"))).backward()
    for optimizer in optimizers:
        optimizer.step()
    rooms = inside.optimizer_rooms(handle)
    first, brings = [], _State.bring

    def bring(state):
        if not first:
            first.append(state)
            raise MemoryError("none left")
        brings(state)

    monkeypatch.setattr(_State, "bring", bring)
    with pytest.raises(MemoryError, match="none left"):
        handle.detach()
    in_ram = [
        any(held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr() for room in rooms)
        for optimizer in optimizers
        for held in state_of(optimizer)[:1]
    ]
    assert sorted(in_ram) == [False, True]


def test_pages_are_left_to_go_by_themselves(tmp_path):
    """As bitsandbytes marks them."""
    model = make("llama")
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        loss_of(model(**batch_of("llama"))).backward()
        optimizer.step()
        (room,) = inside.optimizer_rooms(handle)
    marked = state_of(optimizer)[0]
    marked.is_paged = True
    with attach(model, plan_for(model), cache=tmp_path) as handle:
        handle.adopt(optimizer)
        (room,) = inside.optimizer_rooms(handle)
        away = [held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr() for held in state_of(optimizer)]
        assert away == [False] + [True] * (len(away) - 1)
    with pytest.raises(memplan.InputError, match="by itself"):
        memplan.plan(
            make("llama"), (2, 8), vram="1GiB", optimizer="paged_adamw_8bit", optimizer_state="host", hardware=CPU
        )
