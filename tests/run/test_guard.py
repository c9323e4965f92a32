"""Saving, loading, copying, merging and leaving while weights are streamed: right or refused, and nothing stays
behind.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import memplan
from memplan.errors import MovedWeightsError, RunError
from memplan.run.attach import attach
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.leftovers import started_since, threads
from tests.support.training import (
    CPU,
    Decoder,
    as_it_lies,
    assert_equal,
    assert_only_whole_blocks,
    batch_of,
    loss_of,
    make,
    train,
    whole_run,
)


@pytest.fixture
def model():
    return make("llama")


@pytest.fixture
def plan(model):
    return plan_for(model, "llama")


@pytest.fixture
def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_holds(found, weights):
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_a_state_dict_holds_true_weights(model, plan, weights, tmp_path):
    with attach(model, plan, cache=tmp_path):
        assert any(as_it_lies(p).isnan().any() for p in model.parameters())
        assert_holds(model.state_dict(), weights)
        train(model, "llama", steps=1)
        frozen = {name: tensor for name, tensor in weights.items() if "lora" not in name}
        assert_holds({n: t for n, t in model.state_dict().items() if "lora" not in n}, frozen)
        assert any(as_it_lies(p).isnan().any() for p in model.parameters())


def test_files_that_others_write_hold_true_weights(model, plan, weights, tmp_path):
    with attach(model, plan, cache=tmp_path):
        torch.save(model.state_dict(), tmp_path / "state.pt")
        save_file(model.state_dict(), tmp_path / "state.safetensors")
        model.get_base_model().save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert_holds(torch.load(tmp_path / "state.pt"), weights)
    assert_holds(load_file(tmp_path / "state.safetensors"), weights)
    by_end = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
    assert_holds(load_file(tmp_path / "base" / "model.safetensors"), by_end)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed" in name for name in adapter)
    assert not any(tensor.isnan().any() for tensor in adapter.values())


def test_a_state_dict_may_come_back_but_no_other(model, plan, weights, tmp_path):
    whole = make("llama")
    with attach(model, plan, cache=tmp_path):
        model.load_state_dict(weights)
        model.load_state_dict({n: t for n, t in weights.items() if "lora" in n}, strict=False)
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({n: t for n, t in weights.items() if "layers.3.mlp" not in n})
        with pytest.raises(MovedWeightsError, match=r"layers\.3.*detach"):
            model.load_state_dict({n: t + 1 if "layers.3.mlp" in n else t for n, t in weights.items()})
        assert_equal(train(whole, "llama"), train(model, "llama"))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(model, plan, weights, tmp_path, merge):
    with attach(model, plan, cache=tmp_path):
        with pytest.raises(RunError, match="detach"):
            getattr(model, merge)()
        with memplan.materialise(model), pytest.raises(RunError, match="detach"):
            getattr(model, merge)()
    assert_holds(model.state_dict(), weights)
    getattr(model, merge)()


def test_materialise_reads_and_does_not_run(model, plan, weights, tmp_path):
    with attach(model, plan, cache=tmp_path):
        with memplan.materialise(model), memplan.materialise(model):
            assert_holds(dict(model.named_parameters()), weights)
            with pytest.raises(RunError, match="inside materialise"):
                model(**batch_of("llama"))
        with memplan.materialise(model):
            pass
        assert_equal(whole_run("llama"), train(model, "llama"))


def test_a_backward_after_detach_is_refused(model, plan, tmp_path):
    handle = attach(model, plan, cache=tmp_path)
    loss = loss_of(model(**batch_of("llama")))
    handle.detach()
    with pytest.raises(RunError, match="finish the backward first"):
        loss.backward()
    model.zero_grad()
    assert_equal(whole_run("llama"), train(model, "llama"))


def test_nothing_is_left_after_detach(model, plan, tmp_path):
    gc.collect()
    before, files = threads(), len(os.listdir("/proc/self/fd"))
    handle = attach(model, plan, cache=tmp_path)
    train(model, "llama", steps=1)
    gc.collect()  # what others left
    gc.disable()
    try:
        held = [weakref.ref(arena.bytes) for arena in inside.arenas(handle)]
        handle.detach()
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()
    assert not started_since(before)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert_only_whole_blocks(tmp_path)
    assert handle.record.passes == 1


def test_a_model_that_is_dropped_goes_with_all_it_had(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama")
    gc.collect()
    before, files = threads(), len(os.listdir("/proc/self/fd"))
    handle = attach(model, plan, cache=tmp_path)
    train(model, "llama", steps=1)
    held = [weakref.ref(model), weakref.ref(inside.device_arena(handle).bytes)]
    pools = [t for t in threading.enumerate() if t.name.startswith("memplan-")]
    assert pools
    del model, handle
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    for thread in pools:
        thread.join(10)
    assert not started_since(before)
    assert len(os.listdir("/proc/self/fd")) <= files
    assert_only_whole_blocks(tmp_path)


class OddLayer(nn.Module):
    """Parameters of all the shapes, orders and types that people make."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.transposed = nn.Parameter(torch.randn(width, width).t())
        both = torch.randn(2 * width, width)
        self.first, self.second = nn.Parameter(both[:width]), nn.Parameter(both[width:])
        self.column = nn.Parameter(both[:, 1])
        self.low = nn.Parameter(torch.randn(width, dtype=torch.bfloat16))
        self.one = nn.Parameter(torch.randn(1, 1))
        self.register_buffer("offset", torch.randn(width))
        self.lora_a, self.lora_b = nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.transposed + x @ self.first - x @ self.second + self.low.float() * self.scale
        y = y + self.offset * self.one + self.column[0]
        return x + self.down(torch.tanh(self.up(y))) * self.scale + self.lora_b(self.lora_a(x))


class Odd(Decoder):
    """A tied head on a stack of them."""

    def __init__(self, width: int = 48) -> None:
        super().__init__((OddLayer(width) for _ in range(6)), width)
        self.head.weight = self.embed.weight


def test_parameters_of_odd_shapes_and_orders(tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(0)
        return Odd().train()

    whole, model = made(), made()
    strides = {name: parameter.stride() for name, parameter in model.named_parameters() if "column" not in name}
    budgets = {"ram": "1GiB", "disk": "1GiB", "hardware": CPU, "loss": loss_of}
    roomy = memplan.plan(model, batch_of("plain"), vram="1GiB", **budgets)
    frozen = sum(block.size_bytes for block in roomy.table.blocks)
    vram = roomy.prediction.peaks.vram_bytes - frozen * 6 // 10
    for ram in ("1GiB", 17 * 2**20):
        plan = memplan.plan(model, batch_of("plain"), vram=vram, **budgets | {"ram": ram})
        assert sum(item.home != "device" for item in plan.items) >= 3
        with attach(model, plan, cache=tmp_path, checked=True):
            assert_equal(train(whole, "plain"), train(model, "plain"))
        assert {n: p.stride() for n, p in model.named_parameters() if "column" not in n} == strides
        assert model.head.weight is model.embed.weight
    assert_holds(model.state_dict(), whole.state_dict())


class Convolutions(nn.Module):
    """Kernels of one row, one column and one channel: of those no contiguity tells what their strides are."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.point = nn.Conv2d(16, 16, 1)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.lora = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(torch.tanh(self.depth(self.point(self.wide(x))))) + self.lora(x)


@pytest.mark.parametrize("vram", ["least", "1GiB"])
def test_channels_last_weights_keep_their_strides_and_their_bits(tmp_path, vram):
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(*(Convolutions() for _ in range(4)))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        return model.to(memory_format=torch.channels_last)

    def step(model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    batch = torch.randn(2, 8, 12, 12, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    model = made()
    strides = [parameter.stride() for parameter in model.parameters()]
    assert any(p.is_contiguous() and p.stride() != torch.empty(p.shape).stride() for p in model.parameters())
    expected = step(made())
    options = {"ram": "1GiB", "hardware": CPU, "loss": lambda y: y.square().mean()}
    if vram == "least":
        pins = {str(index): "host" for index in range(4)}
        plan = memplan.plan(model, {"input": batch}, vram="1GiB", pins=pins, **options)
    else:
        plan = memplan.plan(model, {"input": batch}, vram=vram, **options)
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        for got, true in zip(step(model), expected, strict=True):
            assert torch.equal(got, true)
        assert [parameter.stride() for parameter in model.parameters()] == strides
        assert vram != "least" or handle.record.loads > 4
    assert [parameter.stride() for parameter in model.parameters()] == strides
    for got, true in zip(step(model), expected, strict=True):
        assert torch.equal(got, true)


def test_what_is_unfrozen_in_mid_training_is_told_before_it_is_lost(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path) as handle:
        train(model, "llama", steps=1)
        streamed = [block.name for block in inside.streamed(handle)]
        layer = next(name for name in streamed if ".layers." in f".{name}")
        for module_name, module in model.named_modules():
            if module_name.endswith(layer):
                module.requires_grad_(True)
        with pytest.raises(RunError, match="is trained now"):
            train(model, "llama", steps=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
