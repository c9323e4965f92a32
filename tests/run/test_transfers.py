"""However early or late a load runs within what it promises, results are the same; an order left to chance raises."""

from __future__ import annotations

import pytest
import torch

from memplan.errors import StrayReadError, TransferError
from memplan.run.attach import attach
from memplan.run.modules import install as installing
from memplan.run.transfer.transfer import CpuTransfers, HostSource
from memplan.run.verify.race_check import ClockedTransfers
from tests.run import adversary
from tests.run.test_off_sequence import plan_of, wandering, ways_of_autograd
from tests.run.test_parity import compare
from tests.support import inside
from tests.support.training import KINDS, assert_equal, train


@pytest.fixture(params=adversary.ALL, ids=lambda kind: kind.__name__)
def adversarial(request, monkeypatch):
    monkeypatch.setattr(installing, "CpuTransfers", request.param)


@pytest.mark.each_value
@pytest.mark.usefixtures("adversarial")
@pytest.mark.parametrize("share", [0.2])
@pytest.mark.parametrize("checkpointing", ["off", "around-reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_first_and_at_the_last_legal_moment(kind, checkpointing, share, tmp_path):
    compare(kind, checkpointing=checkpointing, share=share, checked=True, tmp_path=tmp_path).detach()


@pytest.mark.each_value
@pytest.mark.usefixtures("adversarial")
@pytest.mark.parametrize("way", ["straight", "drop", "any"])
def test_off_the_sequence_too(way, tmp_path):
    whole, planned = wandering(way), wandering(way)
    plan = plan_of(wandering(way), 0.9, "all")
    with attach(planned, plan, cache=tmp_path, checked=True):
        assert_equal(train(whole, "plain", steps=4), train(planned, "plain", steps=4))
        if way != "straight":
            return
        one, other = ways_of_autograd(whole), ways_of_autograd(planned)
        assert [torch.equal(a, b) for a, b in zip(one, other, strict=True)] == [True] * len(one)


def test_a_conductor_that_does_not_wait_is_found(tmp_path, monkeypatch):
    """Even where the load happens to be over in time."""
    inside.never_wait(monkeypatch)
    with pytest.raises(StrayReadError, match=r"may come before the load of .*: nothing waited"):
        compare("llama", checked=True, tmp_path=tmp_path)


def test_a_conductor_that_lets_two_channels_write_one_slot_is_found(tmp_path, monkeypatch):
    inside.never_wait_to_evict(monkeypatch)
    planned = wandering("any")
    plan = plan_of(wandering("any"), 0.9, "all")
    assert {item.home for item in plan.items} >= {"host", "disk"}
    with (
        attach(planned, plan, cache=tmp_path, checked=True),
        pytest.raises(TransferError, match=r"the load of .* may overtake the load of .*"),
    ):
        train(planned, "plain", steps=4)


@pytest.fixture
def clocked():
    slot = torch.empty(64, dtype=torch.uint8)
    transfers = ClockedTransfers(CpuTransfers(), {0: "a", 1: "b"})
    yield transfers, slot
    transfers.close()


def test_orders(clocked):
    transfers, slot = clocked

    def load(channel, block, part):
        return transfers.load(channel, block, HostSource(torch.ones_like(part)), part)

    with pytest.raises(StrayReadError, match="a, read, but no load brought it"):
        transfers.read(0, "read")
    ticket = load("h2d", 0, slot)
    with pytest.raises(StrayReadError, match="a, read, may come before the load of a"):
        transfers.read(0, "read")
    transfers.wait(ticket, 0)
    transfers.read(0, "read")
    other = load("disk", 1, slot[32:])  # knows of the read, which the compute had done
    with pytest.raises(StrayReadError, match="a, read, but no load brought it, or another block's overwrote it"):
        transfers.read(0, "read")
    load("h2d", 0, slot[:32])  # beside the other
    with pytest.raises(TransferError, match="the load of a may overtake the load of b"):
        load("h2d", 0, slot)
    transfers.wait(other, 1)
