"""Whether what lies in an arena lies there only while its bytes do. Written for the judge alone."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.program.schema import Plan, Residence


def absence_faults(plan: Plan) -> Iterator[str]:
    """Yield every fault of when segments are given back, and every stay that touches an access without its bytes."""
    length = len(plan.table.accesses)
    for arena in plan.arenas:
        for position, segment in enumerate(arena.segments):
            absent = segment.absent
            if absent and (position == 0 or arena.tier != "device"):
                yield f"segment {position} of arena {arena.id} is given back, but must be there always"
            before = -1
            for first, last in absent:
                if not before < first <= last < length:
                    yield (
                        f"segment {position} of arena {arena.id} is absent from {first} to {last}: not in order, or "
                        f"not in a micro-batch"
                    )
                before = last
    places = {(address.item, address.arena): address for address in plan.addresses}
    for stay in plan.residences:
        address = places.get((stay.item, stay.arena))
        if address is None:
            continue
        for segment in plan.arenas[stay.arena].segments:
            if not segment.absent:
                continue
            if not segment.offset_bytes <= address.offset_bytes < segment.offset_bytes + segment.size_bytes:
                continue
            times = range(length) if stay.begins == "always" else range(stay.load_after + 1, _there_until(stay) + 1)
            gone = [at % length for at in times if any(first <= at % length <= last for first, last in segment.absent)]
            if gone:
                yield (
                    f"residence {stay.id} of item {stay.item} takes bytes that are given back in access {gone[0]}, "
                    "within its stay"
                )


def _there_until(stay: Residence) -> int:
    """The last access in which its bytes must be there: what is stored may be on its way as the next one begins."""
    return stay.last_use + (stay.ends == "store")
