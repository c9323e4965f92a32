"""Out of memory in a micro-batch: it is done over under a smaller plan, and the result is the one it would have
been.
"""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import memplan
from memplan.api import smaller
from memplan.errors import CheckpointError, RunError
from memplan.place.solve import place
from memplan.run.attach import attach
from memplan.run.recovery import is_out_of_memory
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.counting import LiveBytes, held_by
from tests.support.training import CPU, assert_equal, batch_of, loss_of, make, train, whole_run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class FailsAt(TorchDispatchMode):
    """Raises as a card that is full does, at one operator of what runs under it."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(*args, **(kwargs or {}))


def trained(model, handle=None, at=(), accumulation=2, kind="llama"):
    """Two steps; the micro-batches numbered in ``at`` fail at that operator, once."""
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-2)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    losses, number = [], 0
    fails = dict(at)
    for _ in range(2):
        for _ in range(accumulation):
            batch = batch_of(kind, seed=number)

            def micro_batch(batch=batch, number=number):
                scale = 1 + random.random() + np.random.random()
                operator = fails.pop(number, None)
                if operator is None:
                    return _run(model, batch, scale)
                with FailsAt(operator):
                    return _run(model, batch, scale)

            losses.append(micro_batch() if handle is None else handle.micro_batch(micro_batch))
            number += 1
        optimizer.step()
        optimizer.zero_grad()
    return losses, [p.detach().clone() for p in trainables]


def _run(model, batch, scale):
    loss = loss_of(model(**batch)) * scale
    loss.backward()
    return loss.detach()


def equal(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.quick("kept-1-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("operator", [1, pytest.param(200, marks=pytest.mark.full), 700])
@pytest.mark.parametrize("offload", [(), "all"], ids=["kept", "offloaded"])
def test_done_over_it_is_the_same(offload, operator, checked, tmp_path, caplog):
    """In the first micro-batch of a step, and in one that adds to gradients; in forward and in backward."""
    expected = trained(make("llama", dropout=0.2))
    model = make("llama", dropout=0.2)
    plan = plan_for(model, "llama", share=0.6, offload=offload)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    with attach(model, plan, cache=tmp_path, checked=checked, replan=smaller) as handle:
        equal(expected, trained(model, handle, at={0: operator, 3: operator}))
        assert handle.recoveries == handle.record.recoveries == 2
        assert handle.plan.prediction.peaks.vram_bytes < plan.prediction.peaks.vram_bytes
        assert {p.activations for p in handle.plan.activations} >= ({"offload"} if offload else set())
    assert caplog.text.count("the micro-batch is repeated under one for") == 2
    after = {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_equal(whole_run("llama"), train(reset(model), "llama"))


def reset(model):
    """The adapters as they were made, without dropout."""
    model.load_state_dict(make("llama").state_dict())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Card(LiveBytes):
    """A card of that size: what would not fit raises."""

    def __init__(self, size_bytes, tensors, arena):
        self.size_bytes = size_bytes
        super().__init__((*tensors, arena.bytes), arena=arena)

    def look(self):
        super().look()
        if self.now > self.size_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.full
def test_it_goes_down_until_it_fits(tmp_path):
    """A card on which less is free than was said: by an independent count of what lives."""
    expected = trained(make("llama"))
    model = make("llama")
    plan = plan_for(model, "llama", share=0.9)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    free = int(plan.prediction.peaks.vram_bytes * 0.85)
    with attach(model, plan, cache=tmp_path, replan=smaller) as handle:

        def limited(run):
            def on_the_card():
                with Card(free, held_by(model, optimizer), inside.device_arena(handle)):
                    return run()

            return handle.micro_batch(on_the_card)

        equal(expected, trained(model, type("Handle", (), {"micro_batch": staticmethod(limited)})))
        assert handle.recoveries >= 1
        assert handle.plan.prediction.peaks.vram_bytes <= free * 1.1


def test_where_nothing_smaller_is_left_it_says_so(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama", share=0.0)
    handle = attach(model, plan, cache=tmp_path, replan=smaller)
    with pytest.raises(RunError, match="and no plan takes less"):
        trained(model, handle, at={0: 50})
    handle.detach()
    model.zero_grad()
    assert_equal(whole_run("llama"), train(model, "llama"))


def test_tries_are_bounded_and_other_errors_are_not_ours(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.9), cache=tmp_path, replan=smaller) as handle:
        calls = []

        def always():
            calls.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with pytest.raises(torch.OutOfMemoryError):
            handle.micro_batch(always, tries=2)
        assert len(calls) == 3
        assert handle.recoveries == 2
        with pytest.raises(ValueError, match="not ours"):
            handle.micro_batch(lambda: (_ for _ in ()).throw(ValueError("not ours")))
        assert handle.recoveries == 2


class Counts(nn.Module):
    """A buffer that each forward puts another in the place of."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return x


def test_what_was_before_is_there_again(tmp_path):
    """Also where nothing smaller is left: gradients, buffers that were replaced, random numbers."""
    model = make("llama", dropout=0.2)
    counts = Counts()
    model.get_base_model().model.norm.register_module("counts", counts)
    plan = plan_for(model, "llama", share=0.0)
    with attach(model, plan, cache=tmp_path, replan=smaller) as handle:
        loss_of(model(**batch_of("llama"))).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        state = torch.get_rng_state()

        def run():
            counts(torch.ones(()))
            loss_of(model(**batch_of("llama", seed=1))).backward()
            raise torch.OutOfMemoryError("CUDA out of memory.")

        for tries in (0, 3):
            with pytest.raises(RuntimeError):
                handle.micro_batch(run, tries=tries)
            after = [p.grad for p in model.parameters() if p.requires_grad]
            assert all(torch.equal(a, b) for a, b in zip(gradients, after, strict=True))
            assert torch.equal(state, torch.get_rng_state())
            assert counts.seen == 0


@pytest.mark.full
def test_pins_and_what_was_asked_for_stay():
    model = make("llama")
    asked = {"pins": {"layers.4": "device"}, "activations": {"layers.5": "keep", "layers.2": "offload"}}
    plan = memplan.plan(model, batch_of("llama"), vram="1GiB", ram="1GiB", hardware=CPU, **asked)
    with pytest.raises(memplan.DoesNotFitError) as caught:
        smaller(plan, 1)
    least = smaller(plan, caught.value.least_vram_bytes)
    block = next(b.id for b in plan.table.blocks if b.name == "model.layers.4")
    assert least.home_of(block) == "device"
    assert least.policies()["model.layers.5"] == "keep"
    assert least.policies()["model.layers.2"] == "offload"


def test_ram_is_counted_after_it_too(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.6, offload="all"), cache=tmp_path, replan=smaller) as handle:
        before = handle.record.ram_peak_bytes
        arena = weakref.ref(inside.device_arena(handle).bytes.untyped_storage())
        change, gone = handle.change, []
        handle.change = lambda plan: (change(plan), gone.append(arena() is None))
        rooms = {name: room.data_ptr() for name, room in inside.activation_rooms(handle).items()}
        trained(model, handle, at={0: 200})
        assert gone == [True]
        assert handle.record.ram_peak_bytes >= before
        kept = inside.activation_rooms(handle)
        assert all(kept[name].data_ptr() == address for name, address in rooms.items())


@pytest.mark.quick("plain-0.6")
@pytest.mark.parametrize(("kind", "share"), [("plain", 0.6), ("llama", 0.4), ("llama", 0.9)])
def test_inside_watch_memory_the_new_arena_counts_in_place_of_the_old(kind, share, tmp_path):
    """And nothing of the way there, on which RAM holds what was on the device."""
    model = make(kind)
    plan = plan_for(model, kind, share=share)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    fails = [40]  # in forward: of a backward that fails torch keeps what it had queued until the next one
    with attach(model, plan, cache=tmp_path, replan=smaller) as handle:

        def run():
            with FailsAt(fails.pop() if fails else -1):
                loss_of(model(**batch_of(kind))).backward()

        with handle.watch_memory(optimizer):
            handle.micro_batch(run)
            counted = inside.counted_bytes(handle)
        assert handle.recoveries == 1
        with handle.watch_memory(optimizer):
            anew = inside.counted_bytes(handle)
        assert counted == anew
        assert handle.record.vram_peak_bytes <= plan.budgets.vram_bytes


def test_without_the_way_to_a_smaller_plan_the_error_is_torchs_own(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path) as handle, pytest.raises(torch.OutOfMemoryError):
        trained(model, handle, at={0: 50})


def test_a_block_that_may_not_go_to_the_disk(tmp_path):
    """The smaller plan wants more RAM than there is, and no disk was given: the model is had back."""
    model = make("llama")
    plan = plan_for(model, "llama", share=0.9, tiers="host")

    def to_the_disk(plan, vram_bytes):
        other = smaller(plan, vram_bytes)
        pins = {item.block: "disk" for item in other.items if item.home == "host"}
        names = {"model": plan.model, "fingerprint": plan.fingerprint, "hardware": plan.hardware}
        budgets = replace(other.budgets, disk_bytes=None)
        return place(plan.table, budgets, workload=plan.workload, pins=pins, **names)

    handle = attach(model, plan, cache=tmp_path, replan=to_the_disk)
    with pytest.raises(CheckpointError, match="would have to go to the disk"):
        trained(model, handle, at={0: 50})
    model.zero_grad()
    assert_equal(whole_run("llama"), train(model, "llama"))


def test_by_the_public_way():
    model = make("llama")
    plan = memplan.plan(model, batch_of("llama"), vram="6MiB", ram="1GiB", hardware=CPU)
    with memplan.attach(model, plan) as handle:
        trained(model, handle, at={1: 60})
        assert handle.recoveries == 1


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one
