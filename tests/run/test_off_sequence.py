"""What the plan did not foresee: whatever a program does with the model, its results are those of a whole run, or it
raises.
"""

from __future__ import annotations

import pytest
import torch

import memplan
from memplan.errors import DoesNotFitError, RunError
from memplan.run.attach import attach
from memplan.run.transfer.transfer import CpuTransfers
from tests.run.test_parity import plan_for
from tests.support.training import CPU, Plain, assert_equal, batch_of, loss_of, make, train

PARTS = {"half in no_grad": torch.no_grad, "half in inference_mode": torch.inference_mode}


class Wandering(Plain):
    """After its first call it goes another way through its layers in each."""

    way = "straight"
    calls = 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        self.calls += 1
        if self.way in PARTS and self.calls > 1:
            with PARTS[self.way]():
                for layer in self.layers[:3]:
                    x = layer(x)
            for layer in self.layers[3:]:
                x = layer(x.clone())  # what was made in inference mode cannot be saved for a backward
            return self.head(x)
        for index in self.indices(torch.Generator().manual_seed(self.calls)):
            x = self.layers[index](x)
        return self.head(x)

    def indices(self, generator: torch.Generator) -> list[int]:
        every = list(range(len(self.layers)))
        if self.way == "twice":
            return every * 2
        if self.way == "straight" or self.way in PARTS or self.calls == 1:
            return every
        if self.way == "drop":
            return [index for index in every if torch.rand(1, generator=generator) > 0.3]
        if self.way == "without":
            return [index for index in every if index != 2]
        if self.way == "repeat":
            return sorted([*every, 2, 4, 4])
        if self.way == "again":
            return [*every, 1, 2, 3]
        if self.way == "exit":
            return every[: int(torch.randint(1, len(every), (1,), generator=generator))]
        return torch.randperm(len(every), generator=generator).tolist()


def wandering(way: str) -> Wandering:
    torch.manual_seed(0)
    model = Wandering().train()
    model.way = way
    return model


def plan_of(model, vram_share: float, tiers: str):
    """Return a plan in which that share of the frozen bytes is kept off the device, or as much as can be.

    ``tiers``: "all" has every other streamed block on the disk.
    """
    options = {"ram": "1GiB", "disk": "1GiB", "hardware": CPU, "loss": loss_of}
    roomy = memplan.plan(model, batch_of("plain"), vram="1GiB", **options)
    frozen = sum(block.size_bytes for block in roomy.table.blocks)
    vram = roomy.prediction.peaks.vram_bytes - int(frozen * vram_share)
    try:
        plan = memplan.plan(model, batch_of("plain"), vram=vram, **options)
    except DoesNotFitError as error:
        vram = error.least_vram_bytes
        plan = memplan.plan(model, batch_of("plain"), vram=vram, **options)
    streamed = [block.name for block in plan.table.blocks if plan.home_of(block.id) != "device"]
    assert len(streamed) >= 2
    if tiers == "all":
        pins = dict.fromkeys(streamed[::2], "disk") | dict.fromkeys(streamed[1::2], "host")
        plan = memplan.plan(model, batch_of("plain"), vram=vram, pins=pins, **options)
    return plan


@pytest.fixture(params=[(0.75, "host"), (0.9, "host"), (0.9, "all")], ids=["roomy", "least", "from-disk"])
def plan_of_wandering(request):
    return lambda way: plan_of(wandering(way), *request.param)


@pytest.mark.quick("roomy-drop-checked", "roomy-half in inference_mode-checked", "least-repeat-checked")
@pytest.mark.parametrize("checked", [pytest.param(False, marks=pytest.mark.full), True], ids=["plain", "checked"])
@pytest.mark.parametrize("way", ["drop", "repeat", "again", "exit", "any", "twice", *PARTS])
def test_layers_left_out_repeated_without_gradients_or_in_another_order(plan_of_wandering, way, checked, tmp_path):
    whole, planned = wandering(way), wandering(way)
    plan = plan_of_wandering(way)
    with attach(planned, plan, cache=tmp_path, checked=checked) as handle:
        assert_equal(train(whole, "plain", steps=5), train(planned, "plain", steps=5))
        assert (handle.record.out_of_order > 0) == (way != "twice")


def test_what_a_forward_left_out_is_not_loaded_for_its_backward(tmp_path):
    model = wandering("without")
    plan = plan_of(model, 0.75, "host")
    with attach(model, plan, cache=tmp_path) as handle:
        loads = []
        for steps in (1, 1, 3):
            train(model, "plain", steps=steps)
            loads.append({plan.table.blocks[row.block].name: row.loads for row in handle.record.blocks})
    # Ahead of each forward, in which it might have come.
    assert loads[2]["layers.2"] - loads[1]["layers.2"] == 3
    assert loads[2]["layers.3"] - loads[1]["layers.3"] == 6


def ways_of_autograd(model):
    """Return all that these give, in order."""
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = [batch_of("plain", seed=seed) for seed in range(4)]
    found = []

    def note():
        found.extend(p.grad.clone() for p in trained if p.grad is not None)
        model.zero_grad()

    for turn in (1, -1):  # two forwards, then their backwards in order and against it
        for loss in [loss_of(model(**batch)) for batch in batches[:2]][::turn]:
            loss.backward()
        note()
    loss = loss_of(model(**batches[2]))
    loss.backward(retain_graph=True)
    loss.backward()
    note()
    loss = loss_of(model(**batches[2]))
    with torch.no_grad():  # an evaluation between a forward and its backward
        found.append(model(**batches[3]))
    loss.backward()
    note()
    loss = loss_of(model(**batches[0]))
    found.extend(torch.autograd.grad(loss, trained, retain_graph=True))
    found.extend(torch.autograd.grad(loss, trained))
    x = model.embed(batches[0]["input_ids"])  # parts of the model alone
    model.layers[1](x).sum().backward()
    note()
    h = model.layers[2](model.layers[0](x))
    (h.sum() + model.layers[1](h).sum()).backward()
    note()
    return found


@pytest.mark.quick("roomy-plain", "from-disk-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_ways_of_autograd(plan_of_wandering, checked, tmp_path):
    whole, planned = wandering("straight"), wandering("straight")
    with attach(planned, plan_of_wandering("straight"), cache=tmp_path, checked=checked):
        one, other = ways_of_autograd(whole), ways_of_autograd(planned)
        assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)
        assert_equal(train(whole, "plain"), train(planned, "plain"))


@pytest.mark.quick("roomy", "least")
def test_a_backward_to_be_differentiated_is_refused(plan_of_wandering, tmp_path):
    whole, planned = wandering("straight"), wandering("straight")
    with attach(planned, plan_of_wandering("straight"), cache=tmp_path):
        trained = [p for p in planned.parameters() if p.requires_grad]
        with pytest.raises(RunError, match="create_graph"):
            torch.autograd.grad(loss_of(planned(**batch_of("plain"))), trained, create_graph=True)
        assert_equal(train(whole, "plain"), train(planned, "plain"))


@pytest.mark.quick("roomy", "least")
def test_an_interrupt_while_waiting_for_a_block(plan_of_wandering, tmp_path, monkeypatch):
    """As Ctrl-C in a notebook, after which training goes on: the load under way must not write what came after it."""
    whole, planned = wandering("straight"), wandering("straight")
    with attach(planned, plan_of_wandering("straight"), cache=tmp_path, checked=True):
        assert_equal(train(whole, "plain", steps=1), train(planned, "plain", steps=1))
        for after in range(0, 12, 2):
            waits = 0

            def wait(self, ticket, block, of=CpuTransfers.wait, after=after):
                nonlocal waits
                waits += 1
                if waits > after:
                    raise KeyboardInterrupt
                return of(self, ticket, block)

            with monkeypatch.context() as patch:
                patch.setattr(CpuTransfers, "wait", wait)
                with pytest.raises(KeyboardInterrupt):
                    train(planned, "plain", steps=20)
        planned.load_state_dict(whole.state_dict())
        planned.zero_grad()
        assert_equal(train(whole, "plain"), train(planned, "plain"))


def test_evaluation_in_mid_training_is_served(tmp_path):
    """Forward alone is off the sequence: right values all the same, counted."""
    whole, planned = make("llama"), make("llama")
    plan = plan_for(planned, "llama")
    batch = batch_of("llama", seed=9)
    with attach(planned, plan, checked=True, cache=tmp_path) as handle:
        for model in (whole, planned):
            train(model, "llama", steps=1)
            model.eval()
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(whole(**batch).logits, planned(**batch).logits)
        assert handle.record.out_of_order >= 2
        assert_equal(train(whole.train(), "llama"), train(planned.train(), "llama"))


def test_two_forwards_for_one_backward(tmp_path):
    whole, planned = make("llama"), make("llama")
    plan = plan_for(planned, "llama")

    def both(model):
        first, second = model(**batch_of("llama", seed=1)).loss, model(**batch_of("llama", seed=2)).loss
        (first * 2 + second).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    with attach(planned, plan, checked=True, cache=tmp_path):
        for _ in range(2):
            for a, b in zip(both(whole), both(planned), strict=True):
                assert torch.equal(a, b)


def test_other_lengths_than_planned(tmp_path):
    whole, planned = make("llama"), make("llama")
    with attach(planned, plan_for(planned, "llama"), checked=True, cache=tmp_path):
        for length in (5, 16, 9):
            batch = batch_of("llama", seed=length, length=length)
            for model in (whole, planned):
                model(**batch).loss.backward()
            for a, b in zip(whole.parameters(), planned.parameters(), strict=True):
                assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def test_generate_under_a_plan(tmp_path):
    whole, planned = make("llama").eval(), make("llama").eval()
    plan = plan_for(make("llama"), "llama")
    tokens = batch_of("llama")["input_ids"][:, :6]
    with attach(planned, plan, cache=tmp_path):
        for model in (whole, planned):
            model.config.use_cache = True
        expected = whole.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
        assert torch.equal(planned.generate(input_ids=tokens, max_new_tokens=5, do_sample=False), expected)


def test_training_goes_on_after_an_error_of_others(tmp_path):
    def fail(*args):
        raise ValueError("not ours")

    def trained(model):
        train(model, "llama", steps=1)
        mlp = model.get_base_model().model.layers[3].mlp
        for register in (mlp.register_forward_pre_hook, mlp.register_full_backward_pre_hook):
            hook = register(fail)
            with pytest.raises(ValueError, match="not ours"):
                loss_of(model(**batch_of("llama"))).backward()
            hook.remove()
            model.zero_grad()
        return train(model, "llama")

    whole, model = make("llama"), make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path, checked=True):
        assert_equal(trained(whole), trained(model))


def test_evaluation_in_inference_mode(tmp_path):
    def trained(model):
        train(model, "llama", steps=1)
        with torch.inference_mode():
            logits = model(**batch_of("llama")).logits.clone()
        return logits, train(model, "llama")

    whole, model = make("llama"), make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path, checked=True):
        (one, run), (other, planned) = trained(whole), trained(model)
    assert torch.equal(one, other)
    assert_equal(run, planned)
