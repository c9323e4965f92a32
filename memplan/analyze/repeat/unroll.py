"""What was seen of a shortened stack -> what the whole one does: a period in the middle stands for all that were left
out.

[Note: periodic] The periods between the first and the last of those that were traced must be alike: the same accesses
and costs, the same blocks but for their names, the same lifetimes, from each to itself, to its neighbours, and to the
same places outside. Then every period between would have been like them, and copies of period 1 are put in behind it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

from msgspec.structs import asdict, replace

from memplan.analyze.graph import Access, Block, LayerGraph, Lifetime, Rows, Stateful
from memplan.analyze.repeat.periodic import KEPT, Run

_ONE, _TWO, _LAST = 1, 2, KEPT - 1
_BETWEEN = range(_ONE, _LAST)


class NotPeriodicError(Exception):
    """What was seen of the short stack does not repeat."""


class _Place(NamedTuple):
    """Where an access lies. ``period``: of the run; None outside, where ``offset`` is its index."""

    side: Literal["forward", "backward", "outside"]
    period: int | None
    offset: int


def extended(graph: LayerGraph, run: Run) -> LayerGraph:
    """Return the graph with ``run`` at its whole length. Raises NotPeriodicError."""
    return _Extension(graph, run).graph()


def with_gradients(graph: LayerGraph, more_bytes: int) -> LayerGraph:
    """Return the graph with more bytes of gradients that are there before the pass begins."""
    return replace(
        graph,
        lifetimes=tuple(
            replace(life, size_bytes=life.size_bytes + more_bytes)
            if life.kind == "gradients" and not life.born
            else life
            for life in graph.lifetimes
        ),
    )


def whole_names(names: Sequence[str], run: Run) -> list[str]:
    """Return names of modules of the short stack, and those of what was left out beside them."""
    return _Names(run).whole(names)


def with_whole_names(stateful: Sequence[Stateful], run: Run) -> tuple[Stateful, ...]:
    """Return the stateful modules of the short stack, and those of what was left out beside them."""
    names = _Names(run)
    found: dict[str, Stateful] = {}
    for one in stateful:
        for copy in range(run.count - KEPT + 1):
            renamed = partial(names.renamed, copy=copy)
            reason = " ".join(_word_renamed(word, renamed) for word in one.reason.split(" "))
            found.setdefault(renamed(one.module), Stateful(module=renamed(one.module), reason=reason))
    return tuple(found.values())


def short_name(name: str, runs: Sequence[Run]) -> str:
    """Return the name in the short stacks of the module that was traced for this one."""
    for run in runs:
        name = _Names(run).short(name)
    return name


class _Names:
    """Names of modules and tensors in the short stack and in the whole one."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._more = run.count - KEPT
        self._prefix = "" if run.name == "." else run.name + "."

    def element(self, name: str) -> int | None:
        """Return the index in the short stack of the element that a name lies in."""
        head = name[len(self._prefix) :].split(".", 1)[0] if name.startswith(self._prefix) else ""
        return int(head) if head.isdigit() else None

    def period(self, name: str) -> int | None:
        """Return the period that a name lies in."""
        element = self.element(name)
        if element is None or not 0 <= element - self._run.first < KEPT * self._run.period:
            return None
        return (element - self._run.first) // self._run.period

    def whole(self, names: Sequence[str]) -> list[str]:
        """Return the names in the whole stack, those of copies among them."""
        found: list[str] = []
        mine = [name for name in names if self.period(name) == _ONE]
        for name in names:
            found.append(self.renamed(name, 0))
            if mine and name == mine[-1]:
                found += [self.renamed(one, copy) for copy in range(1, self._more + 1) for one in mine]
        return found

    def short(self, name: str) -> str:
        """Return the name in the short stack of what stands for a module of the whole one."""
        element, period = self.element(name), self._run.period
        if element is None:
            return name
        beyond = (element - self._run.first) // period - _ONE  # periods behind period 1
        return self.moved(name, -min(max(beyond, 0), self._more))

    def renamed(self, name: str, copy: int) -> str:
        """Return a name of the short stack as it is in the whole one, or in a copy of period 1."""
        element = self.element(name)
        if element is None:
            return name
        behind = element >= self._run.first + _TWO * self._run.period
        return self.moved(name, self._more if behind else copy if self.period(name) == _ONE else 0)

    def moved(self, name: str, periods: int) -> str:
        """Return a name as it is so many periods on."""
        element = self.element(name)
        if element is None or not periods:
            return name
        rest = name[len(self._prefix) + len(str(element)) :]
        return f"{self._prefix}{element + periods * self._run.period}{rest}"


def times(module: str, runs: Sequence[Run]) -> int:
    """Return for how many modules one of the short stacks stands."""
    return next((run.count - KEPT + 1 for run in runs if _Names(run).period(module) == _ONE), 1)


def period_of(module: str, run: Run) -> int | None:
    """Return the period of a run, of those that were traced, that a module lies in."""
    return _Names(run).period(module)


class _Extension:
    def __init__(self, graph: LayerGraph, run: Run) -> None:
        self._graph = graph
        self._named = _Names(run)
        self._more = run.count - KEPT
        self._forward, self._backward = self._spans("forward"), self._spans("backward")
        self._places = [self._place(access.index) for access in graph.accesses]
        self._owners = self._owners_of_blocks()

    def graph(self) -> LayerGraph:
        self._check_accesses()
        lifetimes = self._lifetimes()
        blocks, ids = self._blocks()
        accesses = self._accesses(ids)
        first: dict[int, int] = {}
        for access in accesses:
            for block in access.blocks:
                first.setdefault(block, access.index)
        order = sorted(range(len(blocks)), key=lambda block: first.get(block, len(accesses)))
        new = {old: place for place, old in enumerate(order)}
        return replace(
            self._graph,
            blocks=tuple(replace(blocks[old], id=place) for place, old in enumerate(order)),
            accesses=tuple(_renumbered(access, new) for access in accesses),
            lifetimes=lifetimes,
            recomputable=tuple(self._named.whole(self._graph.recomputable)),
        )

    # ---- where things are
    # ------------------------------------------------------------------------------------------------

    def _spans(self, kind: str) -> list[tuple[int, int]]:
        """Return from where to where each period's accesses go: one run of them, the periods side by side."""
        found: dict[int, list[int]] = defaultdict(list)
        for access in self._graph.accesses:
            period = self._named.period(access.module) if access.kind == kind else None
            if period is not None:
                found[period].append(access.index)
        if not found:  # no gradient, or a stack that this batch does not reach (images beside text)
            return []
        if len(found) != KEPT:
            raise NotPeriodicError(f"{len(found)} of {KEPT} periods are seen")
        spans = [(indices[0], indices[-1] + 1) for _, indices in sorted(found.items())]
        ordered = spans if kind == "forward" else spans[::-1]
        if any(end - begin != len(found[p]) for p, (begin, end) in enumerate(spans)):
            raise NotPeriodicError("other accesses come between")
        if any(a[1] != b[0] for a, b in pairwise(ordered)):
            raise NotPeriodicError("the periods do not follow one another")
        return spans

    def _place(self, index: int) -> _Place:
        for side, spans in (("forward", self._forward), ("backward", self._backward)):
            for period, (begin, end) in enumerate(spans):
                if begin <= index < end:
                    return _Place(side, period, index - begin)  # type: ignore[arg-type]
        return _Place("outside", None, index)

    def _index(self, place: _Place) -> int:
        """Return the new index of a place, ``period`` counted in the whole run."""
        if not self._forward:
            return place.offset
        ahead = self._more * (self._forward[_ONE][1] - self._forward[_ONE][0])
        back = self._more * (self._backward[_ONE][1] - self._backward[_ONE][0]) if self._backward else 0
        if place.period is None:
            added = ahead if place.offset >= self._forward[_ONE][1] else 0
            if self._backward and place.offset >= self._backward[_ONE][0]:
                added += back
            return place.offset + added
        spans = self._forward if place.side == "forward" else self._backward
        length = spans[_ONE][1] - spans[_ONE][0]
        if place.side == "forward":
            old = min(place.period, _ONE) if place.period < _TWO + self._more else place.period - self._more
            beyond = (place.period - old) * length
            return spans[old][0] + beyond + place.offset
        if place.period >= _TWO + self._more:
            return spans[place.period - self._more][0] + ahead + place.offset
        # Backward, later periods come first: the copies lie before period 1, the highest in front.
        old = min(place.period, _ONE)
        return spans[old][0] + ahead + back - (place.period - old) * length + place.offset

    def _whole(self, period: int) -> int:
        """Return the number in the whole run of a period of the short one."""
        return period if period <= _ONE else period + self._more

    # ---- accesses
    # --------------------------------------------------------------------------------------------------------

    def _check_accesses(self) -> None:
        for spans in (self._forward, self._backward):
            if not spans:
                continue
            one, *others = ([self._likeness(i) for i in range(*spans[period])] for period in _BETWEEN)
            if any(other != one for other in others):
                raise NotPeriodicError("the periods are not alike")

    def _likeness(self, index: int) -> object:
        """Return what an access is, whatever the number of its period."""
        access, place = self._graph.accesses[index], self._places[index]
        assert place.period is not None
        fields = asdict(access)
        for name in ("index", "module", "forward", "blocks", "rows"):
            del fields[name]
        forward = self._places[access.forward]
        if forward.period != place.period:
            raise NotPeriodicError("a backward belongs to another period's forward")
        return (
            tuple(fields.items()),
            self._named.moved(access.module, -place.period),
            (forward.side, forward.offset),
            tuple(sorted(self._block_likeness(block, place.period) for block in access.blocks)),
            tuple(sorted((self._block_likeness(r.block, place.period), r.size_bytes) for r in access.rows)),
        )

    def _block_likeness(self, block: int, period: int) -> tuple[str, str]:
        name = self._graph.blocks[block].name
        return ("shared", name) if self._owners[block] is None else ("own", self._named.moved(name, -period))

    def _accesses(self, ids: dict[tuple[int, int], int]) -> list[Access]:
        """``ids``: new ids of blocks by old id and number of the copy."""
        made: dict[int, Access] = {}
        for access, place in zip(self._graph.accesses, self._places, strict=True):
            for copy in self._copies(place.period):
                period = None if place.period is None else self._whole(place.period) + copy
                forward = access.forward
                if forward >= 0:
                    forward = self._index(self._places[forward]._replace(period=period))

                def new(block: int, copy: int = copy) -> int:
                    return ids[block, copy if self._owners[block] is not None else 0]

                index = self._index(place._replace(period=period))
                made[index] = replace(
                    access,
                    index=index,
                    module=self._named.renamed(access.module, copy),
                    forward=forward,
                    blocks=tuple(new(block) for block in access.blocks),
                    rows=tuple(Rows(block=new(rows.block), size_bytes=rows.size_bytes) for rows in access.rows),
                )
        if sorted(made) != list(range(len(made))):
            raise NotPeriodicError("the accesses do not line up")
        return [made[index] for index in range(len(made))]

    def _copies(self, period: int | None) -> Sequence[int]:
        return range(self._more + 1) if period == _ONE else (0,)

    # ---- blocks
    # ----------------------------------------------------------------------------------------------------------

    def _owners_of_blocks(self) -> list[int | None]:
        """Return the period that each block belongs to; None for those of none, or that several read."""
        readers: dict[int, set[int | None]] = defaultdict(set)
        for access, place in zip(self._graph.accesses, self._places, strict=True):
            for read in access.blocks:
                readers[read].add(place.period)
        found: list[int | None] = []
        for block in self._graph.blocks:
            own = self._named.period(block.name)
            of = readers[block.id] or {own}
            if own is not None and of not in ({own}, {None}) and not (set(_BETWEEN) <= of):
                raise NotPeriodicError(f"{block.name} is read elsewhere")
            found.append(own if of == {own} else None)
        return found

    def _blocks(self) -> tuple[list[Block], dict[tuple[int, int], int]]:
        def likeness(period: int) -> Counter[object]:
            return Counter(
                _renamed_block(block, lambda name: self._named.moved(name, -period), id=0)
                for block in self._graph.blocks
                if self._owners[block.id] == period
            )

        if any(likeness(period) != likeness(_ONE) for period in _BETWEEN):
            raise NotPeriodicError("the blocks of the periods are not alike")
        mine = [block.id for block in self._graph.blocks if self._owners[block.id] == _ONE]
        blocks: list[Block] = []
        ids: dict[tuple[int, int], int] = {}

        def add(block: Block, copy: int) -> None:
            ids[block.id, copy] = len(blocks)
            blocks.append(_renamed_block(block, lambda name: self._named.renamed(name, copy), id=len(blocks)))

        for block in self._graph.blocks:
            add(block, 0)
            if mine and block.id == mine[-1]:
                for copy in range(1, self._more + 1):
                    for old in mine:
                        add(self._graph.blocks[old], copy)
        return blocks, ids

    # ---- lifetimes
    # -------------------------------------------------------------------------------------------------------

    def _lifetimes(self) -> tuple[Lifetime, ...]:
        alike: dict[int, Counter[object]] = {period: Counter() for period in _BETWEEN}
        made: Counter[tuple[int, int, str, str, int]] = Counter()
        for life in self._graph.lifetimes:
            born, last = self._places[life.born], self._places[life.last]
            anchor = born.period if born.period is not None else last.period
            rest = (life.kind, life.policy, life.size_bytes)
            if anchor in alike and any(self._sets_the_peak(place, life.policy) for place in (born, last)):
                raise NotPeriodicError("what layers keep ends in an access outside them")
            if anchor in alike:
                alike[anchor][(_from(born, anchor), _from(last, anchor), *rest)] += 1
            for copy in self._copies(anchor):
                begins, ends = (self._index(self._carried(place, anchor, copy)) for place in (born, last))
                made[begins, ends, life.kind, life.policy, life.size_bytes] += 1
        if any(kept != alike[_ONE] for kept in alike.values()):
            raise NotPeriodicError("what the periods keep is not alike")
        together: Counter[tuple[int, int, str, str]] = Counter()
        for (first, end, kind, policy, size), count in made.items():
            together[first, end, kind, policy] += size * count
        return tuple(
            Lifetime(kind=kind, born=first, last=end, size_bytes=size, policy=policy)  # type: ignore[arg-type]
            for (first, end, kind, policy), size in sorted(together.items())
        )

    def _sets_the_peak(self, place: _Place, policy: str) -> bool:
        """Whether an access outside has a peak of its own under the policy: as many as there are layers come or go
        there, which that follows from. What is never recomputed has the one of the trace in which all is kept (see
        ``assemble``).
        """
        if place.period is not None or place.offset == len(self._places) - 1:
            return False
        return policy in ("any", "keep") or self._graph.accesses[place.offset].module in self._graph.recomputable

    def _carried(self, place: _Place, anchor: int | None, copy: int) -> _Place:
        """Return a place that a lifetime of period ``anchor`` begins or ends at, in the whole run."""
        if place.period is None:
            return place
        assert anchor is not None
        away = place.period - anchor
        if abs(away) > 1 and not {place.period, anchor} <= {0, _LAST}:
            raise NotPeriodicError("something lives on from one period to one further on")
        if abs(away) > 1:
            return place._replace(period=self._whole(place.period))
        return place._replace(period=self._whole(anchor) + copy + away)


def _from(place: _Place, period: int | None) -> tuple[str, int | None, int]:
    if place.period is None or period is None:
        return place.side, None, place.offset
    return place.side, place.period - period, place.offset


def _renamed_block(block: Block, renamed: Callable[[str], str], *, id: int) -> Block:
    """Return a block under other names, those in the reason why it is pinned among them."""
    reason = " ".join(_word_renamed(word, renamed) for word in block.pinned_because.split(" "))
    return replace(
        block,
        id=id,
        name=renamed(block.name),
        stack=renamed(block.stack),
        pinned_because=reason,
        tensors=tuple(replace(tensor, name=renamed(tensor.name)) for tensor in block.tensors),
    )


def _word_renamed(word: str, renamed: Callable[[str], str]) -> str:
    bare = word.rstrip(",.:;")
    return renamed(bare) + word[len(bare) :]


def _renumbered(access: Access, new: dict[int, int]) -> Access:
    return replace(
        access,
        blocks=tuple(sorted(new[block] for block in access.blocks)),
        rows=tuple(
            sorted(
                (Rows(block=new[rows.block], size_bytes=rows.size_bytes) for rows in access.rows), key=lambda r: r.block
            )
        ),
    )
