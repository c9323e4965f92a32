"""A sequence that has changed for good is learned anew: then it is followed without a miss, and the bits stay the
same.
"""

from __future__ import annotations

import pytest
import torch

from memplan.program.schema import Plan
from memplan.run.attach import attach
from memplan.run.modules import install as install_module
from memplan.run.schedule.learning import REPEATS, Learner, SlotUser, loads_of
from memplan.run.schedule.sequence import offload_key, planned
from tests.run import adversary
from tests.run.test_off_sequence import plan_of, wandering
from tests.run.test_parity import plan_for
from tests.support.training import assert_equal, batch_of, loss_of, make, train

STEPS = 2 * REPEATS + 6
ADVERSARIES = {kind.__name__: kind for kind in adversary.ALL}


def two_forwards(model, step):
    first, second = (loss_of(model(**batch_of("plain", seed=10 * step + turn))) for turn in range(2))
    (2 * first + second).backward()


def two_losses_in_turn(model, step):
    output = model(**batch_of("plain", seed=step))
    if step % 2:
        h = model.layers[1](model.layers[0](model.embed(batch_of("plain", seed=step + 1)["input_ids"])))
        (h.square().mean() + loss_of(output)).backward()
    else:
        loss_of(output).backward()


def early_exit(model, step):
    x = model.embed(batch_of("plain", seed=step)["input_ids"])
    for layer in model.layers[:3]:
        x = layer(x)
    loss_of(model.head(x)).backward()


def backwards(model, step):
    x = model.embed(batch_of("plain", seed=step)["input_ids"])
    for layer in reversed(model.layers):
        x = layer(x)
    loss_of(model.head(x)).backward()


def evaluation_before_each(model, step):
    with torch.no_grad():
        model(**batch_of("plain", seed=step + 50))
    loss_of(model(**batch_of("plain", seed=step))).backward()


def two_backwards(model, step):
    losses = [loss_of(model(**batch_of("plain", seed=10 * step + turn))) for turn in range(2)]
    for loss in losses:
        loss.backward()


WAYS = [two_forwards, two_losses_in_turn, early_exit, backwards, evaluation_before_each, two_backwards]


def trained(model, way, steps=STEPS):
    """Return the gradients of each step and the adapters, having trained."""
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-2)
    torch.manual_seed(7)
    found = []
    for step in range(steps):
        way(model, step)
        found += [p.grad.clone() for p in trainables if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach().clone() for p in trainables)]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)


CASES = [(way, transfers) for way in WAYS for transfers in ("normal", "checked")]
CASES += [(way, transfers) for way in (two_forwards, backwards) for transfers in ADVERSARIES]


@pytest.fixture(scope="module")
def plan():
    return plan_of(wandering("straight"), 0.9, "all")


@pytest.mark.quick("two_forwards-normal", "early_exit-normal")
@pytest.mark.parametrize(("way", "transfers"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_way_that_stays_is_learned_and_then_followed(way, transfers, plan, tmp_path, monkeypatch):
    whole, model = wandering("straight"), wandering("straight")
    if transfers in ADVERSARIES:
        monkeypatch.setattr(install_module, "CpuTransfers", ADVERSARIES[transfers])
    with attach(model, plan, cache=tmp_path, checked=transfers == "checked") as handle:
        assert same(trained(whole, way), trained(model, way))
        learned = handle.record
        assert learned.learned == 1
        assert learned.out_of_order > 0
        assert same(trained(whole, way, steps=4), trained(model, way, steps=4))
        after = handle.record
        assert (after.learned, after.out_of_order, after.misses) == (1, learned.out_of_order, learned.misses)
        assert after.passes == learned.passes + (8 if way is two_backwards else 4)


def test_the_plans_own_way_is_learned_back(plan, tmp_path):
    whole, model = wandering("straight"), wandering("straight")
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        for way in (two_forwards, early_exit):
            assert same(trained(whole, way), trained(model, way))
        assert_equal(train(whole, "plain", steps=STEPS), train(model, "plain", steps=STEPS))
        before = handle.record
        assert before.learned == 3
        assert_equal(train(whole, "plain"), train(model, "plain"))
        assert handle.record.out_of_order == before.out_of_order
        assert handle.record.loads - before.loads == 3 * handle.plan.prediction.loads_per_pass


def test_an_odd_forward_puts_it_out_of_step_for_a_while_only(plan, tmp_path):
    """Two forwards of which one has a backward: one more, and each would come where the other is due."""
    whole, model = wandering("straight"), wandering("straight")
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        assert same(trained(whole, evaluation_before_each), trained(model, evaluation_before_each))
        with torch.no_grad():
            assert torch.equal(whole(**batch_of("plain")), model(**batch_of("plain")))
        assert same(trained(whole, evaluation_before_each), trained(model, evaluation_before_each))
        before = handle.record
        assert same(trained(whole, evaluation_before_each, steps=4), trained(model, evaluation_before_each, steps=4))
        after = handle.record
        assert (after.learned, after.misses, after.out_of_order) == (1, before.misses, before.out_of_order)
        assert after.passes == before.passes + 4


@pytest.mark.parametrize("way", ["drop", "any"])
def test_what_is_another_way_each_time_is_not_learned(way, tmp_path):
    model = wandering(way)
    with attach(model, plan_of(wandering(way), 0.9, "host"), cache=tmp_path) as handle:
        train(model, "plain", steps=STEPS)
        assert handle.record.out_of_order > 0
        assert handle.record.learned == 0


def test_a_backward_of_before_it_was_learned(plan, tmp_path):
    """A graph that is still alive names an access of the sequence that is no more."""

    def gradients(model):
        loss = loss_of(model(**batch_of("plain", seed=99)))
        for step in range(STEPS):
            two_forwards(model, step)
        model.zero_grad()
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    whole, model = wandering("straight"), wandering("straight")
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        assert same(gradients(whole), gradients(model))
        assert handle.record.learned == 1


def test_offloaded_activations_are_learned_too(tmp_path):
    def early(model, step):
        base = model.get_base_model().model
        h = base(**{k: v for k, v in batch_of("llama", seed=step).items() if k != "labels"}).last_hidden_state
        (h.square().mean() + loss_of(model(**batch_of("llama", seed=step)))).backward()

    whole, model = make("llama"), make("llama")
    plan = plan_for(model, "llama", share=0.2, offload="all")
    with attach(model, plan, cache=tmp_path, checked=True) as handle:
        assert same(trained(whole, early), trained(model, early))
        before = handle.record
        assert before.learned == 1
        assert same(trained(whole, early, steps=3), trained(model, early, steps=3))
        assert (handle.record.out_of_order, handle.record.misses) == (before.out_of_order, before.misses)


# ---- the loads of a cycle --------------------------------------------------------------------------------------------


def movers_of(plan: Plan) -> dict[int, SlotUser]:
    """What comes into slots, read from the plan alone."""
    places = {a.item: (a.offset_bytes, a.offset_bytes + a.size_bytes) for a in plan.addresses if a.arena == 0}
    moving = {i.id: i for i in plan.items if i.home != "device"}
    keys = {i: i if item.kind == "weights" else offload_key(plan, i) for i, item in moving.items()}
    found = {}
    for i, item in moving.items():
        begin, end = places[i]
        overlapping = tuple(keys[j] for j in moving if j != i and places[j][0] < end and begin < places[j][1])
        channel = "disk" if item.home == "disk" else "h2d"
        segment = next(
            (n for n, s in enumerate(plan.arenas[0].segments) if s.absent and s.offset_bytes <= places[i][0]
             < s.offset_bytes + s.size_bytes), -1,
        )  # fmt: skip
        found[keys[i]] = SlotUser(channel, overlapping, item.module, segment)
    return found


@pytest.mark.quick("llama-0.3-all", "t5-0.0-offload1")
@pytest.mark.parametrize(
    ("kind", "share", "offload"),
    [("llama", 0.3, "all"), ("t5", 0.0, ()), ("plain", 0.0, "all"), ("plain", 0.3, ()), ("plain", 0.6, ())],
)
def test_the_loads_of_the_plans_own_accesses_are_the_plans(kind, share, offload):
    plan = plan_for(make(kind), kind, share=share, offload=offload)
    away = {item.block for item in plan.items if item.kind == "weights" and item.home != "device"}
    sequence = planned(plan, {a.index: tuple(b for b in a.blocks if b in away) for a in plan.table.accesses})
    movers = movers_of(plan)
    absent = {
        number: frozenset(at for first, last in segment.absent for at in range(first, last + 1))
        for number, segment in enumerate(plan.arenas[0].segments)
    }
    found = loads_of(sequence.steps, movers, absent)
    # What shares its bytes with nothing (a block that is pinned away from the device) comes once and stays.
    expected = {
        c: {due for due in dues if movers[due.key].overlapping or movers[due.key].segment > 0}
        for c, dues in sequence.loads.items()
    }
    assert {channel: set(dues) for channel, dues in found.items() if dues} == {c: d for c, d in expected.items() if d}


def test_a_long_evaluation_is_not_written_down():
    learner = Learner()
    learner.strayed()
    assert learner.cycle_ends() is None
    assert learner.writing
    for call in range(1 << 15):
        learner.forward("layer", call)
    learner.backward("layer", 5)
    learner.strayed()
    assert learner.cycle_ends() is None
    assert not learner._past
