"""Lifetimes of what outlives its access, by what becomes of whose activations.

A trace says how long bytes live where every module keeps its activations, and another where every one is recomputed. A
plan mixes them: what lives longer in the second trace belongs to whoever holds it. A recomputed module holds what it
begins from until its backward.

[Note: what all layers are handed] A key-value cache, masks and position embeddings go to every layer, so every
recomputed one holds what it was handed of them, until the first of those in the order of forward has had its backward.
A lifetime knows the policy of one module alone. So these count until then whatever is recomputed: never too little, and
too much by them where nothing is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from memplan.analyze.graph import Activations, Lifetime, LifetimeKind
from memplan.analyze.trace.accesses import Seen

Span = tuple[LifetimeKind, int, int]
"""Kind, first and last access."""

_KIND: LifetimeKind = "activations"


class Lifetimes:
    """What outlives an access: of recomputable modules once for each policy, of all others once."""

    def __init__(
        self, spans: Mapping[Activations, Mapping[Span, int]], accesses: Sequence[Seen], recomputable: frozenset[str]
    ) -> None:
        """``spans``: bytes that outlive an access, of the trace in which all recomputable modules have that policy."""
        self._accesses = accesses
        self._recomputable = recomputable
        self._traced = {policy: Counter(found) for policy, found in spans.items()}
        self._longer: list[tuple[Activations, int, int, int]] = []
        """What was said to live longer than its trace had it: the policy, last accesses before and now, bytes."""
        self._first_backward = next((i for i, one in enumerate(accesses) if one.kind == "backward"), len(accesses))
        self._choices = [i for i in range(self._first_backward) if accesses[i].module in recomputable]
        self._forward_ends: dict[tuple[Activations, int], set[int]] = defaultdict(set)
        """By policy and maker: until when, of what goes before any backward."""
        for policy, found in self._traced.items():
            for _, born, last in found:
                if last < self._first_backward:
                    self._forward_ends[policy, born].add(last)
        self._backward_of = {one.forward: i for i, one in enumerate(accesses) if one.kind == "backward"}
        handed = self._hand_on()
        self._shared = shared = tuple(self._hand_in(handed))
        lives = [life for policy in self._traced for life in self._of(policy)]
        together: Counter[tuple[int, int, LifetimeKind, Literal["keep", "recompute", "offload", "any"]]] = Counter()
        for life in (*lives, *shared):
            together[life.born, life.last, life.kind, life.policy] += life.size_bytes
        self.all = tuple(
            Lifetime(kind=kind, born=born, last=last, size_bytes=size_bytes, policy=policy)
            for (born, last, kind, policy), size_bytes in sorted(together.items())
        )

    def spanning(self, index: int, policy: Activations) -> int:
        """Return the bytes of them that were alive in an access in the trace of a policy."""
        found = sum(x.size_bytes for x in self.all if x.born <= index <= x.last and x.policy in ("any", policy))
        if policy == "recompute":
            return found
        found -= sum(x.size_bytes for x in self._shared if x.born <= index <= x.last)
        return found - sum(size for here, end, last, size in self._longer if here == policy and end < index <= last)

    def _of(self, policy: Activations) -> Iterator[Lifetime]:
        for (kind, born, last), size_bytes in self._traced[policy].items():
            of_choice = self._accesses[born].module in self._recomputable
            if size_bytes and (of_choice or policy == "keep"):
                here = policy if of_choice else "any"
                yield Lifetime(kind=kind, born=born, last=last, size_bytes=size_bytes, policy=here)

    def _next(self, index: int) -> tuple[int, int] | None:
        """Return the next forward behind an access whose module has a choice, and its backward; None where there is
        none.
        """
        position = bisect_right(self._choices, index)
        found = self._choices[position] if position < len(self._choices) else None
        return (found, self._backward_of[found]) if found is not None and found in self._backward_of else None

    def _hand_on(self) -> dict[int, int]:
        """Have each module with a choice hold what it was handed by the one before, and all what lies in a cache.
        Return the bytes that each hands to the next alone, by its forward.
        """
        kept, again, handed = self._traced["keep"], self._traced["recompute"], dict[int, int]()
        for index in self._choices:
            behind = self._next(index)
            if behind is None:
                continue
            holder, last = behind
            here = (_KIND, index, last)
            handed[index], more = again[here], again[here] - kept[here]
            # Where all is kept a cache goes once the model has returned; nobody else holds anything so long.
            self._live_on("offload", index, holder, last, more)
            moved = self._live_on("keep", index, holder, last, more)
            # What is kept no longer than the next one's forward is that one's alone; what else there is the module
            # saves itself.
            alone = min(max(more - moved, 0), kept[_KIND, index, holder])
            again[here] -= alone
            again[_KIND, holder, last] += alone
            handed[index] -= max(more, 0) - alone
        return handed

    def _live_on(self, policy: Activations, index: int, holder: int, last: int, most: int) -> int:
        """Have what a module made live on until ``last``, of what outlives the forward of ``holder`` and goes before
        any backward. Return how much of ``most`` that was.
        """
        spans, moved = self._traced.get(policy, Counter[Span]()), 0
        for end in sorted(self._forward_ends[policy, index]):
            if end <= holder:
                continue
            here = max(0, min(most - moved, spans[_KIND, index, end]))
            spans[_KIND, index, end] -= here
            spans[_KIND, index, last] += here
            self._longer.append((policy, end, last, here))
            moved += here
        return moved

    def _hand_in(self, handed: Mapping[int, int]) -> Iterator[Lifetime]:
        """Have the first module with a choice behind one without hold what it was handed, no more than it hands on
        itself. Yield what else lives longer: every recomputed one holds that.
        """
        kept = self._traced["keep"]
        for policy, traced in self._traced.items():
            made = {born for _, born, _ in traced if self._accesses[born].kind == "forward"} if policy != "keep" else ()
            left = dict(handed)
            for born in sorted(made, reverse=True):
                behind = None if self._accesses[born].module in self._recomputable else self._next(born)
                if behind is None:
                    continue
                holder, _ = behind
                for last, more in list(_longer(traced, kept, born)):
                    if last <= holder:
                        continue
                    own = more if policy != "recompute" else min(more, left.get(holder, more))
                    left[holder] = left.get(holder, own) - own
                    traced[_KIND, holder, last] += own
                    gone = max(self._forward_ends["keep", born], default=holder)
                    if more > own and gone < last:
                        yield Lifetime(kind=_KIND, born=gone + 1, last=last, size_bytes=more - own, policy="any")


def _longer(traced: Mapping[Span, int], kept: Mapping[Span, int], born: int) -> Iterator[tuple[int, int]]:
    """Yield until when bytes of a module live in a trace that are gone by then where all is kept, and how many, the
    last first.
    """
    told = 0
    for last in sorted({end for _, b, end in traced if b == born}, reverse=True):
        of_all, of_kept = (
            sum(size for (k, b, end), size in spans.items() if (k, b) == (_KIND, born) and end >= last)
            for spans in (traced, kept)
        )
        if of_all - of_kept > told:
            yield last, of_all - of_kept - told
            told = of_all - of_kept
