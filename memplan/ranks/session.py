"""Ranks that agree: what one does in several stages with the others, none of which goes on where another has failed.

[Note: no collective is waited in] All goes through torch.distributed's store, which one rank can write to though
another never comes: no operation here is entered that only another rank can end. Each rank posts a record for a stage,
rank 0 gathers them and posts all of them together, and who waits looks for an error as well. Who does not come is named
after ``MEMPLAN_RANKS_TIMEOUT`` seconds; a process of this node that has ended, at once.

[Note: sessions are numbered] Each rank counts its sessions, so that ranks that do not do the same find out: they meet
in a session of one number, whose purposes differ.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from memplan.errors import DoesNotFitError, MemplanError, RunError, type_and_line
from memplan.ranks.ended import first_ended, tell_who_ended
from memplan.ranks.world import Node, World, this_node, world

_NUMBERS = itertools.count()
_VARIABLE = "MEMPLAN_RANKS_TIMEOUT"
_DEADLINE_S = 600.0
"""Ranks load their models and prepare their data at different speeds."""
_LONGER = 6
"""Once all have come they are at work: a plan of many experts takes minutes, and so does filling much RAM."""
_GRACE_S = 5.0
"""How long a rank that has failed stays for the others to hear why: it may be the one that keeps the store."""
_FIRST_POLL_S, _LAST_POLL_S = 0.002, 0.1
_PIECE_BYTES = 4 << 20
"""The store takes no more at a time."""


class RankError(RunError):
    """Another rank has failed, or has not come. ``is_expected``: it said something that memplan says on purpose."""

    def __init__(self, message: str, *, is_expected: bool = False) -> None:
        self.is_expected = is_expected
        super().__init__(message)


class Member(msgspec.Struct, frozen=True):
    """A rank's process, as the others know it."""

    rank: int
    pid: int
    boot: str
    pids: str

    @property
    def node(self) -> Node:
        return Node(boot=self.boot, pids=self.pids)


class _Came(msgspec.Struct, frozen=True):
    """What a rank has come for, and with what."""

    purpose: str
    versions: str


class _Failure(msgspec.Struct, frozen=True):
    rank: int
    doing: str
    said: str
    is_expected: bool
    refusal: dict[str, Any] | None = None
    """What a DoesNotFitError says, where it was one."""


class Session:
    """What the ranks do together once: plan, or attach. Each rank makes one, and does the same stages in it."""

    def __init__(self, ranks: World, purpose: str) -> None:
        """Raises RankError where a rank does not come, has failed, or has come for another purpose or with other
        versions.
        """
        self.rank, self.size = ranks.rank, ranks.size
        self._ranks, self._store = ranks, ranks.store
        self._number = next(_NUMBERS)
        self._steps = itertools.count()
        self._deadline_s = deadline_s()
        self._has_failed = False
        self._members: dict[int, Member] = {}
        """Those that have announced themselves, as far as they were looked at."""
        announce(ranks)
        come = _Came(purpose=purpose, versions=_versions())
        records = self.gather("meeting the other ranks", msgspec.msgpack.encode(come))
        came = [msgspec.msgpack.decode(record, type=_Came) for record in records]
        for rank, other in enumerate(came):
            if other.purpose != came[0].purpose:
                raise RankError(
                    f"rank {rank} has come to {other.purpose} while rank 0 has come to {came[0].purpose}: all ranks "
                    "must do the same with memplan"
                )
            if other.versions != came[0].versions:
                raise RankError(f"rank {rank} has {other.versions}, and rank 0 has {came[0].versions}")
        with self._heard("meeting the other ranks"):
            _look_for(ranks, self._members)
        own = self._members[self.rank].node
        self.node = tuple(self._members[rank] for rank in range(self.size) if self._members[rank].node == own)
        """The ranks of this node, in order."""
        self._deadline_s *= _LONGER

    @property
    def place(self) -> int:
        """Which of its node's ranks this is."""
        return next(place for place, member in enumerate(self.node) if member.rank == self.rank)

    @property
    def most_per_node(self) -> int:
        """The most ranks that a node has."""
        nodes = [member.node for member in self._members.values()]
        return max(map(nodes.count, nodes))

    @property
    def machine_share(self) -> int:
        """How many nodes of this session are on one machine, at most: containers that do not see each other."""
        nodes = {member.node for member in self._members.values()}
        boots = [node.boot for node in nodes]
        return max(map(boots.count, boots))

    @contextlib.contextmanager
    def stage(self, doing: str) -> Iterator[None]:
        """Do what is inside on every rank; go on when all have done it. ``doing``: what it is, for messages.

        An error on this rank is told to the others. Raises RankError where it was another's.
        """
        with self.telling(doing):
            yield
        self.gather(doing, b"")

    @contextlib.contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Tell the others of an error inside, and wait for nobody."""
        try:
            yield
        except BaseException as error:
            self._fail(doing, error)
            raise

    @contextlib.contextmanager
    def first_of_node(self, doing: str) -> Iterator[bool]:
        """Do what is inside on the first rank of each node while its others wait; say whether this is one."""
        is_first = self.node[0].rank == self.rank
        with self.stage(doing):
            yield is_first

    def gather(self, doing: str, record: bytes) -> list[bytes]:
        """Return what each rank has given, by rank, once all have. Raises RankError."""
        name = self._next(doing)
        with self._heard(doing):
            self._put(f"{name}/{self.rank}", record)
            self._store.add(f"{name}/count", 1)
            if self.rank == 0:
                self._wait(lambda: int(self._store.add(f"{name}/count", 0)) >= self.size, doing, name)
                records = [self._get(f"{name}/{rank}") for rank in range(self.size)]
                self._put(f"{name}/all", msgspec.msgpack.encode(records))
                return records
            self._wait(lambda: bool(self._store.check([f"{name}/all"])), doing, name)
            return msgspec.msgpack.decode(self._get(f"{name}/all"), type=list[bytes])

    def from_one(self, doing: str, one: int, make: Callable[[], bytes]) -> bytes:
        """Return what ``make`` gives on rank ``one``, on every rank. Raises RankError, and what it raises there."""
        name = self._next(doing)
        if self.rank == one:
            with self.telling(doing):
                made = make()
            with self._heard(doing):
                self._put(name, made)
            return made
        with self._heard(doing):
            self._wait(lambda: bool(self._store.check([name])), doing, None)
            return self._get(name)

    def _next(self, doing: str) -> str:
        """Return the name of what comes next: the same on every rank, and no two of a session."""
        return f"{self._number}/{next(self._steps)} {doing}"

    def _put(self, name: str, data: bytes) -> None:
        packed = zlib.compress(data, 1)
        pieces = [packed[start : start + _PIECE_BYTES] for start in range(0, len(packed), _PIECE_BYTES)]
        for number, piece in enumerate(pieces[1:], 1):
            self._store.set(f"{name}/piece {number}", piece)
        self._store.set(name, len(pieces).to_bytes(4, "little") + pieces[0])  # last: who sees it sees all

    def _get(self, name: str) -> bytes:
        held = self._store.get(name)
        pieces = [held[4:]]
        for number in range(1, int.from_bytes(held[:4], "little")):
            pieces.append(self._store.get(f"{name}/piece {number}"))
        return zlib.decompress(b"".join(pieces))

    @contextlib.contextmanager
    def _heard(self, doing: str) -> Iterator[None]:
        """Have a store that is gone be an error of ours."""
        try:
            yield
        except (MemplanError, KeyboardInterrupt):
            raise
        except Exception as error:  # torch's own: DistStoreError, DistNetworkError
            raise RankError(
                f"rank {self.rank} lost the other ranks while {doing} ({type_and_line(error)}): the rank that keeps "
                "torch.distributed's store, mostly rank 0, has ended"
            ) from error

    def _wait(self, is_there: Callable[[], bool], doing: str, gathered: str | None) -> None:
        """Return when ``is_there``. Raises RankError where a rank has failed, ended, or does not come."""
        began, pause = time.monotonic(), _FIRST_POLL_S
        # Rank 0 knows who is missing: it is to speak first.
        deadline_s = self._deadline_s + (0 if self.rank == 0 else 2 * _GRACE_S)
        while not is_there():
            self._raise_of_others()
            time.sleep(pause)
            pause = min(_LAST_POLL_S, pause * 1.5)
            if pause < _LAST_POLL_S:
                continue
            said = first_ended(self._ranks)  # on whatever node
            if said is not None and not is_there():
                self._raise_of_others()
                raise RankError(f"{said}, while rank {self.rank} was {doing}: no rank goes on")
            ended = self._ended()
            if ended is not None and not is_there():
                self._raise_of_others()
                self._fail(doing, RankError(f"rank {ended} has ended"))
                raise RankError(f"rank {ended} has ended while the other ranks were {doing}")
            if time.monotonic() - began > deadline_s:
                missing = self._missing(gathered)
                error = RankError(
                    f"{missing} did not come within {deadline_s:.0f} s while rank {self.rank} was {doing}: all ranks "
                    f"must do the same with memplan, or take longer than {_VARIABLE} (seconds) says"
                )
                self._fail(doing, error)
                raise error

    def _missing(self, gathered: str | None) -> str:
        if gathered is None or self.rank != 0:
            return "a rank"
        names = [str(rank) for rank in range(self.size) if not self._store.check([f"{gathered}/{rank}"])]
        return f"rank {', '.join(names)}"

    def _ended(self) -> int | None:
        """Return a rank of this node whose process is there no more, or None."""
        return _ended(self._ranks, self._members)

    def _fail(self, doing: str, error: BaseException) -> None:
        """Tell the others that this rank has failed, and stay until they have heard it."""
        if self._has_failed:
            return
        self._has_failed = True
        refusal: dict[str, Any] | None = None
        if isinstance(error, DoesNotFitError):
            names = ("asked", "least_vram_bytes", "limited_by", "suggestions", "least_ram_bytes", "least_disk_bytes")
            refusal = {name: getattr(error, name) for name in names} | {"suggestions": list(error.suggestions)}
        failure = _Failure(
            rank=self.rank,
            doing=doing,
            said=type_and_line(error),
            is_expected=isinstance(error, MemplanError) and not isinstance(error, RankError),
            refusal=refusal,
        )
        with contextlib.suppress(Exception):  # the store may be gone, and the error itself is raised all the same
            self._store.set(f"{self._number}/error", msgspec.msgpack.encode(failure))
            self._store.add(f"{self._number}/heard", 1)  # all may fail alike
            if isinstance(error, Exception):
                until = time.monotonic() + _GRACE_S
                while time.monotonic() < until and int(self._store.add(f"{self._number}/heard", 0)) < self.size:
                    time.sleep(_FIRST_POLL_S)

    def _raise_of_others(self) -> None:
        if self._has_failed or not self._store.check([f"{self._number}/error"]):
            return
        self._has_failed = True  # it has been told: nothing more is said of this session
        failure = msgspec.msgpack.decode(self._store.get(f"{self._number}/error"), type=_Failure)
        self._store.add(f"{self._number}/heard", 1)
        if failure.refusal is not None:
            raise DoesNotFitError(**failure.refusal | {"suggestions": tuple(failure.refusal["suggestions"])})
        raise RankError(
            f"rank {failure.rank} failed while {failure.doing} ({failure.said}), so no rank goes on",
            is_expected=failure.is_expected,
        )


def session(purpose: str) -> Session | None:
    """Return a session of all ranks, or None where this process trains alone. Raises RankError."""
    ranks = world()
    return None if ranks is None else Session(ranks, purpose)


def announce(ranks: World | None) -> None:
    """Have the other ranks know this process, so that they find out where it ends before it comes to them."""
    if ranks is not None:
        node = this_node(ranks.rank)
        own = Member(rank=ranks.rank, pid=os.getpid(), boot=node.boot, pids=node.pids)
        with contextlib.suppress(Exception):  # a store that is gone is told of by who waits for it
            ranks.store.set(f"process {ranks.rank}", msgspec.msgpack.encode(own))
        tell_who_ended(ranks, lambda: _ended(ranks, {}))


def _ended(ranks: World, known: dict[int, Member]) -> int | None:
    """Return another rank of this node whose process is there no more, of those that have announced themselves."""
    _look_for(ranks, known)
    own = this_node(ranks.rank)
    others = (member for member in known.values() if member.rank != ranks.rank and member.node == own)
    return next((member.rank for member in others if is_gone(member.pid)), None)


def _look_for(ranks: World, known: dict[int, Member]) -> None:
    for rank in range(ranks.size):
        if rank not in known and ranks.store.check([f"process {rank}"]):
            known[rank] = msgspec.msgpack.decode(ranks.store.get(f"process {rank}"), type=Member)


def stage(ranks: Session | None, doing: str) -> contextlib.AbstractContextManager[None]:
    """Return a stage of a session; nothing where there is none."""
    return contextlib.nullcontext() if ranks is None else ranks.stage(doing)


def deadline_s() -> float:
    """Return for how long a rank waits for another one that says nothing, in seconds."""
    try:
        return float(os.environ.get(_VARIABLE, _DEADLINE_S))
    except ValueError:
        return _DEADLINE_S


def _versions() -> str:
    from importlib.metadata import version

    import torch

    return f"memplan {version('memplan')} with torch {torch.__version__}"


def is_gone(pid: int) -> bool:
    """Whether a process of this node is there no more, or is dead and nobody has looked."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except FileNotFoundError:
        return True
    except OSError:
        return False
