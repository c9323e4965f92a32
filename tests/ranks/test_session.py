"""Ranks agree stage by stage, or all of them hear which one has not. Here they are threads of one process."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from memplan.errors import DoesNotFitError, InputError
from memplan.ranks import session as sessions
from memplan.ranks import world as worlds
from memplan.ranks.session import RankError, Session
from memplan.ranks.world import World


@pytest.fixture(autouse=True)
def of_one_number(monkeypatch):
    """Sessions are numbered by process, and these ranks are in one."""
    monkeypatch.setattr(sessions, "_NUMBERS", iter(lambda: 7, None))


def together(*acts, timeout_s=20.0):
    """Run what each rank does; return what it returned or raised, and how long all took."""
    store = dist.HashStore()
    became = [None] * len(acts)

    def run(rank, act):
        try:
            became[rank] = act(World(rank=rank, size=len(acts), store=dist.PrefixStore("memplan", store)))
        except BaseException as error:
            became[rank] = error

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in enumerate(acts)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    assert not any(thread.is_alive() for thread in threads)
    return became, time.monotonic() - began


def test_each_has_what_all_have_given_and_what_one_has_made():
    def act(world):
        ranks = Session(world, "try")
        given = ranks.gather("giving", bytes([world.rank]) * 3)
        big = ranks.from_one("making", 1, lambda: bytes(range(256)) * 40_000)
        with ranks.stage("doing nothing"):
            pass
        return given, big, len(ranks.node), ranks.place

    became, _ = together(act, act, act)
    for rank, (given, big, node, place) in enumerate(became):
        assert given == [b"\0\0\0", b"\1\1\1", b"\2\2\2"]
        assert big == bytes(range(256)) * 40_000
        assert (node, place) == (3, rank)


@pytest.mark.parametrize(
    ("error", "kind", "is_expected"),
    [(OSError("no disk"), RankError, False), (InputError("no such thing"), RankError, True), (None, RankError, False)],
)
def test_an_error_on_one_is_told_to_all_within_a_second(error, kind, is_expected):
    raised = KeyboardInterrupt() if error is None else error

    def well(world):
        with Session(world, "try").stage("doing it"):
            pass

    def ill(world):
        with Session(world, "try").stage("doing it"):
            raise raised

    became, seconds = together(well, well, ill)
    assert became[2] is raised
    for other in became[:2]:
        assert isinstance(other, kind)
        assert other.is_expected is is_expected
        assert "rank 2 failed while doing it" in str(other)
    assert seconds < 5


def test_what_does_not_fit_does_so_on_all():
    error = DoesNotFitError("a plan", least_vram_bytes=5, limited_by="vram", suggestions=("give more",))

    def make():
        raise error

    became, _ = together(*[lambda world: Session(world, "try").from_one("planning", 0, make)] * 2)
    assert became[0] is error
    assert isinstance(became[1], DoesNotFitError)
    assert str(became[1]) == str(error)
    assert became[1].suggestions == ("give more",)


def test_all_may_fail_alike():
    def act(world):
        with Session(world, "try").telling("doing it"):
            raise InputError(f"on rank {world.rank}")

    became, seconds = together(act, act)
    assert [str(error) for error in became] == ["on rank 0", "on rank 1"]
    assert seconds < 4


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setenv("MEMPLAN_RANKS_TIMEOUT", "0.5")
    became, seconds = together(
        lambda world: Session(world, "try"), lambda world: Session(world, "try"), lambda world: None
    )
    for other in became[:2]:
        assert isinstance(other, RankError)
        assert "rank 2 did not come within" in str(other)
    assert seconds < 8


def test_who_has_ended_is_named_at_once(monkeypatch):
    gone = [False]
    monkeypatch.setattr(sessions, "is_gone", lambda pid: gone[0])

    def ends(world):
        sessions.announce(world)
        gone[0] = True

    became, seconds = together(lambda world: Session(world, "try"), ends)
    assert "rank 1 has ended" in str(became[0])
    assert seconds < 10  # of these are some for others to hear it


def test_who_ended_by_an_error_before_it_came_is_named_wherever_it_ran():
    """Its node is another, whose processes nobody here sees."""

    def ends(world):
        world.store.compare_set("first to fail", "", "rank 1 ended by ValueError: no such file")

    became, seconds = together(lambda world: Session(world, "try"), ends)
    assert isinstance(became[0], RankError)
    assert "rank 1 ended by ValueError: no such file, while rank 0 was meeting the other ranks" in str(became[0])
    assert seconds < 3


def test_ranks_that_are_started_anew_do_not_hear_those_before(monkeypatch):
    """Their launcher's store is the same."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(worlds._Known, "rank", None)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    for start in ("0", "1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        ranks = worlds.world()
        assert not ranks.store.check(["process 0"])
        sessions.announce(ranks)
        assert worlds.world().store.check(["process 0"])


def test_they_must_have_come_for_the_same():
    became, _ = together(lambda world: Session(world, "plan"), lambda world: Session(world, "attach"))
    assert all("rank 1 has come to attach while rank 0 has come to plan" in str(error) for error in became)
