"""A mapped model that waits to be placed: what the script moves of it, and what it is called with before it is
trained.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, LlamaForCausalLM

import memplan
from memplan.trainers.loading.deferred_placement import ask, asked_device, forget, move, tell_device, wait, waits
from memplan.trainers.loading.entries import MOST_CALLS
from memplan.trainers.loading.hf_transformers import skeleton_of
from memplan.trainers.loading.mapped_weights import folder_of, is_mapped, map_weights
from tests.support.training import CPU


@pytest.fixture
def model(checkpoint):
    made = skeleton_of(LlamaForCausalLM, checkpoint, {})
    map_weights(made, checkpoint)
    return made


@pytest.fixture
def calls():
    return []


def waiting(model, calls):
    wait(model, lambda *given: calls.append(given))  # which returns None: nothing is to be done again
    return model


IDS = torch.tensor([[3, 4, 5]])


def test_it_is_placed_before_its_first_call_to_be_trained_and_then_no_more(model, calls):
    waiting(model, calls)
    whole = LlamaForCausalLM.from_pretrained(folder_of(model))
    model.eval()
    assert torch.equal(model(IDS).logits, whole(IDS).logits)
    model.train()
    with torch.no_grad():
        model(IDS)
    assert (calls, waits(model)) == ([], True)
    model(input_ids=IDS)
    ((placed, step),) = calls
    assert placed is model
    assert [(call.entry, call.args, call.kwargs) for call in step.calls] == [("", (), {"input_ids": IDS})]
    assert not waits(model)
    model(IDS)
    assert len(calls) == 1


def test_a_move_is_put_off_for_what_is_mapped_and_done_when_asked(model, calls, checkpoint):
    model = waiting(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), calls)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    model.to("meta")
    assert asked_device(model) == torch.device("meta")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.device.type == "meta"
        else:
            assert parameter.data_ptr() == before[name]
    assert all(buffer.device.type == "meta" for buffer in model.buffers())
    other = copy.deepcopy(model)
    for moved in (model, other):
        forget(moved)
        move(moved)
        assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
        assert not any("_apply" in module.__dict__ for module in moved.modules())
        assert asked_device(moved) is None


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_not_trained_in_part_moves_as_ever(model, calls, trained):
    waiting(model, calls).requires_grad_(trained)
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert asked_device(model) is None


def test_an_error_in_placing_leaves_it_waiting(model):
    def fails(*given):
        raise ValueError("too much")

    wait(model.train(), fails)
    for _ in range(2):
        with pytest.raises(ValueError, match="too much"):
            model(IDS)
        assert waits(model)


def test_it_says_that_it_is_where_it_was_asked_to_be(checkpoint):
    class Told(LlamaForCausalLM):
        device = LlamaForCausalLM.device

    tell_device(Told)
    made = skeleton_of(Told, checkpoint, {})
    map_weights(made, checkpoint)
    assert made.device == torch.device("cpu")
    model = waiting(get_peft_model(made, LoraConfig(r=4, target_modules="all-linear")), []).to("meta")
    assert model.device == torch.device("meta")
    move(model)
    assert model.device == torch.device("meta")


def test_a_module_within_is_called_where_its_weights_are(model, calls):
    """A script that has moved its model finds what it gets from a part of it there."""
    model = waiting(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), calls).to("meta")
    with torch.no_grad():
        assert model.get_base_model().model.embed_tokens(IDS).device.type == "meta"
    assert model.get_input_embeddings()(IDS).device.type == "meta"  # nothing of it is trained
    assert (calls, waits(model)) == ([], True)


def test_it_is_placed_for_the_module_that_is_called(model, calls):
    model = waiting(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), calls)
    model.get_base_model().model.embed_tokens(IDS)
    model.get_base_model().model(input_ids=IDS)
    ((_, step),) = calls
    names = [call.entry.removeprefix("base_model.model.") for call in step.calls]
    assert (names, step.reads_rest) == (["model.embed_tokens", "model"], True)
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


def test_a_part_that_is_copied_or_pickled_is_called_as_ever(model, calls):
    waiting(model, calls)
    held = io.BytesIO()
    torch.save(model.lm_head, held)
    held.seek(0)
    x = torch.randn(1, 64)
    for other in (copy.deepcopy(model.lm_head), torch.load(held, weights_only=False)):
        assert torch.equal(other(x), model.lm_head(x))
    assert (calls, waits(model)) == ([], True)


def test_the_first_step_is_all_that_its_passes_call(model):
    """Micro-batches of different calls count together, of equal ones once, and a graph is kept until the step."""
    told = []
    wait(model, lambda model, step: lambda *given: told.append(given))
    model.lm_head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for _ in range(2):
        for _ in range(2):
            one, other = model(IDS).logits, model(IDS[:, :2]).logits
            (one.mean() + other.mean()).backward(retain_graph=True)
            other.mean().backward()
            del one, other
        model(IDS[:, :1]).logits.mean().backward()
        assert not told or len(told) == 1
        optimizer.step()
    ((step, differs),) = told
    assert differs
    assert [call.args[0].shape for call in step.calls] == [(1, 3), (1, 2), (1, 1)]
    assert not any("_call_impl" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_of_parts_of_a_waiting_model_are_called_themselves(model, calls, copied):
    waiting(model, calls)
    other = copied(model.lm_head)
    other._parameters = {"weight": torch.nn.Parameter(torch.zeros_like(model.lm_head.weight)), "bias": None}
    states = torch.ones(1, model.config.hidden_size)
    with torch.no_grad():
        assert not other(states).any()
        assert not model.lm_head._replicate_for_data_parallel().__dict__.keys() & {"_call_impl", "__getstate__"}
        assert model.lm_head(states).any()
    forget(model)
    assert not any({"_call_impl", "__getstate__"} & module.__dict__.keys() for module in model.modules())


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_only_ever_called_otherwise_is_looked_at_no_more(calls, trained):
    model = waiting(torch.nn.Linear(2, 2), calls).requires_grad_(trained).eval()
    for _ in range(MOST_CALLS):
        model(torch.zeros(1, 2))
    assert waits(model)
    model(torch.zeros(1, 2))
    assert (calls, waits(model), "_call_impl" in model.__dict__) == ([], False, False)


def test_a_plan_that_the_script_makes_places_nothing(model, calls):
    model = waiting(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), calls).train()
    memplan.plan(model, {"input_ids": IDS, "labels": IDS}, vram="64MiB", ram="64MiB", hardware=CPU)
    assert (calls, waits(model)) == ([], True)


def test_what_is_no_move_is_done_at_once(model, calls):
    waiting(model, calls)
    weight = model.lm_head.weight
    before = weight.detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(weight, before.to(torch.bfloat16))
    model._apply(lambda tensor: tensor * 2 if tensor.is_floating_point() else tensor)
    assert torch.equal(weight, before.to(torch.bfloat16) * 2)
    assert asked_device(model) is None
    assert is_mapped(model)


def test_a_copy_waits_for_itself(model, calls):
    waiting(model, calls)
    other = copy.deepcopy(model).train()
    other(IDS)
    assert [given[0] for given in calls] == [other]
    assert waits(model)


def test_what_is_pickled_waits_for_nothing(model, calls):
    waiting(model, calls)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    other = torch.load(held, weights_only=False)
    assert waits(model)
    assert not waits(other)
    assert torch.equal(other(IDS).logits, model.eval()(IDS).logits)
    assert not {"_apply", "__deepcopy__", "__reduce_ex__"} & other.__dict__.keys()


@pytest.mark.full
def test_what_torch_compile_makes_is_as_without(model, calls):
    waiting(model, calls).train()
    compiled = torch.compile(model, backend="eager")
    whole = LlamaForCausalLM(AutoConfig.from_pretrained(folder_of(model))).train()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(compiled(IDS).logits, torch.compile(whole, backend="eager")(IDS).logits)
    assert calls == []


def test_what_the_script_attaches_itself_waits_no_more_and_keeps_its_guard(model, calls):
    model = waiting(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")), calls).train()
    batch = {"input_ids": IDS, "labels": IDS}
    plan = memplan.plan(model, batch, vram="64MiB", ram="64MiB", hardware=CPU, pins={"layers.1": "host"})
    with memplan.attach(model, plan):
        model(**batch).loss.backward()
        assert (calls, waits(model)) == ([], False)
        with pytest.raises(memplan.MovedWeightsError):
            model.to(torch.bfloat16)
    assert not any("_apply" in module.__dict__ for module in model.modules())


def test_a_device_that_was_asked_for_at_once_is_where_it_goes(calls):
    """As by ``device_map="auto"``: what is not trained in part goes there as it is first called."""
    model = waiting(torch.nn.Linear(2, 2), calls).requires_grad_(False)
    ask(model, torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.eval()(torch.zeros(1, 2, device="meta")).device.type == "meta"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (calls, waits(model), asked_device(model)) == ([], False, None)
