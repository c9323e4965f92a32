"""Kinds of models and of arithmetic on the simulated device, to the bit what the CPU computes of the whole model.

Whichever of copies and compute goes first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import pytest
import torch
from torch import nn

from memplan.api import smaller
from memplan.run.attach import attach
from tests.device import backend
from tests.run.test_parity import plan_for
from tests.support import devices, families, quantized
from tests.support.training import assert_equal, make

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers' own, and dynamo's of a leaf's gradient

SIM = devices.Apart("sim")


def full(*values, id=None):
    return pytest.param(*values, id=id, marks=pytest.mark.full)


CHECKED = pytest.mark.parametrize("checked", [False, full(True)], ids=["plain", "checked"])


def compare(whole, apart, model, kind, tmp_path, *, checked=False, share=0.4, offload=(), around_forward=nullcontext):
    plan = plan_for(model, kind, share=share, offload=offload)
    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        run = apart.train(model, kind, around_forward=around_forward)
    assert_equal(whole, run)
    assert handle.record.loads > 0


def family_of(family: str, precision: str) -> nn.Module:
    """Without dropout, whose random numbers are each device's own."""
    model = families.make(family, precision)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@cache
def whole_family(family: str, precision: str):
    """On the CPU; on the device itself where autocast lowers other operators there (a GPU's)."""
    if precision == "autocast":
        return SIM.train(family_of(family, precision).to(SIM.device), family, around_forward=lowered)
    return SIM.whole(family_of(family, precision), family, around_forward=families.around(precision))


def lowered():
    return torch.autocast("sim", torch.bfloat16)


@CHECKED
@pytest.mark.parametrize("offload", [(), full("all")], ids=["kept", "offloaded"])
@pytest.mark.parametrize(
    ("family", "precision"),
    [
        ("mixtral-experts", "float32"), ("llama", "autocast"),
        *(full(family, "float32") for family in ("qwen3", "gemma2", "bloom", "mixtral-attention")),
        *(full(family, "autocast") for family in ("mixtral-attention", "t5", "plain")),
        *(full(family, "bfloat16") for family in ("llama", "t5", "plain")),
    ],
)  # fmt: skip
def test_families(family, precision, offload, checked, apart, tmp_path):
    around = lowered if precision == "autocast" else nullcontext
    compare(
        whole_family(family, precision), apart, family_of(family, precision), family, tmp_path,
        offload=offload, checked=checked, around_forward=around,
    )  # fmt: skip


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Have bitsandbytes multiply as it does on GPUs: int8 by int8, where on the CPU it dequantizes."""
    from bitsandbytes.autograd import _functions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_functions, "MatMul8bitFp", _functions.MatMul8bitLt)
        yield


@pytest.fixture
def no_inductor() -> Iterator[None]:
    """What bitsandbytes compiles runs as it is: with inductor it would fail, anew in each call, and run so too."""
    with torch.compiler.set_stance("force_eager"):
        yield


@cache
def whole_quantized(kind: str):
    with as_on_a_gpu():
        return SIM.whole(quantized.make(kind), "llama")


@CHECKED
@pytest.mark.parametrize("share", [full(0.0), 0.4])
@pytest.mark.parametrize(
    "kind",
    ["nf4-nested", "int8", full("torchao-int8"), full("nf4"), full("fp4"), full("torchao-int4"), full("gptq-like")],
)
def test_quantized(kind, share, checked, apart, no_inductor, tmp_path):
    compare(whole_quantized(kind), apart, quantized.make(kind), "llama", tmp_path, share=share, checked=checked)


def compiled(kind: str, way: str, backend: str) -> nn.Module:
    model = make(kind)
    layers = model.layers if kind == "plain" else model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        if way == "call":
            layer.compile(backend=backend)
        else:
            layers[index] = torch.compile(layer, backend=backend)
    return model


@CHECKED
@pytest.mark.parametrize(
    ("kind", "way", "compiler"),
    [
        ("plain", "call", "aot_eager"), full("plain", "wrapped", "aot_eager"), full("plain", "call", "eager"),
        full("llama", "call", "aot_eager"), full("llama", "wrapped", "eager"),
    ],
)  # fmt: skip
def test_compiled_layers(kind, way, compiler, checked, apart, tmp_path, monkeypatch):
    """Not with inductor, which knows no such device."""
    monkeypatch.setattr("tests.support.training.count_forwards", lambda model, counter: [])  # a graph for each layer
    torch._dynamo.reset()
    try:
        expected = SIM.whole(compiled(kind, way, compiler), kind)
        compare(expected, apart, compiled(kind, way, compiler), kind, tmp_path, checked=checked)
    finally:
        torch._dynamo.reset()


def recovered(model: nn.Module, run=None, accumulation: int = 2):
    """Two steps of AdamW; ``run``: what does a micro-batch, again where it must."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for step in range(2):
        for micro in range(accumulation):
            given = {
                name: value.to(trained[0].device)
                for name, value in families.batches("llama", seed=step * accumulation + micro).items()
            }

            def micro_batch(given=given):
                loss = model(**given).loss
                loss.backward()
                return loss.detach()

            found.append(micro_batch() if run is None else run(micro_batch))
        found += [p.grad.clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
    return [value.cpu() for value in (*found, *(p.detach() for p in trained))]


@cache
def never_short():
    with SIM.attention():
        return recovered(make("llama"))


@CHECKED
@pytest.mark.parametrize("offload", [(), full("all")], ids=["kept", "offloaded"])
def test_where_the_device_has_less_than_was_said(offload, checked, apart, tmp_path):
    """It runs out of memory itself; the micro-batch is done over under a smaller plan until it fits."""
    model = make("llama")
    plan = plan_for(model, "llama", share=0.9, offload=offload)
    limit = int(0.8 * plan.prediction.peaks.vram_bytes)
    with (
        backend.limited(limit),
        attach(model, plan, cache=tmp_path, checked=checked, replan=smaller) as handle,
    ):
        found = recovered(model, handle.micro_batch)
        assert handle.recoveries >= 1
    assert all(torch.equal(one, other) for one, other in zip(never_short(), found, strict=True))
