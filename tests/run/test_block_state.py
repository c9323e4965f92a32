"""A block's state is what memory is: after each access of a run, forward and backward, on the sequence and off it."""

from __future__ import annotations

import itertools

import pytest
import torch

from memplan.errors import RunError
from memplan.run.access.away import kinds_of
from memplan.run.access.dispatched import unasked
from memplan.run.attach import attach
from memplan.run.modules.offloaded_activations import SavedState
from memplan.run.schedule.streamed import AWAY, HIDDEN, IN_SLOT, LOADING, OPEN, SHUT, BlockState, Streamed
from tests.run import test_rows
from tests.run.test_off_sequence import plan_of, wandering
from tests.run.test_parity import plan_for
from tests.support import inside
from tests.support.training import make, train

IN_ITS_SLOT = (SavedState.FILLING, SavedState.IN_SLOT, SavedState.STORING, SavedState.LOADING, SavedState.IN_BOTH)


def address_of(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass(), unasked():
        return tensor.data_ptr()


def assert_is_as_memory_is(one: Streamed) -> None:
    assert (one.ticket is not None) == (one.state is LOADING)
    begin, end = one.part.data_ptr(), one.part.data_ptr() + one.part.numel()
    for tensor, there, _ in one.pointers:
        if one.state in (SHUT, OPEN):
            assert address_of(tensor) == there.data_ptr()
        else:
            assert not begin <= address_of(tensor) < end
    for kinds in one.kinds:
        assert type(kinds.tensor) is (kinds.own if one.state is OPEN else kinds.away)


def assert_nothing_shares_bytes(handle) -> None:
    blocks = {one.block: one for one in inside.streamed(handle)}
    saved = inside.loader(handle).offloads.by_key
    users = {key for key, one in blocks.items() if one.state is not AWAY}
    users |= {key for key, one in saved.items() if one.is_owned() and one.state in IN_ITS_SLOT}
    for key in users:
        assert users.isdisjoint(blocks[key].overlapping if key in blocks else saved[key].overlapping)


@pytest.mark.parametrize("case", ["streamed", "offloaded", "off the sequence", "rows at home"])
def test_states_are_what_memory_is(case, tmp_path):
    if case == "off the sequence":
        model, kind = wandering("any"), "plain"
        plan = plan_of(wandering("any"), 0.9, "all")
    elif case == "rows at home":
        model, kind = test_rows.make("tied"), None
        plan = test_rows.plan_of("tied")
    else:
        model, kind = make("plain"), "plain"
        plan = plan_for(model, "plain", share=0.2, offload="all" if case == "offloaded" else ())
    seen: set[BlockState] = set()
    saved: set[SavedState] = set()
    with attach(model, plan, cache=tmp_path) as handle:

        def look() -> None:
            for one in inside.streamed(handle):
                assert_is_as_memory_is(one)
                seen.add(one.state)
            assert_nothing_shares_bytes(handle)
            saved.update(one.state for one in inside.loader(handle).offloads.by_key.values())

        with inside.after_each(handle, "use", look), inside.after_each(handle, "shut_all", look):
            if kind is None:
                for _ in range(2):
                    test_rows.loss_of(model(**test_rows.batch_of())).backward()
            else:
                train(model, kind, steps=2)
        assert handle.record.direct_reads == 0
    assert seen >= {AWAY, LOADING, HIDDEN, OPEN, SHUT}
    if case == "offloaded":
        assert saved >= {SavedState.STORING, SavedState.ON_HOST, SavedState.IN_BOTH}


def streamed_block() -> tuple[Streamed, torch.nn.Parameter]:
    """Return a block, away, and its one weight."""
    weight, part = torch.nn.Parameter(torch.zeros(4), requires_grad=False), torch.ones(16, dtype=torch.uint8)
    placeholder = torch.full((4,), torch.nan)
    pointers = ((weight, part.view(torch.float32), placeholder),)
    one = Streamed(block=0, name="a", channel="h2d", source=None, part=part, pointers=pointers, rows=())  # type: ignore[arg-type]
    return one, weight


def test_what_is_written_is_known_though_an_open_block_is_bound_again():
    """As where two accesses in turn read a block, rows of which a third one reads at home."""
    one, weight = streamed_block()
    one.serve((kinds_of(weight, is_plain=False),))
    one.start(object())
    one.arrive()
    one.open()
    weight.add_(1.0)
    one.bind()
    assert one.state is OPEN
    one.open()
    assert one.shut() == (0,)
    assert one.state is SHUT
    one.serve(())


def test_every_way_from_a_state_to_the_next():
    """Without a run: each method leaves the state that it says, and a ticket only while there is a load."""
    for ways in itertools.product(("arrive", "leave", "forget"), ("hide", "leave", "forget")):
        one, weight = streamed_block()
        assert one.state is AWAY
        ticket = object()
        one.start(ticket)
        assert (one.state, one.ticket) == (LOADING, ticket)
        left = getattr(one, ways[0])()
        assert one.state is (SHUT if ways[0] == "arrive" else AWAY)
        assert left is (ticket if ways[0] == "leave" else None)
        if one.state is SHUT:
            assert weight.data_ptr() == one.part.data_ptr()
            assert getattr(one, ways[1])() is None
            assert one.state is (HIDDEN if ways[1] == "hide" else AWAY)
            assert (one.state in IN_SLOT) == (ways[1] == "hide")
        assert weight.isnan().all() or ways[0] == "leave"
        assert one.ticket is None


def test_a_block_that_could_not_be_bound_is_bound_when_it_can_be(tmp_path):
    """A weight is trained for a while: nothing is said to be there that is not."""
    model, whole = make("plain"), make("plain")
    with attach(model, plan_for(model, "plain", share=0.2), cache=tmp_path) as handle:
        train(model, "plain", steps=2)
        train(whole, "plain", steps=2)
        model.eval()
        whole.eval()
        given = torch.randn(2, 4, model.layers[2].norm.weight.shape[0])
        model.layers[4](given)
        weight = model.layers[2].up.weight
        weight.requires_grad_(True)
        with pytest.raises(RunError, match="was frozen when it was placed and is trained now"):
            model.layers[2](given)
        for one in inside.streamed(handle):
            assert_is_as_memory_is(one)
        weight.requires_grad_(False)
        for _ in range(3):
            assert torch.equal(model.layers[2](given), whole.layers[2](given))


class _Reads(torch.autograd.Function):
    """Its backward reads what it was given a way to."""

    @staticmethod
    def forward(ctx, x, read):
        ctx.read = read
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.read().sum(), None


def test_what_is_read_in_a_backward_without_accesses_is_read_at_home(tmp_path):
    """After a pass of modules that the learned sequence lacks: no block is taken for one under way."""
    model = make("plain")
    with attach(model, plan_for(model, "plain", share=0.2), cache=tmp_path) as handle:
        train(model, "plain", steps=1)
        model.eval()
        given = torch.randn(2, 4, model.layers[2].norm.weight.shape[0])

        def run(*layers):
            x = given.clone().requires_grad_()
            for index in layers:
                x = model.layers[index](x)
            x.sum().backward()

        for _ in range(4):  # another sequence is learned
            run(0, 1, 2, 3)
        run(5)
        weight, x = model.layers[5].up.weight, torch.ones(3, requires_grad=True)
        _Reads.apply(x, lambda: weight).sum().backward()
        assert handle.record.direct_reads == 1
        held = weight[:2]
        before = held.clone()
        for _ in range(3):
            run(0, 1, 2, 3)
        assert torch.equal(held, before)
