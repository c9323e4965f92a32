"""Saved activations that go to the host and come back: the same bits, the memory that was said, off the sequence
too.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from msgspec.structs import replace
from torch import nn

import memplan
from memplan.errors import InputError, PlanCheckError, PlanMismatchError, RunError
from memplan.program.check.judge import check
from memplan.program.schema import Arena
from memplan.program.support import require_supported
from memplan.run.attach import attach
from memplan.run.modules import install as install_module
from tests.run import adversary
from tests.run.test_memory import counted_step
from tests.run.test_parity import compare, plan_for
from tests.support import inside
from tests.support.training import CPU, KINDS, assert_equal, batch_of, loss_of, make, train, whole_run


@pytest.mark.quick("t5-plain-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"dropout": 0.2, "accumulation": 3}, marks=pytest.mark.full)],
    ids=["plain", "dropout"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps(kind, options, checked, tmp_path):
    with compare(kind, offload="all", checked=checked, tmp_path=tmp_path, **options) as handle:
        record = handle.record
        assert (record.misses, record.out_of_order, record.offload_skipped) == (0, 0, 0)
        assert record.offloaded_bytes == record.passes * handle.plan.prediction.offloaded_bytes_per_pass > 0


@pytest.mark.quick("llama-0.0", "t5-1.0")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_peak_is_within_budget_and_prediction(kind, share, tmp_path):
    model = make(kind)
    plan = plan_for(model, kind, share=share, tiers="all" if share < 1 else "host", offload="all")
    with attach(model, plan, cache=tmp_path) as handle:
        peak = counted_step(model, kind)
        assert handle.record.offload_skipped == 0
    assert peak <= plan.budgets.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(peak, rel=0.10)


def test_it_takes_less_of_the_device_than_keeping():
    """Enough layers that two slots are less than what all of them save."""
    model = make("llama")
    kept, offloaded = (plan_for(model, "llama", share=1.0, tiers="host", offload=layers) for layers in ((), "all"))
    assert {policy.activations for policy in offloaded.activations} == {"offload"}
    assert offloaded.prediction.peaks.vram_bytes < kept.prediction.peaks.vram_bytes
    assert offloaded.prediction.ram_parts["activations"] >= offloaded.prediction.offloaded_bytes_per_pass > 0


def test_some_layers_only_beside_recomputed_ones(tmp_path):
    model = make("llama")
    layers = [f"model.layers.{index}" for index in (0, 2, 3, 5)]
    whole = whole_run("llama")
    plan = plan_for(model, "llama", share=0.0, offload=layers)
    assert set(plan.policies().values()) == {"offload", "recompute"}
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        assert_equal(whole, train(model, "llama"))
        assert handle.record.offload_skipped == 0


@pytest.mark.each_value
@pytest.mark.parametrize("transfers", adversary.ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_transfers_that_do_their_worst(transfers, checked, tmp_path, monkeypatch):
    monkeypatch.setattr(install_module, "CpuTransfers", transfers)
    compare("llama", offload="all", checked=checked, share=0.1, tmp_path=tmp_path).detach()


def attached(tmp_path, kind="llama", **options):
    model = make(kind)
    plan = plan_for(model, kind, share=0.2, offload="all")
    return model, attach(model, plan, cache=tmp_path, **options)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_two_forwards_for_one_backward(checked, tmp_path):
    """The second finds its places taken, keeps what it saves, and is counted."""

    def run(model):
        first, second = (model(**batch_of("llama", seed=seed)).loss for seed in (1, 2))
        (first * 2 + second).backward()
        return gradients(model)

    expected = run(make("llama"))
    model, handle = attached(tmp_path, checked=checked)
    with handle:
        same(expected, run(model))
        assert handle.record.offload_skipped == 6


def test_a_graph_that_is_kept_can_be_run_again(tmp_path):
    def run(model):
        loss = model(**batch_of("llama")).loss
        loss.backward(retain_graph=True)
        with torch.no_grad():
            model(**batch_of("llama", seed=9))
        loss.backward()
        return gradients(model)

    expected = run(make("llama"))
    model, handle = attached(tmp_path, checked=True)
    with handle:
        same(expected, run(model))


def test_other_lengths_are_right_too(tmp_path):
    """Longer than planned: what finds no room stays on the device. Shorter: there is room left."""

    def run(model):
        for length in (16, 24, 8, 16):
            model(**batch_of("llama", length=length)).loss.backward()
        return gradients(model)

    expected = run(make("llama"))
    model, handle = attached(tmp_path, checked=True)
    with handle:
        same(expected, run(model))
        assert handle.record.offload_skipped > 0


def test_a_forward_without_a_backward_leaves_its_place(tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        for _ in range(3):
            loss = model(**batch_of("llama")).loss
            del loss
        model(**batch_of("llama")).loss.backward()
        assert handle.record.offload_skipped == 0


def test_evaluation_between_forward_and_backward(tmp_path):
    def run(model):
        loss = model(**batch_of("llama")).loss
        model.eval()
        with torch.no_grad():
            model(**batch_of("llama", seed=5))
        model.train()
        loss.backward()
        return gradients(model)

    expected = run(make("llama"))
    model, handle = attached(tmp_path, checked=True)
    with handle:
        same(expected, run(model))


def test_a_backward_after_detach_is_refused(tmp_path):
    model, handle = attached(tmp_path)
    loss = model(**batch_of("llama")).loss
    handle.detach()
    with pytest.raises(RunError, match="finish the backward first"):
        loss.backward()
    assert_equal(whole_run("llama"), train(model, "llama"))


def test_autocast_and_saved_tensor_hooks_of_others(tmp_path):
    """Somebody else's hooks around a forward get all that it saves: nothing is offloaded there."""

    def run(model, hooks):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch_of("llama")).loss
        loss.backward()
        with hooks():
            loss = model(**batch_of("llama", seed=4)).loss
        loss.backward()
        return gradients(model)

    expected = run(make("llama"), torch.autograd.graph.save_on_cpu)
    model, handle = attached(tmp_path, checked=True)
    with handle:
        same(expected, run(model, torch.autograd.graph.save_on_cpu))
        once = handle.plan.prediction.offloaded_bytes_per_pass
        assert handle.record.offloaded_bytes == once


class Square(nn.Module):
    """Saves what it then writes to, as no module should."""

    def __init__(self, spoils):
        super().__init__()
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.trained = nn.Linear(8, 8)
        self.spoils = spoils

    def forward(self, x):
        hidden = torch.sigmoid(self.trained(self.frozen(x)))
        result = hidden * hidden
        if self.spoils:
            hidden.mul_(2)
        return x + result


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Square(False) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def test_what_is_written_to_after_it_was_saved_is_heard():
    torch.manual_seed(0)
    model, batch = Squares(), {"x": torch.randn(3, 8)}
    plan = memplan.plan(model, batch, vram="1GiB", ram="1GiB", activations="offload", hardware=CPU, loss=lambda x: x)
    model.layers[1].spoils = True
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(**batch).backward()
    with memplan.attach(model, plan), pytest.raises(RunError, match=r"layers\.1 saved for backward was written to"):
        model(**batch).backward()


def test_nothing_is_left_on_the_device_in_between(tmp_path):
    """Between forward and backward the allocator holds no more of the layers than what they hand on."""
    from memplan.model.live_storages import StorageLedger

    model, handle = attached(tmp_path)
    arenas = [arena.bytes for arena in inside.arenas(handle)]
    with handle, StorageLedger((*arenas, *model.parameters())) as ledger:
        loss = loss_of(model(**batch_of("llama")))
        gc.collect()
        held = ledger.live_bytes
        loss.backward()
    other = make("llama")
    with StorageLedger(other.parameters()) as ledger:
        loss = loss_of(other(**batch_of("llama")))
        whole = ledger.live_bytes
    assert whole - held == pytest.approx(handle.plan.prediction.offloaded_bytes_per_pass / 4 * 6, rel=0.02)


# ---- asking for it ---------------------------------------------------------------------------------------------------


def planned(**options):
    model = make("llama")
    return memplan.plan(model, batch_of("llama"), vram="1GiB", ram="1GiB", hardware=CPU, **options)


@pytest.mark.full
def test_activations_by_layer_and_for_all():
    plan = planned(activations={"layers.1": "offload", "layers.2": "recompute", "layers.3": "offload"})
    assert plan.policies() == {
        f"model.layers.{i}": p for i, p in enumerate(["keep", "offload", "recompute", "offload", "keep", "keep"])
    }
    assert set(planned(activations="offload").policies().values()) == {"offload"}


@pytest.mark.quick("away-give one of keep, recompute, offload", "given2-give one of")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("away", "give one of keep, recompute, offload"),
        ({"layers.9": "offload"}, "names 0 layers"),
        ({"layers.1": "disk"}, "give one of"),
        ({"lm_head": "offload"}, "names 0 layers"),
    ],
)
def test_activations_that_cannot_be(given, words):
    with pytest.raises(InputError, match=words):
        planned(activations=given)


def test_a_model_that_checkpoints_its_layers_itself_has_none_to_offload():
    model = make("llama", checkpointing="native")
    with pytest.raises(InputError, match="cannot set those of this model"):
        memplan.plan(model, batch_of("llama"), vram="1GiB", ram="1GiB", hardware=CPU, activations="offload")


@pytest.mark.full
def test_host_room_for_activations_is_counted():
    plan = planned(activations="offload")
    assert plan.prediction.peaks.ram_bytes >= plan.prediction.ram_parts["activations"] > 0
    with pytest.raises(memplan.DoesNotFitError, match="offloaded activations"):
        memplan.plan(
            make("llama"), batch_of("llama"), vram="1GiB", ram=1 << 12, disk=0, hardware=CPU, activations="offload"
        )


# ---- the judge -------------------------------------------------------------------------------------------------------


def changed(plan, index, **fields):
    stays = list(plan.residences)
    stays[index] = replace(stays[index], **fields)
    return replace(plan, residences=tuple(stays))


@pytest.fixture(scope="module")
def chained():
    return planned(activations="offload")


def stays_of(plan):
    """The three residences of the first item that is stored."""
    made = next(s for s in plan.residences if s.ends == "store")
    away = next(s for s in plan.residences if s.source == f"residence:{made.id}")
    back = next(s for s in plan.residences if s.source == f"residence:{away.id}")
    return made, away, back


@pytest.mark.quick("0-fields0-is dropped after")
@pytest.mark.parametrize(
    ("which", "fields", "words"),
    [
        (0, {"ends": "drop"}, "is dropped after"),
        (0, {"last_use": 40}, "take the same bytes"),
        (0, {"first_use": 2}, "is made at access"),
        (1, {"load_after": -1}, "stores it"),
        (1, {"channel": "h2d"}, "goes over"),
        (1, {"last_use": 12}, "is used at"),
        (2, {"source": "home"}, "is stored 1 times and comes back 0 times"),
        (2, {"load_after": 3}, ""),
        (2, {"first_use": 30, "last_use": 31}, ""),
    ],
)
def test_the_judge_sees_a_broken_chain(chained, which, fields, words):
    plan = chained
    assert check(plan) == ()
    faults = check(changed(plan, stays_of(plan)[which].id, **fields))
    assert faults
    assert any(words in fault for fault in faults), faults


def test_a_plan_with_offloads_goes_through_a_file(tmp_path):
    plan = planned(activations="offload")
    plan.save(tmp_path / "plan.json")
    assert memplan.Plan.load(tmp_path / "plan.json") == plan
    text = (tmp_path / "plan.json").read_text().replace('"activations": "offload"', '"activations": "keep"')
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanCheckError, match="are offloaded 0 times, by 1 items"):
        memplan.Plan.load(tmp_path / "plan.json")


# ---- traps -----------------------------------------------------------------------------------------------------------


class Trap(nn.Module):
    """A stack of layers with a frozen and a trained part, and a trick of its own."""

    def __init__(self, trick, depth=6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(trick() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.sum()


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.trained = nn.Linear(16, 16)


class Complex(Base):
    """Saves a tensor that is conjugated by a bit, not in its bytes."""

    def forward(self, x):
        h = self.frozen(x)
        product = torch.fft.rfft(self.trained(h)) * torch.fft.rfft(h * 2 + x).conj()
        return torch.tanh(x + torch.fft.irfft(product * product.conj(), n=16))


class SavesItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        gradient = x.t() @ torch.ones_like(x)
        ctx.save_for_backward(gradient, torch.tanh(x) + 0.5)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, given):
        gradient, slope = ctx.saved_tensors
        slope.mul_(given)  # in place, and handed on
        return slope, gradient  # what was saved is the gradient


class ReturnsWhatItSaved(Base):
    def forward(self, x):
        return SavesItsGradient.apply(torch.sin(self.frozen(x)), self.trained.weight) + self.trained.bias


@pytest.mark.quick("Complex-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("trick", [Complex, ReturnsWhatItSaved])
def test_tricks(trick, checked):
    batch = {"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(1))}

    def run(model):
        for _ in range(2):
            model(**batch).backward()
        return gradients(model)

    expected = run(Trap(trick))
    model = Trap(trick)
    plan = memplan.plan(model, batch, vram="1GiB", ram="1GiB", activations="offload", hardware=CPU, loss=lambda x: x)
    with memplan.attach(model, plan, checked=checked) as handle:
        same(expected, run(model))
        assert handle.record.offloaded_bytes > 0


def test_a_backward_to_be_differentiated_is_refused_with_no_block_streamed():
    model = make("llama")
    plan = memplan.plan(model, batch_of("llama"), vram="1GiB", ram="1GiB", activations="offload", hardware=CPU)
    assert {item.home for item in plan.items if item.kind == "weights"} == {"device"}
    with memplan.attach(model, plan):
        trained = [p for p in model.parameters() if p.requires_grad]
        with pytest.raises(RunError, match="create_graph"):
            torch.autograd.grad(model(**batch_of("llama")).loss, trained, create_graph=True)


class AddsInPlace(Base):
    """Saves what it was given, and then writes to it."""

    spoils = False

    def forward(self, x):
        result = x * torch.sigmoid(self.trained(self.frozen(x)))
        if self.spoils:
            x.add_(1)
        return result


@pytest.mark.quick("plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_an_input_that_is_written_to_is_heard(checked):
    batch = {"x": torch.randn(4, 16)}
    model = Trap(AddsInPlace)
    plan = memplan.plan(model, batch, vram="1GiB", ram="1GiB", activations="offload", hardware=CPU, loss=lambda x: x)
    model.layers[2].spoils = True
    with pytest.raises(RuntimeError, match="inplace operation"):
        model(**batch).backward()
    with memplan.attach(model, plan, checked=checked), pytest.raises(RuntimeError, match="inplace operation"):
        model(**batch).backward()


def test_an_adapter_that_is_stepped_before_its_backward_is_heard(tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        loss = model(**batch_of("llama")).loss
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        with pytest.raises(RuntimeError, match="inplace operation"):
            loss.backward()


@pytest.mark.quick("plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_a_forward_that_fails_leaves_nothing(checked, tmp_path):
    """Its graph goes, its places are free again, and after detach so are the arenas."""

    def fail(*args):
        raise ValueError("not ours")

    model, handle = attached(tmp_path, checked=checked)
    arena = weakref.ref(inside.device_arena(handle).bytes.untyped_storage())
    for part in ("mlp", "mlp.down_proj"):
        hook = model.get_base_model().model.layers[3].get_submodule(part).register_forward_hook(fail)
        with pytest.raises(ValueError, match="not ours"):
            model(**batch_of("llama"))
        hook.remove()
    long = model(**batch_of("llama", length=40)).loss
    del long
    before = handle.record.offload_skipped
    model(**batch_of("llama")).loss.backward()
    assert handle.record.offload_skipped == before
    handle.detach()
    gc.collect()
    assert arena() is None


def test_a_refusal_inside_materialise_takes_nothing_away(tmp_path):
    model, handle = attached(tmp_path)
    with handle, memplan.materialise(model):
        with pytest.raises(RunError, match="only read"):
            model(**batch_of("llama"))
        assert handle.record.passes == 0
        assert not any(p.isnan().any() for p in model.parameters())


def test_more_arenas_than_this_version_runs_are_refused():
    plan = planned()
    other = replace(
        plan, arenas=(*plan.arenas, Arena(id=len(plan.arenas), tier="device", segments=plan.arenas[0].segments))
    )
    with pytest.raises(PlanMismatchError, match="the arenas 0, 1 on the device"):
        require_supported(other)
