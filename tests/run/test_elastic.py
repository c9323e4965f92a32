"""Runs whose device arena gives bytes back for part of a pass: the same bits, the memory that was said, any order of
accesses.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from memplan.errors import TransferError
from memplan.program.schema import Segment
from memplan.run.attach import attach
from memplan.run.handle import handle_of
from memplan.run.memory.arena import Arena
from memplan.run.transfer.transfer import CpuTransfers, HostSource
from memplan.run.verify.race_check import ClockedTransfers
from tests.run.test_parity import compare, plan_for
from tests.support import inside
from tests.support.counting import LiveBytes, held_by, resident_bytes
from tests.support.training import batch_of, loss_of, make

PAGE = mmap.PAGESIZE
CASES = [("llama", 0.4, ()), ("plain", 0.6, ()), ("gpt2", 0.3, ()), ("t5", 0.3, ())]
"""Kinds and budgets whose plans have segments that come and go."""


def elastic(plan):
    return [number for number, segment in enumerate(plan.arenas[0].segments) if segment.absent]


def watched(arena):
    """Count how often each segment goes and comes."""
    gone, come, give_back, bring_back = [], [], arena.give_back, arena.bring_back
    arena.give_back = lambda number: (gone.append(number), give_back(number))
    arena.bring_back = lambda number: (arena.is_there(number) or come.append(number), bring_back(number))
    return gone, come


@pytest.mark.quick("llama-0.4-offload0-plain", "t5-0.3-offload3-plain")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize(("kind", "share", "offload"), CASES)
def test_three_steps_to_the_bit(kind, share, offload, checked, tmp_path):
    with compare(kind, share=share, offload=offload, checked=checked, tmp_path=tmp_path) as handle:
        assert elastic(handle.plan)
        assert handle.record.misses == handle.record.out_of_order == 0


@pytest.mark.quick("llama-0.4-offload0", "gpt2-0.3-offload2")
@pytest.mark.parametrize(("kind", "share", "offload"), CASES)
def test_segments_come_and_go_as_the_plan_says(kind, share, offload, tmp_path):
    model = make(kind)
    plan = plan_for(model, kind, share=share, offload=offload)
    with attach(model, plan, cache=tmp_path) as handle:
        arena = inside.device_arena(handle)
        loss_of(model(**batch_of(kind))).backward()
        gone, come = watched(arena)
        seen = []

        def look():
            index = inside.index_of_access(handle)
            seen.extend(
                (number, index)
                for number in elastic(plan)
                if arena.is_there(number)
                and any(first <= index <= last for first, last in plan.arenas[0].segments[number].absent)
            )

        with inside.after_each(handle, "start_loads", look):
            loss_of(model(**batch_of(kind))).backward()
    assert elastic(plan)
    assert set(gone) == set(come) == set(elastic(plan))
    assert not seen


@pytest.mark.quick("llama-0.4-offload0")
@pytest.mark.parametrize(("kind", "share", "offload"), CASES)
def test_the_handles_own_count_is_the_prediction(kind, share, offload, tmp_path):
    model = make(kind)
    plan = plan_for(model, kind, share=share, offload=offload)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with attach(model, plan, cache=tmp_path) as handle:
        for _ in range(2):
            with (
                handle.watch_memory(optimizer),
                LiveBytes(held_by(model, optimizer), arena=inside.device_arena(handle)) as count,
            ):
                loss_of(model(**batch_of(kind))).backward()
                optimizer.step()
                optimizer.zero_grad()
        record = handle.record
    assert record.vram_peak_bytes <= plan.budgets.vram_bytes
    assert record.vram_peak_bytes == pytest.approx(plan.prediction.peaks.vram_bytes, rel=0.05)
    # The kernel's pages: those of a segment that is there, but not filled yet, are not counted.
    assert 0.9 * record.vram_peak_bytes <= count.peak <= record.vram_peak_bytes * 1.001


@pytest.mark.full
def test_an_access_where_its_segment_is_away_brings_it_back_for_itself(tmp_path):
    """The first layer is called once more at the end of the forward, where what it lies in is given back."""
    kind = "plain"
    expected, model = make(kind), make(kind)
    plan = plan_for(model, kind, share=0.6)
    where = {
        item.block: address
        for address in plan.addresses
        for item in plan.items
        if item.id == address.item and address.arena == 0
    }
    held = {
        block.name: number
        for block in plan.table.blocks
        for number in elastic(plan)
        if block.id in where
        and 0
        <= where[block.id].offset_bytes - plan.arenas[0].segments[number].offset_bytes
        < plan.arenas[0].segments[number].size_bytes
    }
    name, number = next((name, number) for name, number in held.items() if name.startswith("layers."))
    layer = int(name.split(".")[1])

    def run(model):
        """Every layer, and one more time a layer that lies in bytes that come and go, where each has its turn."""
        losses = []
        for at in range(len(model.layers)):
            x = model.embed(batch_of(kind)["input_ids"])
            for index, each in enumerate(model.layers):
                x = each(x)
                if index == at:
                    x = model.layers[layer](x)
            loss = loss_of(model.head(x))
            loss.backward()
            losses.append(loss.detach())
        return losses, [p.grad for p in model.parameters() if p.grad is not None]

    for checked in (False, True):
        with attach(model, plan, cache=tmp_path, checked=checked) as handle:
            gone, come = watched(inside.device_arena(handle))
            found = run(model)
            assert handle.record.out_of_order > 0
            assert number in gone
            assert number in come
        whole = run(expected)
        assert all(
            torch.equal(a, b) for one, other in zip(whole, found, strict=True) for a, b in zip(one, other, strict=True)
        )


def test_evaluation_and_a_learned_order(tmp_path):
    kind = "plain"
    expected, model = make(kind), make(kind)
    with attach(model, plan_for(model, kind, share=0.6), cache=tmp_path, checked=True) as handle:
        assert elastic(handle.plan)

        def run(model):
            losses = []
            for _ in range(6):  # two forwards for each backward: learned after three of them
                with torch.no_grad():
                    losses.append(loss_of(model(**batch_of(kind))))
                loss = loss_of(model(**batch_of(kind)))
                loss.backward()
                losses.append(loss.detach())
            return losses + [p.grad for p in model.parameters() if p.grad is not None]

        found, whole = run(model), run(expected)
        assert handle.record.learned == 1
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


# ---- the arena -------------------------------------------------------------------------------------------------------


def arena_of(*sizes, **options):
    segments, top = [], 0
    for number, size in enumerate(sizes):
        segments.append(Segment(offset_bytes=top, size_bytes=size, absent=((1, 2),) if number else ()))
        top += size
    return Arena(top, torch.device("cpu"), segments=segments, **options)


def test_the_kernel_has_the_pages_of_what_is_given_back():
    arena = arena_of(5 * PAGE, 3 * PAGE + 512, 2 * PAGE)
    for number in range(3):
        arena.segment(number).fill_(number + 1)
    view = arena.part(5 * PAGE + 512, PAGE).view(torch.float32)
    address = view.data_ptr()
    changes = []
    arena.watch = changes.append
    arena.give_back(1)
    arena.give_back(1)
    assert [resident_bytes(arena.segment(number)) for number in range(3)] == [5 * PAGE, 0, 2 * PAGE]
    assert arena.there_bytes == 7 * PAGE
    assert not arena.segment(1).any()  # what reads there reads zeros
    arena.bring_back(1)
    arena.segment(1).fill_(7)
    assert changes == [-(3 * PAGE + 512), 3 * PAGE + 512]
    assert (view.data_ptr(), view.view(torch.uint8)[0].item()) == (address, 7)
    assert {arena.segment(0)[0].item(), arena.segment(2)[0].item()} == {1, 3}
    assert arena.addresses.holds(address)
    assert not arena.addresses.holds(arena.bytes.data_ptr() - 1)


def test_what_is_given_back_in_the_checked_mode_reads_as_nan():
    arena = arena_of(PAGE, PAGE, poisoned=True)
    view = arena.part(PAGE, PAGE).view(torch.float32)
    arena.give_back(1)
    assert view.isnan().all()


def test_bytes_are_not_given_back_under_a_load():
    arena = arena_of(PAGE, PAGE)
    transfers = ClockedTransfers(CpuTransfers(), {5: "a block"})
    ticket = transfers.load("h2d", 5, HostSource(torch.ones(PAGE, dtype=torch.uint8)), arena.part(PAGE, PAGE))
    with pytest.raises(TransferError, match=r"giving back segment 1 may overtake the load of a block"):
        transfers.write(-2, arena.segment(1), "giving back segment 1")
    transfers.wait(ticket, 5)
    transfers.write(-2, arena.segment(1), "giving back segment 1")
    transfers.close()


def test_a_plan_without_them_has_one_allocation():
    model = make("plain")
    plan = plan_for(model, "plain", share=1.0, tiers="host")
    with attach(model, plan):
        assert not inside.device_arena(handle_of(model)).is_elastic
