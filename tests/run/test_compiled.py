"""Layers that torch.compile has compiled: as compiled in a whole run, to the last bit; what is compiled wider is
refused.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.errors import ModelError, RunError
from memplan.run.attach import attach
from tests.run.adversary import ALL
from tests.run.test_parity import plan_for
from tests.support.training import CPU, assert_equal, batch_of, loss_of, make, train

WAYS = ("call", "wrapped")
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning",  # dynamo looks at it itself
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # inductor uses it as it is imported
)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_counting_hooks(monkeypatch):
    """A hook for each name would be a graph for each layer."""
    monkeypatch.setattr("tests.support.training.count_forwards", lambda model, counter: [])


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.layers if hasattr(model, "layers") else model.get_base_model().model.layers


def compiled(kind: str, way: str, backend: str, **options) -> nn.Module:
    model = make(kind, **options)
    layers = layers_of(model)
    for index, layer in enumerate(layers):
        if way == "call":
            layer.compile(backend=backend)
        else:
            layers[index] = torch.compile(layer, backend=backend)
    return model


def compare(kind, way, backend, cache, *, checked=False, around_forward=torch.enable_grad, offload=(), **options):
    """After the first pass, of the whole run and of the planned one, nothing is compiled."""
    runs = []
    for planned in (False, True):
        torch._dynamo.reset()
        model = compiled(kind, way, backend, **options)
        if planned:
            handle = attach(model, plan_for(model, kind, offload=offload), checked=checked, cache=cache)
        train(model, kind, steps=1, around_forward=around_forward)
        with torch._dynamo.config.patch(error_on_recompile=True):
            runs.append(train(model, kind, around_forward=around_forward))
    assert_equal(*runs)
    if checked:
        assert handle.checked_reads > 0
    handle.detach()
    return handle


@pytest.mark.quick("aot_eager-call-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.full), "aot_eager"])
def test_compiled_layers_are_equal(backend, way, checked, tmp_path):
    handle = compare("plain", way, backend, tmp_path, checked=checked, dropout=0.1)
    assert handle.record.misses == handle.record.out_of_order == 0


@pytest.mark.each_value
@pytest.mark.full
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("kind", ["plain", "llama"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_layers_are_equal_with_inductor(way, kind, checked, tmp_path):
    compare(kind, way, "inductor", tmp_path, checked=checked, dropout=0.1)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_compiled_layers_under_autocast(tmp_path):
    compare("plain", "call", "aot_eager", tmp_path, checked=True, around_forward=autocast)


@pytest.mark.full
def test_compiled_layers_that_are_checkpointed_within(tmp_path):
    compare("llama", "call", "aot_eager", tmp_path, checkpointing="native")


@pytest.mark.quick("plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_compiled_layers_whose_activations_are_offloaded(tmp_path, checked):
    handle = compare("plain", "call", "aot_eager", tmp_path, checked=checked, offload="all")
    assert handle.record.offloaded_bytes > 0


@pytest.mark.quick("EarlyTransfers")
@pytest.mark.parametrize("transfers", ALL, ids=lambda kind: kind.__name__)
def test_compiled_layers_with_transfers_that_do_their_worst(transfers, tmp_path, monkeypatch):
    monkeypatch.setattr("memplan.run.modules.install.CpuTransfers", transfers)
    compare("plain", "call", "aot_eager", tmp_path)


@pytest.mark.full
def test_compiled_layers_that_are_given_a_cache_are_compiled_no_more_often_than_whole():
    """Past its limit of compiles a layer runs as it is, with other bits: the recompute must need no compiles of its
    own.
    """
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=128,
        use_cache=True,
    )
    runs = []
    for planned in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()
        for layer in model.base_model.model.model.layers:
            layer.compile()
        if planned:
            given = {"ram": "64MiB", "hardware": CPU, "activations": "recompute", "gains": False}
            with pytest.raises(memplan.DoesNotFitError) as caught:
                memplan.plan(model, cached(0, 17), vram=1, **given)
            plan = memplan.plan(model, cached(0, 17), vram=caught.value.least_vram_bytes, **given)
            handle = attach(model, plan)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step, length in enumerate((12, 17, 17, 9)):
            loss = model(**cached(step, length)).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step(), optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                found.append(model(**cached(9, 12)).loss)
            model.train()
        runs.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    assert handle.record.loads
    handle.detach()


def cached(number, length):
    ids = torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(number))
    return {"input_ids": ids, "labels": ids}


def test_the_model_compiled_as_a_whole_is_refused(tmp_path):
    model = make("plain")
    plan = plan_for(model, "plain")
    model.compile(backend="eager")
    for whole in (model, torch.compile(make("plain"), backend="eager")):
        with pytest.raises(ModelError, match=r"compiled as a whole.*layer\.compile\(\)"):
            attach(whole, plan, cache=tmp_path)


@pytest.mark.quick("after-None")
@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("ran", [False, True], ids=["after", "before"])
def test_a_compiled_region_around_layers_is_refused(way, ran, tmp_path):
    """Whether it was compiled and run before attach, and would see no hook, or is compiled after it."""
    model = make("plain") if way is None else compiled("plain", way, "eager")
    plan = plan_for(model, "plain")
    batch = batch_of("plain")
    region = torch.compile(lambda x: model.layers[1](model.layers[0](model.embed(x))), backend="eager")
    layers = torch.compile(lambda x: model.layers[1](model.layers[0](x)), backend="eager")
    x = model.embed(batch["input_ids"]).detach()
    if ran:
        expected = [region(batch["input_ids"]), layers(x)]
    with attach(model, plan, cache=tmp_path):
        for function, given in ((region, batch["input_ids"]), (layers, x)):
            with pytest.raises(RunError, match="within a compiled region"):
                function(given)
        assert torch.isfinite(loss_of(model(**batch)))
    if ran:
        for value, function, given in zip(expected, (region, layers), (batch["input_ids"], x), strict=True):
            assert torch.equal(value, function(given))


def test_a_region_that_ran_before_is_refused_while_the_weights_are_there(tmp_path):
    """Placeholders' strides, or a forward that is replaced, would have its guards fail; a hook does not."""
    model = make("plain")
    plan = plan_for(model, "plain", share=0.8)  # not all are recomputed
    x = model.embed(batch_of("plain")["input_ids"]).detach()
    regions = [torch.compile(lambda x, layer=layer: torch.tanh(layer(x)), backend="eager") for layer in model.layers]
    for region in regions:
        region(x)
    with attach(model, plan, cache=tmp_path):
        for layer, region in zip(model.layers, regions, strict=True):
            layer(x)
            with pytest.raises(RunError, match="within a compiled region"):
                region(x)


def test_to_compile_under_a_plan_is_refused(tmp_path):
    model = make("plain")
    with attach(model, plan_for(model, "plain"), cache=tmp_path):
        for module in (model, model.layers[0]):
            with pytest.raises(RunError, match="compiled while memplan streams"):
                module.compile()
    model.compile(backend="eager")


def test_what_was_compiled_is_not_called_beside(tmp_path):
    model = compiled("plain", "wrapped", "eager")
    x = model.embed(batch_of("plain")["input_ids"]).detach()
    with attach(model, plan_for(model, "plain"), cache=tmp_path):
        model(**batch_of("plain"))
        with pytest.raises(RunError, match="called without what torch"):
            model.layers[0]._orig_mod(x)
    assert torch.equal(model.layers[0]._orig_mod(x), model.layers[0](x))


def test_a_backward_in_a_compiled_region(tmp_path):
    backward = torch.compile(lambda loss: loss.backward(), backend="eager")
    found = []
    for planned in (False, True):
        model = compiled("plain", "call", "eager")
        if planned:
            attach(model, plan_for(model, "plain"), cache=tmp_path, checked=True)
        backward(loss_of(model(**batch_of("plain"))))
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
