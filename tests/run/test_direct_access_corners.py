"""What reviews of direct access found: each was wrong without a word, and is right or refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.errors import DoesNotFitError, ModelError, MovedWeightsError, RunError
from memplan.run.attach import attach
from tests.run.test_direct_access import Net, X, loss_of, plan_of
from tests.run.test_parity import plan_for
from tests.support import quantized
from tests.support.training import CPU, batch_of, make


def attached(tmp_path, more_bytes: int = 0, **options):
    torch.manual_seed(0)
    model = Net().train()
    plan = plan_of(model, **options)
    if more_bytes:
        options = {"ram": "64MiB", "disk": "1GiB", "loss": loss_of, "gains": False, **options}
        plan = memplan.plan(model, {"x": X}, vram=plan.budgets.vram_bytes + more_bytes, **options)
    return model, memplan.attach(model, plan, cache=tmp_path)


def whole():
    torch.manual_seed(0)
    return Net().train()


def step(model) -> list[torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss = loss_of(model(x=X))
    loss.backward()
    return [loss.detach(), *(adapter.weight.grad.clone() for adapter in model.adapters)]


def assert_alike(act, tmp_path, more_bytes: int = 0, **options) -> None:
    """``act(model)`` returns tensors; they are the same of a whole model and of one under a plan."""
    expected = act(whole())
    model, handle = attached(tmp_path, more_bytes, **options)
    with handle:
        found = act(model)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- writes ----------------------------------------------------------------------------------------------------------


def test_a_hook_that_writes_nothing_at_first_writes_later(tmp_path):
    def act(model):
        factors = [1.0, 0.5, 0.5]
        for linear in model.linears:
            linear.register_forward_pre_hook(lambda module, args: (module.weight.mul_(factors[now[0]]), None)[1])
        now, found = [0], []
        for index in range(3):
            now[0] = index
            found += step(model)
        return found

    assert_alike(act, tmp_path, activations="keep")


def test_views_of_other_weights_of_a_block_stay_theirs(tmp_path):
    def act(model):
        found = step(model)
        for linear in model.linears:
            bias, old = linear.bias.data, linear.weight.data
            linear.weight.data = old * 0.9
            bias.fill_(1.0)
        return [*found, *step(model), *(linear.bias.detach().clone() for linear in model.linears)]

    assert_alike(act, tmp_path)


@pytest.mark.parametrize("more_bytes", [17_000, 51_000])
def test_views_are_written_to_where_blocks_are_loaded_ahead(more_bytes, tmp_path):
    def act(model):
        kept, found = [linear.weight.data for linear in model.linears], []
        for _ in range(3):
            found += step(model)
            for view in kept:
                view.mul_(0.9)
        return found

    assert_alike(act, tmp_path, more_bytes)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_views_that_are_held_through_a_backward(activations, tmp_path):
    """A block that is lent stays where it is between its recompute and its backward."""

    def act(model):
        kept, found = [linear.weight.detach() for linear in model.linears], []
        for _ in range(2):
            found += step(model)
        return [*found, *kept]

    assert_alike(act, tmp_path, activations=activations)


def test_what_is_put_back_is_what_it_was(tmp_path):
    def act(model):
        saved = [linear.weight.data for linear in model.linears]
        for linear, data in zip(model.linears, saved, strict=True):
            linear.weight.data = data * 2
        found = step(model)
        model.state_dict()
        for linear, data in zip(model.linears, saved, strict=True):
            linear.weight.data = data
        return [*found, *step(model)]

    assert_alike(act, tmp_path)
    assert_alike(act, tmp_path, more_bytes=40_000)


def test_another_memory_layout_is_refused(tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        name = handle.plan.table.blocks[handle.record.blocks[0].block].tensors[0].name
        weight = dict(model.named_parameters())[name]
        with pytest.raises(RunError, match="another memory layout"):
            weight.data = weight.data.t()


def test_a_state_dict_has_weights_by_the_names_that_they_go_by_now(tmp_path):
    def act(model):
        for linear in model.linears:
            prune.l1_unstructured(linear, "weight", 0.3)
        return [value.clone() for _, value in sorted(model.state_dict().items())]

    assert_alike(act, tmp_path)


def test_a_change_of_values_through_apply_is_refused(tmp_path):
    model, handle = attached(tmp_path)
    with handle, pytest.raises(MovedWeightsError, match="were to be changed"):
        model._apply(lambda tensor: tensor.clamp(0, 0.5))


# ---- reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read", [lambda w: torch.tensor(w), lambda w: torch.as_tensor(w, dtype=torch.float64), lambda w: w.new_tensor(w)]
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_functions_that_make_tensors_of_weights(read, tmp_path):
    assert_alike(lambda model: [read(linear.weight) for linear in model.linears], tmp_path)


def test_a_region_that_reads_a_weight_of_a_layer_in_backward(tmp_path):
    """The layer's own backward is just over: what is read must not be what lies in its slot."""

    class Around(Net):
        reads = False

        def forward(self, x):
            layers, adapters = self.layers, self.adapters
            x = x + torch.tanh(layers[0](x)) + adapters[1](adapters[0](x)) * 0.1

            def region(x):
                read = x @ layers[3][0].weight if self.reads else x
                return x + torch.tanh(read) * (torch.tanh(layers[1](x)) + torch.tanh(layers[2](x)))

            x = checkpoint(region, x, use_reentrant=False)
            for index in (3, 4, 5):
                x = x + torch.tanh(layers[index](x)) + adapters[index - 1](x) * 0.1
            return x + adapters[5](x)

    found = []
    for planned in (False, True):
        torch.manual_seed(0)
        model = Around().train()
        if planned:
            plan = memplan.plan(
                model, {"x": X}, vram=plan_of(model).budgets.vram_bytes + 34_000, ram="64MiB", loss=loss_of, gains=False
            )
            memplan.attach(model, plan, cache=tmp_path)
        model.reads = True
        found.append(step(model))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if hasattr(tensor, "qdata") else tensor


@pytest.mark.filterwarnings("ignore")  # the quantizers' own
def test_weights_made_of_others_are_read_and_written(tmp_path):
    whole, model = quantized.make("torchao-int8"), quantized.make("torchao-int8")
    with attach(model, plan_for(model, "llama", share=0.0), cache=tmp_path) as handle:
        pairs = [
            (m, n)
            for (a, m), (_, n) in zip(model.named_parameters(), whole.named_parameters(), strict=True)
            if "lora" not in a
        ]
        for weight, expected in pairs:
            assert weight.stride() == expected.stride()
            assert torch.equal(values(weight.detach().clone()), values(expected.detach().clone()))
        assert handle.record.direct_reads > 0


# ---- recomputed layers -----------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_recomputed_layer_runs_as_it_ran_before(tmp_path):
    """Contexts that are left, evaluation, other adapters and exchanged parameters between forward and backward."""

    def act(model):
        trained = [p for name, p in model.named_parameters() if p.requires_grad]
        found = []
        for how in ("kernel", "eval", "disabled", "scaling"):
            torch.manual_seed(3)
            for parameter in trained:
                parameter.grad = None
            embeddings = torch.randn(2, 8, 64, requires_grad=True)
            inputs = {"inputs_embeds": embeddings, "labels": batch_of("llama")["labels"][:2, :8]}
            if how == "kernel":
                with sdpa_kernel(SDPBackend.MATH):
                    loss = model(**inputs).loss
            elif how == "disabled":
                with model.disable_adapter():
                    loss = model(**inputs).loss
            else:
                loss = model(**inputs).loss
            layers = [m for m in model.modules() if hasattr(m, "lora_A")]
            if how == "eval":
                model.eval()
            if how == "scaling":
                for layer in layers:
                    layer.scaling["default"] *= 3
            loss.backward()
            model.train()
            found += [loss.detach(), embeddings.grad, *(p.grad.clone() for p in trained if p.grad is not None)]
            if how == "scaling":
                for layer in layers:
                    layer.scaling["default"] /= 3
        return found

    expected = act(make("llama", dropout=0.1))
    model = make("llama", dropout=0.1)
    options = {"ram": "1GiB", "activations": "recompute", "hardware": CPU, "gains": False}
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(model, batch_of("llama"), vram=1, **options)
    with memplan.attach(model, memplan.plan(model, batch_of("llama"), vram=caught.value.least_vram_bytes, **options)):
        found = act(model)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_exchanged_parameters_are_those_that_a_layer_is_recomputed_with(tmp_path):
    def act(model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        loss = loss_of(functional_call(model, {name: p * 2 for name, p in trained.items()}, (), {"x": X}))
        return [loss.detach(), *torch.autograd.grad(loss, list(trained.values()))]

    assert_alike(act, tmp_path, activations="recompute")


def test_a_write_between_forward_and_backward_of_a_recomputed_layer_is_refused(tmp_path):
    model, handle = attached(tmp_path, activations="recompute")
    with handle:
        loss = loss_of(model(x=X))
        for linear in model.linears:
            linear.weight.data.mul_(0.5)
        with pytest.raises(RunError, match="written to between its forward and its backward"):
            loss.backward()


# ---- other ways in ---------------------------------------------------------------------------------------------------


@pytest.mark.quick("mlp-before")
@pytest.mark.parametrize("when", ["before", "after", "late"])
@pytest.mark.parametrize("inner", ["mlp", "self_attn.q_proj", "input_layernorm", "mlp.down_proj"])
def test_a_backward_that_enters_a_layer_by_what_a_hook_took_is_right(inner, when, tmp_path):
    whole, model = make("llama"), make("llama")
    options = {"ram": "1GiB", "activations": "keep", "hardware": CPU, "gains": False}
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(model, batch_of("llama"), vram=1, **options)
    plan = memplan.plan(model, batch_of("llama"), vram=caught.value.least_vram_bytes, **options)

    def hook(of):
        taken = []
        of.base_model.model.model.layers[2].get_submodule(inner).register_forward_hook(
            lambda m, a, out: taken.append(out)
        )
        return taken

    def gradients(of, taken):
        of.zero_grad()
        of(**batch_of("llama"))
        taken[-1].square().mean().backward()
        return [None if p.grad is None else p.grad.clone() for p in of.parameters() if p.requires_grad]

    expected = gradients(whole, hook(whole))
    taken = hook(model) if when == "before" else None
    with memplan.attach(model, plan) as handle:
        if when == "late":
            model(**batch_of("llama")).loss.backward()
        taken = taken or hook(model)
        for one, other in zip(gradients(model, taken), expected, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        model(**batch_of("llama")).loss.backward()  # in step with the plan again
        assert handle.record.loads


class Captured(nn.Module):
    """Layers of matrices without bias, on tokens in three dimensions: autograd saves views of their weights."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
            self.up.requires_grad_(False)
            self.down.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner = self.up(x + self.b(self.a(x)))
            return x + self.down(torch.tanh(self.inner))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(self.Layer() for _ in range(8))
        self.prompt = nn.Parameter(torch.randn(5, 64))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [x + self.prompt]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found


class Early(Captured):
    """The same, whose adapters come after the matrix that a backward may enter by: they do not tell of it."""

    class Layer(Captured.Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.inner = self.up(x)
            return x + self.down(torch.tanh(self.inner)) + self.b(self.a(x))


class Prompted(Captured):
    """The same, of which a soft prompt alone is trained: no layer has an adapter that tells of a backward."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.prompt.requires_grad_(True)


@pytest.mark.parametrize("kind", [Prompted, Early])
def test_a_backward_that_enters_a_layer_by_what_no_adapter_tells_of_is_right_or_refused(kind, tmp_path):
    whole, model = kind(), kind()
    pins = {f"layers.{index}": "host" for index in range(8)}
    batch = {"x": torch.randn(2, 5, 64)}
    options = {"ram": "64MiB", "pins": pins, "loss": last_of_all, "hardware": CPU, "gains": False}
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(model, batch, vram=1, activations="keep", **options)
    plan = memplan.plan(model, batch, vram=caught.value.least_vram_bytes, activations="keep", **options)
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        for step, losses in enumerate(
            (
                lambda made: made[1].layers[4].inner.square().mean(),
                lambda made: last_of_all(made[0]),
                lambda made: made[1].layers[6].inner.square().mean() + made[1].layers[2].inner.square().mean(),
                lambda made: last_of_all(made[0]) + made[1].layers[2].inner.square().mean(),
            )
        ):
            if step in (0, 2):
                with pytest.raises(RunError, match="entered a layer by a tensor that was made inside"):
                    entering(model, losses)
                continue
            for one, other in zip(entering(model, losses), entering(whole, losses), strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
        assert handle.record.loads > 8


def entering(model: nn.Module, loss_of_all: Callable[[Any], torch.Tensor]) -> list[torch.Tensor | None]:
    model.zero_grad()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    loss_of_all((model(x), model)).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def last_of_all(found: list[torch.Tensor]) -> torch.Tensor:
    return found[-1].square().mean()


@pytest.mark.each_value
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize(
    ("losses", "is_refused"),
    [
        (lambda made: made[1].layers[4].inner.square().mean(), True),
        (lambda made: made[0][3].square().mean(), False),  # an early exit
        (lambda made: made[0][-1].square().mean() + made[1].layers[4].inner.square().mean(), False),
    ],
    ids=["within", "exit", "both"],
)
def test_a_backward_that_enters_where_views_were_saved(tmp_path, losses, is_refused, passes):
    whole, model = Captured(), Captured()
    x = torch.randn(2, 5, 64)
    pins = {f"layers.{index}": "host" for index in range(8)}
    plan = memplan.plan(
        model,
        {"x": x},
        vram="256KiB",
        ram="64MiB",
        pins=pins,
        activations="keep",
        loss=last_of_all,
        hardware=CPU,
        gains=False,
    )
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        for _ in range(passes):
            entering(model, lambda made: last_of_all(made[0]))
        if is_refused:
            with pytest.raises(RunError, match="entered a layer by a tensor that was made inside"):
                entering(model, losses)
            model.zero_grad()
        else:
            for one, other in zip(entering(model, losses), entering(whole, losses), strict=True):
                assert (one is None and other is None) or torch.equal(one, other)
        after = [entering(one, lambda made: last_of_all(made[0])) for one in (model, whole)]
        assert all(torch.equal(one, other) for one, other in zip(*after, strict=True))
        assert handle.record.loads > 8


def test_a_forward_that_fails_leaves_nothing_open(tmp_path):
    model, handle = attached(tmp_path, activations="keep")
    with handle:
        expected = [linear.weight.detach().clone() for linear in model.linears]

        def fail(module, args, output):
            raise ValueError("enough")

        model.layers[3][1].register_forward_hook(fail)
        with pytest.raises(ValueError, match="enough"):
            model(x=X)
        held = [linear.weight.detach() for linear in model.linears]
        model.layers[3][1]._forward_hooks.clear()
        step(model)
        assert all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))


def test_two_threads_at_once_are_refused(tmp_path):
    model, handle = attached(tmp_path)
    inside, over, errors = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        assert over.wait(20)

    def other():
        assert inside.wait(20)
        try:
            with torch.no_grad():
                model(x=X)
        except RunError as error:
            errors.append(str(error))
        finally:
            over.set()

    with handle:
        block = next(b for b in handle.record.blocks)
        name = handle.plan.table.blocks[block.block].name
        hook = model.get_submodule(name)[1].register_forward_pre_hook(
            lambda m, a: wait(m, a) if not inside.is_set() else None
        )
        thread = threading.Thread(target=other)
        thread.start()
        model(x=X)
        thread.join()
        hook.remove()
    assert errors
    assert "another one computes with the same model" in errors[0]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12: it has threads
def test_a_forked_process_is_refused_and_does_not_hang(tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        child = os.fork()
        if child == 0:
            try:
                model(x=X)
            except RunError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_a_trace_of_torch_jit_is_refused(tmp_path):
    model, handle = attached(tmp_path)
    with handle, pytest.raises(RunError, match="traced by torch"):
        torch.jit.trace(model, (X,))


def test_a_model_that_shares_streamed_weights_is_refused(tmp_path):
    model, handle = attached(tmp_path)

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.adapter = model.layers, nn.Linear(64, 64)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x))
            return self.adapter(x)

    with handle:
        other = Other()
        with pytest.raises(ModelError, match=r"under a plan already|streamed already"):
            attach(other, handle.plan, cache=tmp_path)
