"""Weights that go to shared memory while they are streamed: as without a plan, or refused before they move."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import memplan
from memplan.errors import RunError
from tests.run.test_same_again import LAYERS, Model, one, planned, train

PINS = {f"layers.{index}": "device" if index == 2 else "host" for index in range(LAYERS)}


def sent(value):
    return pickle.loads(ForkingPickler.dumps(value))


@pytest.mark.parametrize("share", [sent, lambda weight: weight.share_memory_()])
def test_a_weight_that_stays_on_the_device_is_refused_and_stays(share):
    expected, model = train(Model(), one), Model()
    with memplan.attach(model, planned(model, "keep", pins=PINS)):
        with pytest.raises(RunError, match="shared memory"):
            share(model.layers[2].up.weight)
        assert all(torch.equal(a, b) for a, b in zip(expected, train(model, one), strict=True))


@pytest.mark.parametrize("share", [sent, lambda value: value.share_memory_()])
def test_a_state_dicts_entry_of_what_stays_on_the_device_is_refused_and_stays(share):
    """It is the weight's own memory: what is written to it reaches the weight, and would not once it has moved."""

    def run(model):
        with torch.no_grad():
            model.state_dict()["layers.2.up.weight"].mul_(1.5)
        return train(model, one)

    expected, model = run(Model()), Model()
    with memplan.attach(model, planned(model, "keep", pins=PINS)):
        with pytest.raises(RunError, match="shared memory"):
            share(model.state_dict()["layers.2.up.weight"])
        assert all(torch.equal(a, b) for a, b in zip(expected, run(model), strict=True))


def test_a_queue_of_processes_takes_a_state_dict():
    """Refused in the queue's own thread it would never arrive."""
    model = Model()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with memplan.attach(model, planned(model, "keep", pins=PINS)):
        queue = torch.multiprocessing.get_context("spawn").Queue()
        queue.put(model.state_dict())
        found = queue.get(timeout=60)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        del found
        queue.close()
        queue.join_thread()


def test_an_open_weight_is_refused_and_stays():
    expected, model, errors = train(Model(), one), Model(), []

    def share(module, args, output):
        with pytest.raises(RunError, match="shared memory") as error:
            ForkingPickler.dumps(model.layers[1].up.weight)
        errors.append(error)

    with memplan.attach(model, planned(model, "keep")):
        hook = model.layers[1].down.register_forward_hook(share)
        found = train(model, one)
        hook.remove()
    assert errors
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_what_is_written_to_a_state_dict_that_was_shared_reaches_a_streamed_weight():
    def run(model):
        name = "layers.1.up.weight"
        value = model.state_dict()[name]
        value.share_memory_()
        value.mul_(1.5)
        return [*train(model, one), model.state_dict()[name].clone()]

    expected, model = run(Model()), Model()
    with memplan.attach(model, planned(model, "keep")):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(model), strict=True))
