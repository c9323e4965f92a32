"""Streamed weights that are read or written outside of their modules' accesses: as in a run that holds the whole
model.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.errors import DoesNotFitError, RunError
from tests.support import inside

WIDTH, DEPTH = 64, 6


class Net(nn.Module):
    """Frozen layers, each with a trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        stack = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(DEPTH))
        self.layers = nn.ModuleList(stack).requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = x + torch.tanh(layer(x)) + adapter(x) * 0.1
        return x

    @property
    def linears(self) -> list[nn.Linear]:
        return [layer[0] for layer in self.layers]


X = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def plan_of(model: nn.Module, ram: str = "64MiB", **options):
    options = {"ram": ram, "disk": "1GiB", "loss": loss_of, "gains": False, **options}
    try:
        return memplan.plan(model, {"x": X}, vram=1, **options)
    except DoesNotFitError as error:
        return memplan.plan(model, {"x": X}, vram=error.least_vram_bytes, **options)


def train(act, *, reads: bool, planned: bool, tmp_path=None, ram: str = "64MiB", steps: int = 4):
    """Return losses, what a ``state_dict`` then holds, and the record. ``act(model, step)`` joins the loss, or follows
    the step.
    """
    torch.manual_seed(0)
    model = Net().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    handle = memplan.attach(model, plan_of(model, ram), cache=tmp_path) if planned else None
    torch.manual_seed(5)
    losses = []
    for step in range(steps):
        loss = loss_of(model(x=X))
        if reads:
            loss = loss + act(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not reads:
            act(model, step)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    record = None
    if handle is not None:
        record = handle.record
        handle.detach()
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), f"{name} after detach"
    return losses, state, record


def assert_same(act, *, reads: bool, tmp_path, ram: str = "64MiB", detour=lambda: None):
    whole = train(act, reads=reads, planned=False)
    detour()
    planned = train(act, reads=reads, planned=True, tmp_path=tmp_path, ram=ram)
    assert planned[0] == whole[0]
    for name, value in whole[1].items():
        assert torch.equal(planned[1][name], value), name
    return planned[2]


# ---- reads -----------------------------------------------------------------------------------------------------------


def regulariser(model, step):
    return sum((one.weight @ a.weight).pow(2).mean() for one, a in zip(model.linears, model.adapters, strict=True))


def norms(model, step):
    return 1e-3 * sum(p.detach().double().norm() for p in model.parameters()).float()


def call_of_functions(model, step):
    layer = model.layers[2]
    return 1e-3 * functional_call(layer, dict(layer.named_parameters()), (X,)).sum()


def stacked(model, step):
    weights = torch.stack([one.weight for one in model.linears])
    return 1e-3 * torch.vmap(lambda w: (X @ w).square().mean())(weights).sum()


def copies(model, step):
    return 1e-3 * (copy.deepcopy(model.linears[1].weight) + nn.Linear(WIDTH, WIDTH).weight.detach() * 0).sum()


def pickled(model, step):
    file = io.BytesIO()
    torch.save([one.weight for one in model.linears], file)
    file.seek(0)
    return 1e-3 * sum(weight.sum() for weight in torch.load(file, weights_only=True))


def layout(model, step):
    return 1e-3 * torch.tensor(
        float(sum(one.weight.stride(0) + one.weight.is_contiguous() + one.weight.shape[0] for one in model.linears))
    )


def lists_and_arrays(model, step):
    return 1e-3 * torch.tensor(sum(float(one.bias.numpy().sum()) + one.bias.tolist()[0] for one in model.linears))


def under_transforms(model, step):
    weight, adapter = model.linears[3].weight, model.adapters[3].weight
    mapped = torch.vmap(lambda row: (row @ weight).sum())(X).sum()
    gradient = torch.func.grad(lambda a: (a @ weight).pow(2).mean())(adapter).sum()
    return 1e-3 * (mapped + gradient + torch.func.jvp(lambda x: x @ weight, (X,), (X,))[1].sum())


class KeepsItsWeight(torch.autograd.Function):
    """Keeps the weight itself until its backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight.T, None


def in_autograd_functions_and_checkpoints(model, step):
    def term(linear, adapter):
        return KeepsItsWeight.apply(adapter.weight, linear.weight).pow(2).mean()

    pairs = list(zip(model.linears, model.adapters, strict=True))
    return sum(checkpoint(term, *pair, use_reentrant=False) for pair in pairs) + sum(term(*pair) for pair in pairs)


def under_autocast(model, step):
    with torch.autocast("cpu", torch.bfloat16):
        return (model.adapters[3].weight @ model.linears[3].weight).float().pow(2).mean()


READS = [
    under_transforms,
    in_autograd_functions_and_checkpoints,
    under_autocast,
    regulariser,
    norms,
    call_of_functions,
    stacked,
    copies,
    pickled,
    layout,
    lists_and_arrays,
]


@pytest.mark.quick("under_transforms")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("act", READS)
def test_reads_are_right(act, tmp_path):
    assert_same(act, reads=True, tmp_path=tmp_path)


def test_reads_are_right_where_blocks_come_from_files(tmp_path):
    record = assert_same(regulariser, reads=True, tmp_path=tmp_path, ram="40KiB")
    assert record.direct_reads > 0
    assert record.direct_writes == 0


def test_reads_are_counted_and_said_once(tmp_path, caplog):
    record = assert_same(norms, reads=True, tmp_path=tmp_path)
    streamed = len(record.blocks)
    assert streamed >= 2
    assert record.direct_reads == 4 * 2 * streamed  # steps, weight and bias
    assert record.direct_read_bytes == 4 * streamed * 4 * (WIDTH * WIDTH + WIDTH)
    assert len([r for r in caplog.records if "outside of its module's forward" in r.message]) == 1


def test_no_read_is_counted_where_triggers_see_all(tmp_path):
    record = assert_same(lambda model, step: 0.0, reads=True, tmp_path=tmp_path)
    assert (record.direct_reads, record.direct_writes, record.misses) == (0, 0, 0)


def test_a_module_that_is_called_by_another_way(tmp_path):
    """A wrapper that came after the plan reads the weight before it calls the layer (as DoRA, HRA and BOFT do)."""

    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return torch.nn.functional.linear(x, self.base.weight * 0.5, self.base.bias) + self.base(x)

    def act(model, step):
        if step == 0:
            for layer in model.layers:
                layer[0] = Wrapper(layer[0])

    assert_same(act, reads=False, tmp_path=tmp_path)


# ---- writes ----------------------------------------------------------------------------------------------------------


def other_data(model, step):
    for one in model.linears:
        one.weight.data = one.weight.data * 0.9


def data_in_place(model, step):
    for one in model.linears:
        one.weight.data.mul_(0.9)


def in_place(model, step):
    with torch.no_grad():
        for one in model.linears:
            one.weight += 0.01


def into_a_state_dict(model, step):
    for value in model.state_dict().values():
        value.mul_(0.99)


def into_an_array(model, step):
    for one in model.linears:
        one.bias.numpy()[:] = step


def begun_anew(model, step):
    for one in model.linears:
        nn.init.orthogonal_(one.weight)


def each_from_the_next(model, step):
    with torch.no_grad():
        for one, other in zip(model.linears, model.linears[1:], strict=False):
            one.weight.copy_(other.weight)


def exchanged(model, step):
    one, other = model.linears[0].weight, model.linears[3].weight
    one.data, other.data = other.data, one.data


def as_one_vector(model, step):
    weights = [one.weight for one in model.linears]
    vector = nn.utils.parameters_to_vector(weights)
    nn.utils.vector_to_parameters(vector * 0.9, weights)


def pruned(model, step):
    if step == 1:
        prune.l1_unstructured(model.linears[1], "weight", 0.5)
        prune.remove(model.linears[1], "weight")


def another_parameter(model, step):
    if step == 1:
        old = model.linears[2].weight
        model.linears[2].weight = nn.Parameter(old.detach() * 0.5, requires_grad=False)


def inside_materialise(model, step):
    with memplan.materialise(model):
        for one in model.linears:
            one.weight.data.mul_(0.9)


class Kept:
    """Views that are kept from the first step on, and written to in each."""

    def __init__(self):
        self.views = []

    def __call__(self, model, step):
        if step == 0:
            self.views = [one.weight.data for one in model.linears]
        for view in self.views:
            view.mul_(0.9)


def in_a_hook(write):
    def act(model, step):
        if step == 0:
            for one in model.linears:
                one.register_forward_pre_hook(lambda module, args: write(module.weight))

    return act


def set_data(weight):
    weight.data = weight.data * 0.99


HOOKS = {
    "hook: data in place": in_a_hook(lambda weight: (weight.data.mul_(0.99), None)[1]),
    "hook: in place": in_a_hook(lambda weight: (weight.mul_(0.99), None)[1]),
    "hook: other data": in_a_hook(set_data),
}
WRITES = {
    **{
        act.__name__: act for act in (other_data, data_in_place, in_place, into_a_state_dict, into_an_array, begun_anew)
    },
    **{act.__name__: act for act in (each_from_the_next, exchanged, as_one_vector, pruned, another_parameter)},
    **{act.__name__: act for act in (inside_materialise,)},
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_kept(name, tmp_path):
    assert_same(WRITES[name], reads=False, tmp_path=tmp_path)


@pytest.mark.parametrize("name", ["other_data", "data_in_place", "in_place", "into_a_state_dict"])
def test_writes_are_kept_where_only_some_blocks_stream(name, tmp_path):
    assert_same(WRITES[name], reads=False, tmp_path=tmp_path, ram="40KiB")


def test_views_that_are_kept_may_be_written_to_at_any_time(tmp_path):
    kept = Kept()
    assert_same(kept, reads=False, tmp_path=tmp_path, detour=kept.views.clear)


@pytest.mark.parametrize("name", HOOKS)
def test_writes_in_a_hook_that_came_after_the_plan(name, tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    options = {"activations": "keep"}
    whole = train(HOOKS[name], reads=False, planned=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with memplan.attach(model, plan_of(model, **options), cache=tmp_path) as handle:
        torch.manual_seed(5)
        losses = []
        for step in range(4):
            loss = loss_of(model(x=X))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            HOOKS[name](model, step)
        assert len(handle.record.blocks) >= 2
        state = {key: value.clone() for key, value in model.state_dict().items()}
    assert losses == whole[0]
    for key, value in whole[1].items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("take", [lambda w: w.detach(), lambda w: w.data, lambda w: w])
def test_what_a_late_hook_keeps_of_a_weight_stays_that_weight(take, tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    weights = [one.weight.detach().clone() for one in model.linears]
    with memplan.attach(model, plan_of(model), cache=tmp_path):
        kept = []
        for one in model.linears:
            one.register_forward_hook(lambda module, args, output: kept.append(take(module.weight)))
        loss_of(model(x=X)).backward()
        for weight, held in zip(weights, kept, strict=False):
            assert torch.equal(weight, held)


def test_a_write_that_recomputing_would_repeat_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    plan = plan_of(model, activations="recompute")
    with memplan.attach(model, plan, cache=tmp_path):
        HOOKS["hook: in place"](model, 0)
        with pytest.raises(RunError, match="would write twice"):
            model(x=X)


def test_a_write_of_another_dtype_is_refused_and_nothing_is_lost(tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    plan = plan_of(model)
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        block = plan.table.blocks[handle.record.blocks[0].block]
        weight = dict(model.named_parameters())[block.tensors[0].name]
        before = weight.detach().clone()
        with pytest.raises(RunError, match=f"{block.tensors[0].name}.*detach"):
            weight.data = weight.data.double()
        assert torch.equal(weight, before)


def test_a_parameter_of_a_weight_that_is_away_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    plan = plan_of(model)
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        block = plan.table.blocks[handle.record.blocks[0].block]
        weight = dict(model.named_parameters())[block.tensors[0].name]
        with pytest.raises(RunError, match=r"give it weight\.data"):
            nn.Parameter(weight)
        assert torch.equal(nn.Parameter(weight.data), weight)


def test_a_weight_that_is_trained_by_now_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Net().train()
    plan = plan_of(model)
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        block = plan.table.blocks[handle.record.blocks[0].block]
        weight = dict(model.named_parameters())[block.tensors[0].name].requires_grad_(True)
        with pytest.raises(RunError, match="is trained now"):
            weight.square().sum()
        weight.requires_grad_(False)


# ---- homes in files --------------------------------------------------------------------------------------------------


def attached_to_files(tmp_path, ram: str):
    """A model of which some blocks are homed in files and streamed."""
    torch.manual_seed(0)
    model = Net().train()
    pins = {"layers.2": "disk", "layers.3": "disk"}
    plan = plan_of(model, ram, pins=pins)
    assert {b.name for b in plan.table.blocks if plan.home_of(b.id) == "disk"} >= set(pins)
    return model, plan, memplan.attach(model, plan, cache=tmp_path)


def test_a_block_that_is_written_to_gets_a_home_in_ram(tmp_path):
    model, plan, handle = attached_to_files(tmp_path, "64MiB")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.block")}
    whole = Net()
    with handle:
        weight, other = model.linears[2].weight, model.linears[3].weight
        expected, untouched = weight.detach() * 0.5, other.detach().clone()
        before = handle.record.ram_peak_bytes
        weight.data = expected
        assert handle.record.direct_writes == 1
        assert handle.record.ram_peak_bytes == before + next(
            b.size_bytes for b in plan.table.blocks if b.name == "layers.2"
        )
        state = model.state_dict()
        assert torch.equal(state["layers.2.0.weight"], expected)
        assert torch.equal(state["layers.3.0.weight"], untouched)
        whole.load_state_dict(state)
        assert torch.equal(model(x=X), whole(x=X))
    assert torch.equal(model.linears[2].weight, expected)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.block")} == files


def test_a_write_that_ram_has_no_room_for_is_refused(tmp_path):
    model, plan, handle = attached_to_files(tmp_path, "17MiB")
    with handle:
        weight = model.linears[2].weight
        before = weight.detach().clone()
        inside.tiers(handle).plan = replace(plan, budgets=replace(plan.budgets, ram_bytes=handle.record.ram_peak_bytes))
        with pytest.raises(RunError, match=r"layers\.2 was written to.*give more ram"):
            weight.data = before * 0.5
        assert torch.equal(weight, before)


@pytest.mark.parametrize("write", [lambda v: v.mul_(0.5), lambda v: v.data.mul_(0.5), lambda v: v.numpy().fill(2.0)])
def test_writes_into_a_state_dict_of_files(write, tmp_path):
    model, _, handle = attached_to_files(tmp_path, "64MiB")
    whole = Net()
    with handle:
        whole.load_state_dict(model.state_dict())
        for given in (model, whole):
            with torch.no_grad():
                write(given.state_dict()["layers.3.0.weight"])
        assert torch.equal(model(x=X), whole(x=X))
        assert torch.equal(model.state_dict()["layers.3.0.weight"], whole.linears[3].weight)
        assert handle.record.direct_writes == 1


def test_looking_at_a_state_dict_of_files_writes_nothing(tmp_path):
    model, _, handle = attached_to_files(tmp_path, "64MiB")
    with handle:
        for _ in range(2):
            assert all(value.isfinite().all() for value in model.state_dict().values())
            loss_of(model(x=X)).backward()
        assert (handle.record.direct_reads, handle.record.direct_writes) == (0, 0)
