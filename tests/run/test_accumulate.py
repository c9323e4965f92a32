"""Micro-batches that take turns at each block: what is counted, what they have in common, and what may go wrong.

That results are those of one by one, over many kinds of models, is in ``test_accumulate_cover.py``.
"""

from __future__ import annotations

import _thread
import contextvars
import logging
import threading
import time
from functools import cache

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from memplan.errors import PlanCheckError, PlanMismatchError, RunError, TransferError
from memplan.program.support import require_supported
from memplan.run.attach import attach
from memplan.run.lanes import turns
from memplan.run.modules import install as install_module
from tests.run import adversary
from tests.run import test_experts as of_experts
from tests.run.test_parity import plan_for
from tests.support import routed
from tests.support.groups import in_groups, train_in_groups, uneven
from tests.support.training import (
    Decoder,
    PlainLayer,
    assert_equal,
    batch_of,
    checkpoint_layer,
    loss_of,
    make,
    train,
    whole_run,
)

GROUP, ACCUMULATION = 4, 8


def attached(model, kind="llama", *, group=GROUP, plan=None, **options):
    plan = plan or plan_for(model, kind, share=0.4, accumulation=ACCUMULATION, tiers="host")
    assert any(item.home != "device" for item in plan.items)
    return attach(model, in_groups(plan, group), **options)


def lanes_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("memplan-lane")]


@pytest.fixture(autouse=True)
def no_lane_is_left():
    yield
    assert not lanes_alive()


@pytest.mark.parametrize(("group", "accumulation"), [(4, 8), (3, 8), (8, 8), (16, 8)])
def test_a_group_loads_each_block_once_a_sweep(group, accumulation):
    model, loads = make("llama"), []
    with attached(model, group=group) as handle:
        train_in_groups(model, "llama", handle, steps=2, accumulation=accumulation, loads=loads)
        a_pass = handle.plan.prediction.loads_per_pass
        assert loads[1] == -(-accumulation // group) * a_pass
        assert loads[0] - loads[1] <= 2 * a_pass  # the first pass is looked at by itself
        assert handle.record.passes == 2 * accumulation
        assert handle.record.misses == handle.record.out_of_order == 0


@pytest.mark.parametrize("transfers", adversary.ALL)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_transfers_that_do_their_worst(share, transfers, tmp_path, monkeypatch):
    """At 0.4 segments of the arena come and go."""
    model = make("llama")
    plan = plan_for(model, "llama", share=share, accumulation=ACCUMULATION)
    assert any(segment.absent for segment in plan.arenas[0].segments) == (share > 0)
    with monkeypatch.context() as patch:
        patch.setattr(install_module, "CpuTransfers", transfers)
        handle = attached(model, plan=plan, cache=tmp_path)
    with handle:
        run = train_in_groups(model, "llama", handle, steps=2)
    assert_equal(whole_run("llama", accumulation=ACCUMULATION, steps=2), run)


def test_micro_batches_of_other_lengths():
    model = make("llama")
    with attached(model, checked=True) as handle:
        run = train_in_groups(model, "llama", handle, batches=uneven)
    assert_equal(train(make("llama"), "llama", accumulation=ACCUMULATION, batches=uneven), run)


def test_a_group_of_one_is_a_plain_loop():
    model, threads = make("llama"), set()

    def one(batch):
        threads.add(threading.current_thread())
        return batch

    with attached(model, group=1) as handle:
        assert handle.accumulate(one, range(3)) == [0, 1, 2]
    assert handle.accumulate(one, iter("ab")) == ["a", "b"]
    assert threads == {threading.current_thread()}


def test_offloaded_activations_are_refused():
    model = make("llama")
    plan = plan_for(model, "llama", share=0.4, accumulation=ACCUMULATION, tiers="host")
    saved = replace(plan.items[-1], kind="saved")
    with pytest.raises(PlanMismatchError, match="groups of 2 micro-batches and offloads"):
        require_supported(replace(plan, group=2, items=(*plan.items[:-1], saved)))
    with pytest.raises(PlanCheckError, match="a group has 0 micro-batches"):
        attach(model, replace(plan, group=0))


# ---- one by one, where that must be ---------------------------------------------------------------------------------


class Counts(PlainLayer):
    def __init__(self, width):
        super().__init__(width, 0.0)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return super().forward(x) * (1 + self.mean)


class Remembers(PlainLayer):
    def __init__(self, width):
        super().__init__(width, 0.0)
        self.last = 0.0

    def forward(self, x):
        before, self.last = self.last, x.detach().mean()
        return super().forward(x) + before


class Shared(PlainLayer):
    """Layers that share an adapter, each checkpointed by itself: it has a gradient of each."""

    adapter = None

    def __init__(self, width):
        super().__init__(width, 0.0)
        self.lora_a = Shared.adapter = Shared.adapter or self.lora_a


def decoder(kind, depth=4, width=48):
    torch.manual_seed(0)
    Shared.adapter = None
    model = Decoder((kind(width) for _ in range(depth)), width)
    if kind is Shared:
        model.embed.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        for layer in model.layers:
            checkpoint_layer(layer, "around-reentrant")
    return model.train()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (lambda width: PlainLayer(width, 0.2), "random numbers"),
        (Counts, "buffers"),
        (Remembers, "attributes"),
        (Shared, "more than one gradient"),
    ],
    ids=["dropout", "buffer", "attribute", "shared"],
)
def test_what_a_pass_leaves_for_the_next_has_them_go_one_by_one(kind, why, caplog):
    whole = train(decoder(kind), "plain", steps=2, accumulation=ACCUMULATION)
    model = decoder(kind)
    with attached(model, "plain") as handle, caplog.at_level(logging.WARNING, "memplan"):
        run = train_in_groups(model, "plain", handle, steps=2)
    assert_equal(whole, run)
    notes = [record.message for record in caplog.records if "one by one" in record.message]
    assert len(notes) == 1
    assert why in notes[0]


def test_an_optimizer_within_backward(caplog):
    def trained(model, runs):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(p, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

        def one(seed):
            loss = loss_of(model(**batch_of("llama", seed=seed)))
            loss.backward()
            return loss.detach()

        return runs(one, range(8))

    whole = trained(make("llama"), lambda one, seeds: [one(seed) for seed in seeds])
    model = make("llama")
    with attached(model) as handle, caplog.at_level(logging.WARNING, "memplan"):
        losses = trained(model, handle.accumulate)
    assert all(map(torch.equal, whole, losses))
    assert "takes each gradient" in caplog.text


def test_random_numbers_that_were_not_drawn_before_are_refused():
    model, one = make("llama"), one_of("llama")
    with attached(model) as handle:
        handle.accumulate(lambda batch: one(model, batch), seeds(8))

        def drawn(batch):
            torch.rand(1)
            return one(model, batch)

        with pytest.raises(RunError, match="random numbers were drawn"):
            handle.accumulate(drawn, seeds(4))
        model.zero_grad()
        results = handle.accumulate(drawn, seeds(4))
    assert all(map(torch.equal, results, whole_losses("llama", 4)))


@pytest.mark.parametrize("how", ["no-grad", "nested"])
def test_where_turns_cannot_be_taken(how, caplog):
    model = make("llama")

    def evaluated(batch):
        return loss_of(model(**batch)).detach()

    with attached(model) as handle, caplog.at_level(logging.WARNING, "memplan"):
        if how == "no-grad":
            with torch.no_grad():
                results = handle.accumulate(evaluated, seeds(4))
        else:
            results = handle.accumulate(lambda batch: handle.accumulate(evaluated, [batch])[0], seeds(4))
    assert all(map(torch.equal, results, whole_losses("llama", 4)))
    assert "one by one" in caplog.text


def run_with_kernels(model):
    def run(batch):
        with sdpa_kernel(SDPBackend.MATH):
            loss = loss_of(model(**batch))
        loss.backward()
        return loss.detach().clone()

    return run


def run_with_seed(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1

    def run(batch):
        torch.manual_seed(0)
        return one_of("llama")(model, batch)

    return run


def run_with_features(model):
    kept = {}
    layer = model.get_submodule("base_model.model.model.layers.2.mlp")
    layer.register_forward_hook(lambda module, args, output: kept.update(last=output.detach()))

    def run(batch):
        loss = loss_of(model(**batch)) * (1 + kept["last"].pow(2).mean())
        loss.backward()
        return loss.detach().clone()

    return run


def run_with_count(model):
    count = 0

    def scaled(module, of_inputs, of_outputs):
        nonlocal count
        count += 1
        return tuple(None if part is None else part * (1 + 0.01 * count) for part in of_inputs)

    for layer in model.base_model.model.model.layers:
        layer.mlp.register_full_backward_hook(scaled)
    return lambda batch: one_of("llama")(model, batch)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (run_with_kernels, "settings of torch's"),
        (run_with_seed, "random numbers"),
        (run_with_features, "a hook keeps"),
        (run_with_count, "a hook keeps"),
    ],
)
def test_what_a_script_keeps_has_them_go_one_by_one(made, why, caplog):
    alone, model = make("llama", dropout=1e-9), make("llama", dropout=1e-9)
    kernels = torch.backends.cuda.flash_sdp_enabled()
    for one in (alone, model):
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    run = made(alone)
    whole = [run(batch) for batch in seeds(8)]
    with attached(model) as handle, caplog.at_level(logging.WARNING, "memplan"):
        assert all(map(torch.equal, whole, handle.accumulate(made(model), seeds(8))))
        for (name, a), (_, b) in zip(alone.named_parameters(), model.named_parameters(), strict=True):
            assert not a.requires_grad or torch.equal(a.grad, b.grad), name
    assert torch.backends.cuda.flash_sdp_enabled() == kernels
    assert why in caplog.text


class Twice(Decoder):
    """Its last layer is its first."""

    def __init__(self, width=48):
        super().__init__((PlainLayer(width, 0.0) for _ in range(4)), width)
        self.head = nn.Identity()

    def forward(self, input_ids):
        return self.layers[0](super().forward(input_ids))


def test_casts_of_a_weight_that_is_used_twice(caplog):
    """One micro-batch leaves autocast, which forgets the casts of all, while another is between the two."""

    def made():
        torch.manual_seed(0)
        return Twice().train()

    def casts():
        return torch.autocast("cpu", torch.bfloat16)

    whole = train(made(), "plain", steps=1, accumulation=8, around_forward=casts)
    model = made()
    with attached(model, "plain") as handle, caplog.at_level(logging.WARNING, "memplan"):
        assert_equal(whole, train_in_groups(model, "plain", handle, steps=1, around_forward=casts))
    assert "autocast has casts" in caplog.text


def test_batches_that_are_made_with_random_numbers():
    """Each is made once the one before it has run, as in a loop."""

    def drawn():
        for batch in seeds(8):
            batch["input_ids"] = torch.where(torch.rand(batch["input_ids"].shape) < 0.2, 5, batch["input_ids"])
            yield batch

    def run_of(model, runs):
        torch.manual_seed(5)
        return runs(lambda batch: one_of("llama")(model, batch), drawn())

    whole = run_of(make("llama", dropout=0.1), lambda one, batches: [one(batch) for batch in batches])
    model = make("llama", dropout=0.1)
    with attached(model) as handle:
        assert all(map(torch.equal, whole, run_of(model, handle.accumulate)))


def test_a_handle_that_is_left_by_one_of_several():
    model, one = make("llama"), one_of("llama")
    with attached(model) as handle:
        learned(model, handle)

        def run(batch):
            if threading.current_thread().name == "memplan-lane-2":
                handle.detach()
            return one(model, batch)

        with pytest.raises(RunError, match=r"detach\(\) was called in a micro-batch"):
            handle.accumulate(run, seeds(4))
        assert_goes_on(model, handle)


# ---- lanes that leave the common way --------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["off", pytest.param("around-reentrant", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["routed", pytest.param("switch", marks=pytest.mark.full)])
def test_experts(kind, checkpointing, tmp_path):
    def made():
        model = routed.make(kind, checkpointing=checkpointing)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    whole = train(made(), kind, accumulation=8, batches=routed.batch_of)
    for checked in (False, True):
        model = made()
        plan = of_experts.plan_for(kind, checkpointing=checkpointing)
        with attached(model, plan=plan, checked=checked, cache=tmp_path) as handle:
            assert_equal(whole, train_in_groups(model, kind, handle, batches=routed.batch_of))
            assert handle.record.passes == 24


class Leaves(Decoder):
    """Some micro-batches leave layers out, end early, run one twice, or take one's adapter elsewhere."""

    def __init__(self, ways, depth=5, width=48):
        super().__init__((PlainLayer(width, 0.0) for _ in range(depth)), width)
        self.ways = ways

    def forward(self, input_ids):
        way = self.ways[int(input_ids.sum()) % len(self.ways)]
        x, late = self.embed(input_ids), 0.0
        for number, layer in enumerate(self.layers):
            if way == "leaves out" and number == 2:
                continue
            if way == "early exit" and number == 3:
                break
            if way == "carried" and number == 1:
                late = layer.lora_a(x).mean()
            x = layer(x)
            if way == "twice" and number == 1:
                x = layer(x)
        return self.head(x + late)


WAYS = ("as planned", "leaves out", "early exit", "twice", "carried")


@pytest.mark.parametrize("ways", [WAYS[:2], WAYS[:3], (WAYS[0], WAYS[3]), (WAYS[0], WAYS[4]), WAYS], ids=len)
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_a_micro_batch_that_leaves_the_way(ways, checked, tmp_path):
    def made(ways):
        torch.manual_seed(0)
        return Leaves(ways).train()

    whole = train(made(ways), "plain", accumulation=8, batches=uneven)
    model = made(WAYS[:1])
    plan = plan_for(model, "plain", share=0.3, tiers="host")
    model.ways = ways
    with attached(model, plan=plan, checked=checked) as handle:
        assert_equal(whole, train_in_groups(model, "plain", handle, batches=uneven))


# ---- what a thread has of its own -----------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_lanes_have_what_the_thread_has(caplog):
    model, variable, seen = make("llama"), contextvars.ContextVar("v", default=0), []
    packed = []

    def pack(tensor):
        packed.append(threading.current_thread())
        return tensor

    def one(batch):
        seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(),
                variable.get(),
                str(torch.get_default_device()),
                torch._C._is_view_replay_enabled(),
                mode in torch.overrides._get_current_function_mode_stack(),
                threading.current_thread().name,
            )
        )
        loss = loss_of(model(**batch))
        loss.backward()

    with attached(model) as handle, Counting() as mode:
        variable.set(3)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        casts = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        with hooks, casts, torch.autograd._force_original_view_tracking(True), torch.device("cpu"):
            handle.accumulate(one, seeds(8))
    assert {values[:-1] for values in seen} == {(True, True, torch.bfloat16, False, 3, "cpu", True, True)}
    assert {values[-1] for values in seen} == {"MainThread", *(f"memplan-lane-{i}" for i in range(4))}
    assert {thread.name for thread in packed} == {values[-1] for values in seen}
    assert mode.count > 0


@pytest.mark.parametrize("checkpointing", ["off", "inside-other"])
def test_memory_is_watched_in_lanes(checkpointing):
    model, peaks = make("llama", checkpointing=checkpointing), {}
    with attached(model) as handle:
        train_in_groups(model, "llama", handle, steps=1)  # optimizer state that comes is none of it
        one = one_of("llama")
        for count in (1, 4):
            with handle.watch_memory():
                handle.accumulate(lambda batch: one(model, batch), seeds(count))
            model.zero_grad()
            peaks[count] = handle.record.vram_peak_bytes
    assert peaks[4] > peaks[1] > 0  # what layers keep is of all four


# ---- errors and interrupts ------------------------------------------------------------------------------------------


def one_of(kind):
    def one(model, batch):
        loss = loss_of(model(**batch))
        loss.backward()
        return loss.detach().clone()

    return one


def seeds(count):
    return [batch_of("llama", seed=seed) for seed in range(count)]


@cache
def whole_losses(kind, count):
    model = make(kind)
    return [loss_of(model(**batch)).detach() for batch in seeds(count)]


def whole_gradients(count):
    model, one = make("llama"), one_of("llama")
    for batch in seeds(count):
        one(model, batch)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_goes_on(model, handle):
    """The next micro-batches are right."""
    model.zero_grad()
    one = one_of("llama")
    losses = handle.accumulate(lambda batch: one(model, batch), seeds(4))
    assert all(map(torch.equal, losses, whole_losses("llama", 4)))
    whole = whole_gradients(4)
    assert all(torch.equal(whole[name], p.grad) for name, p in model.named_parameters() if p.requires_grad)
    assert not lanes_alive()


def learned(model, handle):
    one = one_of("llama")
    handle.accumulate(lambda batch: one(model, batch), seeds(2))
    model.zero_grad()


@pytest.mark.parametrize("where", ["before", "forward", "backward", "after"])
@pytest.mark.parametrize("lane", [0, 2, 3])
def test_an_error_in_one_lane(where, lane):
    model, one, ended = make("llama"), one_of("llama"), []
    batches = seeds(4)
    layer = model.get_submodule("base_model.model.model.layers.3")

    def fails(*args):
        if threading.current_thread().name == f"memplan-lane-{lane}":
            raise ValueError(f"lane {lane}")

    def run(batch):
        try:
            if where == "before":
                fails()
            result = one(model, batch)
            if where == "after":
                fails()
            return result
        except Exception:
            ended.append("by an error")
            raise
        finally:
            ended.append("over")

    with attached(model, checked=True) as handle:
        hook = None
        if where == "forward":
            hook = layer.self_attn.register_forward_hook(fails)
        elif where == "backward":
            hook = layer.self_attn.q_proj.lora_A.default.weight.register_hook(fails)
        learned(model, handle)
        with pytest.raises(ValueError, match=f"lane {lane}"):
            handle.accumulate(run, batches)
        if hook is not None:
            hook.remove()
        assert ended.count("by an error") == 1
        assert_goes_on(model, handle)


def test_an_interrupt():
    model, one = make("llama"), one_of("llama")

    def run(batch):
        if threading.current_thread().name == "memplan-lane-1":
            _thread.interrupt_main()
            time.sleep(0.2)
        return one(model, batch)

    with attached(model) as handle:
        learned(model, handle)
        with pytest.raises(KeyboardInterrupt):
            handle.accumulate(run, seeds(4))
        assert_goes_on(model, handle)


def test_a_lane_that_waits_for_what_another_holds(monkeypatch):
    model, one, lock = make("llama"), one_of("llama"), threading.Lock()
    monkeypatch.setattr(turns, "DEADLINE_S", 0.5)

    def run(batch):
        with lock:
            return one(model, batch)

    with attached(model) as handle:
        learned(model, handle)
        with pytest.raises(TransferError, match="micro-batch 1 of a group"):
            handle.accumulate(run, seeds(4))
        assert_goes_on(model, handle)


def test_a_block_that_cannot_be_read(tmp_path, monkeypatch):
    from memplan.run.memory.disk import DiskReader

    model, one = make("llama"), one_of("llama")
    plan = plan_for(model, "llama", share=0.4, accumulation=ACCUMULATION)
    with attached(model, plan=plan, cache=tmp_path) as handle:
        learned(model, handle)

        def fails(*args, **kwargs):
            raise TransferError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(DiskReader, "read", fails)
            with pytest.raises(TransferError, match="the disk is gone"):
                handle.accumulate(lambda batch: one(model, batch), seeds(8))
        assert_goes_on(model, handle)


class Reference(nn.Module):
    """A loss beside a reference with the adapters off, as in DPO; ``is_off``: of these micro-batches."""

    def __init__(self, model, is_off):
        super().__init__()
        self.model = model
        self.is_off = is_off
        self.count = 0

    def loss(self, batch):
        self.count += 1
        if not self.is_off(self.count):
            return loss_of(self.model(**batch))
        first = loss_of(self.model(**batch)) if self.count % 2 else 0.0
        with self.model.disable_adapter(), torch.no_grad():
            reference = loss_of(self.model(**batch))
        return loss_of(self.model(**batch)) - reference + first


@pytest.mark.parametrize("is_off", [lambda count: True, lambda count: count == 4, lambda count: count > 3])
def test_adapters_that_are_off_for_a_reference(is_off):
    """The settings of one micro-batch are not another's, whether that was so from the first on or comes later."""
    whole, model = make("llama"), make("llama")
    given = seeds(8)

    def run_of(model, runs):
        reference, losses = Reference(model, is_off), []
        for _ in range(2):

            def one(batch):
                loss = reference.loss(batch)
                loss.backward()
                return loss.detach().clone()

            losses += runs(one, given)
        return losses

    losses = run_of(whole, lambda one, batches: [one(batch) for batch in batches])
    with attached(model) as handle:
        assert all(map(torch.equal, losses, run_of(model, handle.accumulate)))
        for (name, a), (_, b) in zip(whole.named_parameters(), model.named_parameters(), strict=True):
            assert not a.requires_grad or torch.equal(a.grad, b.grad), name


def test_another_thread_is_refused():
    model, one, refused = make("llama"), one_of("llama"), []

    def elsewhere():
        with pytest.raises(RunError, match="in a thread while another"):
            one(model, seeds(1)[0])
        refused.append(threading.current_thread())

    def within(module, args):
        if threading.current_thread().name == "memplan-lane-2":
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    with attached(model) as handle:
        hook = model.get_submodule("base_model.model.model.layers.3.self_attn").register_forward_pre_hook(within)
        learned(model, handle)
        handle.accumulate(lambda batch: one(model, batch), seeds(4))
        hook.remove()
        assert len(refused) == 1
        assert_goes_on(model, handle)


def test_evaluation_and_generation_between():
    model, loads = make("llama"), []
    prompt = batch_of("llama")["input_ids"]
    whole = train(make("llama"), "llama", steps=1, accumulation=8)
    with attached(model) as handle:
        model.eval()
        with torch.no_grad():
            before = model(**batch_of("llama")).loss
            said = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
        model.train()
        run = train_in_groups(model, "llama", handle, steps=1, loads=loads)
        model.eval()
        with torch.no_grad():
            after = model(**batch_of("llama")).loss
        model.train()
        assert_equal(whole, run)
    other = make("llama").eval()
    with torch.no_grad():
        assert torch.equal(other(**batch_of("llama")).loss, before)
        assert torch.equal(other.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), said)
        assert not torch.equal(before, after)


def test_spans_of_a_group():
    """Each access of each micro-batch is there, in its place."""
    model, one = make("llama"), one_of("llama")
    with attached(model, traced=True) as handle:
        for _ in range(2):
            handle.accumulate(lambda batch: one(model, batch), seeds(8))
        handle.accumulate(lambda batch: one(model, batch), seeds(1))  # a pass is known once the next one begins
        spans = [span for span in handle.record.spans if span.lane == "compute"]
        accesses = [a for a in handle.plan.table.accesses if a.kind in ("forward", "backward")]
    assert {span.name.split()[0] for span in spans} >= {"forward", "backward"}
    for kind in ("forward", "backward"):
        named = [span.name.split()[1] for span in spans if span.name.startswith(kind)]
        expected = [a.module for a in accesses if a.kind == kind for _ in range(GROUP)]
        assert sorted(named) == sorted(expected), kind


def test_out_of_memory_is_not_repeated_in_turns():
    model, one, calls = make("llama"), one_of("llama"), []
    plan = plan_for(model, "llama", share=0.4, accumulation=ACCUMULATION, tiers="host")

    def run(batch):
        calls.append(threading.current_thread().name)
        if calls.count("memplan-lane-1"):
            raise torch.OutOfMemoryError("out of memory")
        return one(model, batch)

    with attached(model, plan=plan, replan=lambda plan, vram: plan) as handle:
        learned(model, handle)
        with pytest.raises(torch.OutOfMemoryError):
            handle.accumulate(lambda batch: handle.micro_batch(lambda: run(batch)), seeds(4))
        assert calls == ["memplan-lane-0", "memplan-lane-1"]
        assert handle.record.recoveries == 0
        assert_goes_on(model, handle)


def test_a_plan_that_changes():
    model = make("llama")
    plan = plan_for(model, "llama", share=0.4, accumulation=ACCUMULATION, tiers="host")
    other = plan_for(model, "llama", share=0.1, accumulation=ACCUMULATION, tiers="host")
    with attached(model, plan=plan) as handle:
        learned(model, handle)
        handle.change(in_groups(other, 3))
        assert_equal(whole_run("llama", accumulation=8, steps=3), train_in_groups(model, "llama", handle))


def test_nothing_is_left_behind():
    import gc
    import weakref

    model, one = make("llama"), one_of("llama")
    with attached(model) as handle:
        learned(model, handle)
        batches = seeds(4)
        kept = [weakref.ref(batch["input_ids"]) for batch in batches]
        losses = handle.accumulate(lambda batch: one(model, batch), batches)
        del batches
        gc.collect()
        assert not any(reference() is not None for reference in kept)
        assert len(losses) == 4
        assert all(not p._backward_hooks for p in model.parameters())
