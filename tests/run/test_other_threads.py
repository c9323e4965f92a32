"""Threads that read frozen weights while another one computes read what those are."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn import functional

import memplan
from memplan.errors import RunError
from tests.run.test_same_again import Layer, Model, one, planned, train

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))


class Asks(Layer):
    """Has another thread read its weights in the middle of its forward: here they are open."""

    ask = None

    def forward(self, hidden, scale=1.0):
        hidden = hidden + self.down(functional.gelu(self.up(hidden) * scale))
        if self.ask is not None:
            self.ask(self)
        return hidden + self.adapter(hidden)


READS = {
    "values": lambda weight: weight * 1,
    "norm": torch.linalg.vector_norm,
    "product": lambda weight: functional.linear(X, weight),
    "kept": lambda weight: weight.detach(),
    "view": lambda weight: weight.t()[1:],
    "copied into": lambda weight: torch.zeros(48, 16).copy_(weight),
    "stacked": lambda weight: torch.stack([weight, weight]),
    "to": lambda weight: weight.to(torch.float64),
    "item": lambda weight: torch.tensor(weight[3, 2].item()),
    "gradient": lambda weight: torch.autograd.grad((functional.linear(XG, weight) ** 2).sum(), XG)[0],
    "state_dict": None,
}
XG = X.clone().requires_grad_()


def read_beside(pool, reads):
    found = []

    def ask(layer):
        def act():
            if reads is None:
                return layer.state_dict()["up.weight"]
            return reads(layer.up.weight)

        found.append(pool.submit(act).result(timeout=60))

    return ask, found


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("since", ["before", "after"])
def test_what_is_read_in_mid_forward(name, activations, since):
    """By a thread that started before ``attach``, and by one that started after."""

    def run(model):
        ask, found = read_beside(pool, READS[name])
        for layer in model.layers:
            layer.ask = ask
        result = train(model, one)
        return [*result, *found]

    with ThreadPoolExecutor(1) as pool:
        expected = [value.clone() for value in run(Model(Asks))]
        model = Model(Asks)
        if since == "before":
            pool.submit(int).result()
        with memplan.attach(model, planned(model, activations)):
            found = run(model)
            if activations == "recompute":  # each layer is asked again
                count = len(train(Model(), one))
                batches = [found[count:][i : i + 8] for i in (0, 8)]
                found = [*found[:count], *(value for half in batches for value in half[:4])]
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_thread_that_has_evaluated_the_model_reads_what_is_there():
    def run(model, pool):
        with torch.no_grad():
            first = pool.submit(torch.no_grad()(model), X[:, :8]).result()
        asked, found = read_beside(pool, READS["kept"])
        for layer in model.layers:
            layer.ask = asked
        return [first, *train(model, one), *found]

    with ThreadPoolExecutor(1) as pool:
        expected, model = run(Model(Asks), pool), Model(Asks)
        with memplan.attach(model, planned(model, "keep")):
            found = run(model, pool)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_view_that_the_training_thread_took_is_refused_in_another():
    model, views = Model(Asks), []
    for layer in model.layers:
        layer.ask = lambda layer: views.append(layer.up.weight.t())
    with memplan.attach(model, planned(model, "keep")), ThreadPoolExecutor(1) as pool:
        train(model, one)
        with pytest.raises(RunError, match="taken in another one"):
            pool.submit(lambda: views[0] * 2).result()


def test_what_no_operator_tells_of_is_refused_once_it_is_used():
    model = Model(Asks)
    with ThreadPoolExecutor(1) as pool, memplan.attach(model, planned(model, "keep")):
        taken = []
        for layer in model.layers:
            layer.ask = lambda layer: taken.append(pool.submit(lambda: layer.up.weight.data).result())
        train(model, one)
        with pytest.raises(RunError, match="taken in another one"):
            pool.submit(lambda: taken[0] * 2).result()


def test_training_in_a_thread_and_a_backward_in_another():
    def run(model, pool):
        found = []
        for number in range(2):
            batch = torch.randn(3, 8, generator=torch.Generator().manual_seed(number))
            loss = pool.submit(model, batch).result()
            loss.backward() if number else threading_backward(loss)
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
            model.zero_grad()
        return found

    def threading_backward(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    with ThreadPoolExecutor(1) as pool:
        expected = run(Model(), pool)
        for activations in ("recompute", "keep"):
            model = Model()
            with memplan.attach(model, planned(model, activations)):
                found = run(model, pool)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("first", ["forward", "backward"])
def test_a_backward_beside_another_threads_pass_is_refused_and_that_one_is_right(first):
    """In the middle of a layer's ``first``: the block that lies there may not go."""
    batch = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected, model, errors = train(Model(Asks), one, 1), Model(Asks), []

    def ask(layer):
        if (torch._C._current_graph_task_id() != -1) is (first == "backward") and not errors:
            with pytest.raises(RunError, match="in a thread while another one") as error:
                pool.submit(other.backward).result(timeout=60)
            errors.append(error)

    with ThreadPoolExecutor(1) as pool, memplan.attach(model, planned(model)):
        other = model(batch)
        model.layers[1].ask = ask
        found = train(model, one, 1)
        other = model(batch)  # an error leaves nothing behind that would stop whoever comes next
        pool.submit(other.backward).result(timeout=60)
    assert errors
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(trained(model), expected[1:], strict=True))


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
