"""Quantized bases: streamed as the tensors that they are made of, equal to the last bit, and each trap of theirs."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch

import memplan
from memplan.errors import DoesNotFitError, ModelError, MovedWeightsError
from memplan.model.weights import is_wrapper, own_weights, wrapped_parts
from memplan.run.attach import attach
from tests.run.test_memory import counted_step
from tests.run.test_parity import compare, plan_for
from tests.support import inside, quantized
from tests.support.quantized import QUANTIZED
from tests.support.training import CHECKPOINTING, CPU, as_it_lies, assert_equal, batch_of, train

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers' own, of versions and of float32 inputs


def model_of(kind, **options):
    return quantized.make(kind, **options)


@cache
def maker(name):
    return lambda kind, **options: quantized.make(name, **options)


def tensors_of(model):
    """A copy of every tensor that the model's weights are made of, by name."""
    found = {}
    for name, module in model.named_modules():
        for weight in own_weights(module, f"{name}."):
            found[weight.name] = weight.tensor.detach().as_subclass(torch.Tensor).clone()
    return found


def entries(state):
    return {f"{k}.{i}": p.clone() for k, v in state.items() for i, p in enumerate(wrapped_parts(v))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.quick("nf4-plain", "torchao-int8-plain", "gptq-like-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_three_steps(kind, checked, tmp_path):
    with compare("llama", make=maker(kind), checked=checked, tmp_path=tmp_path) as handle:
        assert handle.record.loads > 0
        assert handle.record.misses == 0
        moved = {t.name.rsplit(".", 1)[-1] for b in handle.plan.table.blocks for t in b.tensors}
        assert moved & {"absmax", "SCB", "qdata", "qweight"}


@pytest.mark.quick("nf4-nested-inside-reentrant", "nf4-nested-inside-other")
@pytest.mark.parametrize("checkpointing", [c for c in CHECKPOINTING if c != "off"])
@pytest.mark.parametrize(
    "kind", ["nf4-nested", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("int8", "torchao-int8"))]
)
def test_checkpointed(kind, checkpointing, tmp_path):
    options = {"checkpointing": checkpointing, "dropout": 0.2, "accumulation": 2, "checked": True}
    compare("llama", make=maker(kind), **options, tmp_path=tmp_path).detach()


@pytest.mark.quick("nf4-nested-keep", "torchao-int8-recompute")
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["nf4-nested", "torchao-int8"])  # int8 fails at its second step without a plan too
def test_dora(kind, activations, tmp_path):
    """Its layers read the base beside the call of it; PEFT then puts a copy in the base's place that lies where it
    does.
    """
    whole, planned = (quantized.make(kind, use_dora=True) for _ in range(2))
    given = {"ram": "1GiB", "hardware": CPU, "activations": activations, "gains": False}
    with pytest.raises(DoesNotFitError) as refused:
        memplan.plan(planned, batch_of("llama"), vram=1, **given)
    plan = memplan.plan(planned, batch_of("llama"), vram=refused.value.least_vram_bytes, **given)
    results = []
    for model in (whole, planned):
        handle = memplan.attach(model, plan, cache=tmp_path) if model is planned else None
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        found = []
        for step in range(3):
            loss = model(**batch_of("llama", seed=step)).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step(), optimizer.zero_grad()
        results.append(found)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert handle.record.loads
    handle.detach()
    assert_same(tensors_of(planned), tensors_of(whole))


@pytest.mark.quick("int8", "torchao-int4")
@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int4", "gptq-like"])
def test_from_the_least_that_works(kind, tmp_path):
    compare("llama", make=maker(kind), share=0.0, checked=True, tmp_path=tmp_path).detach()


@pytest.mark.quick("nf4-nested", "int8", "torchao-int8", "gptq-like")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_memory(kind, tmp_path):
    """What a trace on fake tensors says of dequantized weights is what a run holds."""
    model = model_of(kind)
    plan = plan_for(model, "llama")
    with attach(model, plan, cache=tmp_path):
        peak = counted_step(model, "llama")
    predicted = plan.prediction.peaks.vram_bytes
    assert peak <= plan.budgets.vram_bytes
    # What a 4-bit product allocates within itself is predicted and not seen by a count of tensors.
    within = 64 * 192 * 4 if kind in ("nf4", "nf4-nested", "fp4") else 0
    assert 0.9 * (predicted - within) <= peak <= predicted


@pytest.mark.quick("nf4", "torchao-int8", "gptq-like")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_comes_back_as_it_was(kind, tmp_path):
    model = model_of(kind)
    before = tensors_of(model)
    classes = [type(p) for p in model.parameters()]
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        pass
    assert_same(before, tensors_of(model))
    assert classes == [type(p) for p in model.parameters()]
    train(model, "llama", steps=1)
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        train(model, "llama", steps=1)
    assert_same(before, tensors_of(model))
    whole = model_of(kind)
    assert_equal(train(whole, "llama", steps=1), train(model_of(kind), "llama", steps=1))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_attached_after_a_first_forward(kind, tmp_path):
    """[Trap] From the first forward on bitsandbytes keeps int8 weights in the module's state, not in the parameter."""
    whole, model = model_of(kind), model_of(kind)
    for one in (whole, model):
        one(**batch_of("llama"))
    with attach(model, plan_for(model, "llama"), checked=True, cache=tmp_path):
        planned = train(model, "llama")
    assert_equal(train(whole, "llama"), planned)


@pytest.mark.quick("fp4", "int8", "torchao-int4", "gptq-like")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_others_read(kind, tmp_path):
    whole, model = model_of(kind), model_of(kind)
    expected = entries(whole.state_dict())
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        assert_same(expected, entries(model.state_dict()))
        with memplan.materialise(model):
            assert_same(tensors_of(whole), tensors_of(model))
        train(model, "llama", steps=1)
        train(whole, "llama", steps=1)
        assert_same(entries(whole.state_dict()), entries(model.state_dict()))


@pytest.mark.parametrize("kind", ["torchao-int8", "gptq-like", "nf4-nested"])
def test_what_is_away_is_loud(kind, tmp_path):
    """Away, floating-point parts read as NaN and integers as all ones: never another block's bytes."""
    model = model_of(kind)
    with attach(model, plan_for(model, "llama", share=0.0), cache=tmp_path) as handle:
        train(model, "llama", steps=1)
        away = inside.away(handle)
        assert away
        for streamed in away:
            for tensor, _, _ in streamed.pointers:
                plain = as_it_lies(tensor)
                if plain.dtype.is_floating_point:
                    assert plain.isnan().all()
                else:
                    assert (plain == torch.full((), 255, dtype=torch.uint8).view(torch.int8).to(plain.dtype)).all() or (
                        plain.dtype == torch.uint8 and (plain == 255).all()
                    )


@pytest.mark.quick("nf4-nested", "torchao-int8")
@pytest.mark.parametrize("kind", ["nf4-nested", "int8", "torchao-int8"])
def test_a_move_to_where_it_is(kind, tmp_path):
    """[Trap] ``QuantState.to`` changes a shared object in place, and torchao's ``.data`` cannot be set."""
    whole, model = model_of(kind), model_of(kind)
    with attach(model, plan_for(model, "llama"), checked=True, cache=tmp_path):
        for layer in model.base_model.model.model.layers:
            layer.mlp.to("cpu")
        planned = train(model, "llama")
        if kind == "torchao-int8":
            with pytest.raises(MovedWeightsError):
                model.base_model.model.model.layers[0].half()
    assert_equal(train(whole, "llama"), planned)


@pytest.mark.quick("nf4", "int8", "torchao-int8")
@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8", "torchao-int8", "gptq-like"])
def test_evaluation_in_mid_training(kind, tmp_path):
    """[Trap] In an evaluation bitsandbytes repacks 4-bit weights on some CPUs; training could not go on."""
    whole, model = model_of(kind), model_of(kind)
    repacking = "support_avx512bf16_for_cpu"
    for module in whole.modules():
        if repacking in module.__dict__:
            module.__dict__[repacking] = 0
    given = [m.__dict__[repacking] for m in model.modules() if repacking in m.__dict__]

    def run(model):
        runs = [train(model, "llama", steps=1)]
        model.eval()
        with torch.no_grad():
            evaluated = model(**batch_of("llama")).loss
            tokens = model.generate(input_ids=batch_of("llama")["input_ids"], max_new_tokens=3, do_sample=False)
        model.train()
        runs.append(train(model, "llama", steps=1))
        return runs, evaluated, tokens

    expected = run(whole)
    with attach(model, plan_for(model, "llama"), checked=True, cache=tmp_path):
        found = run(model)
    for one, other in zip(expected[0], found[0], strict=True):
        assert_equal(one, other)
    assert torch.equal(expected[1], found[1])
    assert torch.equal(expected[2], found[2])
    assert given == [m.__dict__[repacking] for m in model.modules() if repacking in m.__dict__]


def test_weights_that_were_repacked_are_refused():
    model = model_of("nf4")
    state = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        memplan.plan(model, batch_of("llama"), vram="1GiB", ram="1GiB", hardware=CPU)


def test_weights_that_are_not_quantized_yet_are_refused():
    import bitsandbytes

    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64), torch.nn.Linear(64, 64))
    with pytest.raises(ModelError, match="not been quantized yet"):
        memplan.plan(model, {"input": torch.ones(2, 64)}, vram="1GiB", ram="1GiB", hardware=CPU, loss=lambda y: y.sum())


def test_an_unknown_kind_of_parameter_is_refused():
    class Strange(torch.nn.Parameter):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[0].weight = Strange(torch.ones(64, 64), requires_grad=False)
    with pytest.raises(ModelError, match="Strange"):
        memplan.plan(model, {"input": torch.ones(2, 64)}, vram="1GiB", ram="1GiB", hardware=CPU, loss=lambda y: y.sum())


def test_nothing_is_left_of_a_dropped_model(tmp_path):
    model = model_of("torchao-int8")
    assert any(is_wrapper(p) for p in model.parameters())
    handle = attach(model, plan_for(model, "llama"), cache=tmp_path)
    arena = inside.device_arena(handle).bytes.untyped_storage()._weak_ref()
    handle.detach()
    del handle, model
    gc.collect()
    assert torch.UntypedStorage._expired(arena)


@pytest.mark.parametrize(
    "kind", ["nf4-nested", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("int8", "torchao-int8"))]
)
def test_with_a_trainer(kind, tmp_path):
    """The way people use them: a quantized base, PEFT, transformers' Trainer with evaluation, `memplan.wrap`."""
    from transformers import Trainer, TrainingArguments

    rows = [{name: value[0] for name, value in batch_of("llama", seed=100 + i).items()} for i in range(8)]

    def trainer(name):
        model = model_of(kind, dropout=0.1)
        for module in model.modules():
            if "support_avx512bf16_for_cpu" in module.__dict__:
                module.__dict__["support_avx512bf16_for_cpu"] = False
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=4, per_device_train_batch_size=2, eval_strategy="steps",
            eval_steps=2, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])

    whole, planned = trainer("whole"), trainer("planned")
    whole.train()
    with pytest.raises(DoesNotFitError) as refused:
        memplan.wrap(trainer("refused"), vram="64KiB", ram="1GiB", hardware=CPU).train()
    memplan.wrap(planned, vram=refused.value.least_vram_bytes + 4096, ram="1GiB", hardware=CPU)
    planned.train()
    assert planned.memplan.record.loads > 0
    expected = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    for name, parameter in planned.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, expected[name]), name
    evals = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (whole, planned)]
    assert evals[0] == evals[1]
