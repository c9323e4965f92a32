"""The judge's part on activations: each that is offloaded is made, kept and used as a chain of residences says."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.program.schema import Item, Plan


def offload_faults(plan: Plan) -> Iterator[str]:
    """Activations: one item for each module that offloads, made in its forward and there in its backward."""
    accesses = plan.table.accesses
    items = [item for item in plan.items if item.kind != "weights"]
    asked = [policy.module for policy in plan.activations if policy.activations == "offload"]
    for module in {*asked, *(item.module for item in items)}:
        mine = [item for item in items if item.module == module]
        if (len(mine), asked.count(module)) != (1, 1):
            yield f"the activations of {module!r} are offloaded {asked.count(module)} times, by {len(mine)} items"
    for item in items:
        made = [a for a in accesses if a.module == item.module and a.kind == "forward"]
        used = [a.index for a in accesses if a.module == item.module and a.kind == "backward"]
        name = f"what {item.module} saves"
        if (len(made), len(used)) != (1, 1):
            yield f"{name} is made {len(made)} and used {len(used)} times a micro-batch: it cannot be offloaded"
            continue
        if item.size_bytes != made[0].offload_bytes or item.home != "host" or item.size_bytes <= 0:
            yield (
                f"{name} has {item.size_bytes} bytes to go to {item.home}, it is {made[0].offload_bytes} bytes for "
                f"the host"
            )
        yield from _chain(plan, item, name, made[0].index, used[0])


def _chain(plan: Plan, item: Item, name: str, made: int, used: int) -> Iterator[str]:
    """Made on the device, and there until it is used; or from there to the host, and from there back."""
    stays = [stay for stay in plan.residences if stay.item == item.id]
    first = [stay for stay in stays if stay.begins == "made"]
    if len(first) != 1 or plan.arenas[first[0].arena].tier != "device":
        yield f"{name} is made {len(first)} times on the device"
        return
    here, rest = first[0], [stay for stay in stays if stay.begins != "made"]
    if (here.first_use, here.load_after) != (made, made - 1):
        yield f"residence {here.id} of {name} is made at access {here.first_use}, its forward is {made}"
    if here.ends == "drop":
        if here.last_use < used or rest:
            yield f"{name} is dropped after access {here.last_use}, its backward is {used}"
        return
    away = [stay for stay in rest if stay.source == f"residence:{here.id}"]
    back = [stay for stay in rest if away and stay.source == f"residence:{away[0].id}"]
    if (len(away), len(back), len(rest)) != (1, 1, 2):
        yield f"{name} is stored {len(away)} times and comes back {len(back)} times, of {len(rest)} residences"
        return
    store, load = away[0], back[0]
    tiers = (plan.arenas[store.arena].tier, plan.arenas[load.arena].tier)
    if tiers != ("host", "device") or (store.channel, load.channel) != ("d2h", "h2d") or load.arena != here.arena:
        yield f"{name} goes over {store.channel} to {tiers[0]} and over {load.channel} to {tiers[1]}"
    if (store.ends, load.ends) != ("drop", "drop"):
        yield f"{name} is stored again after it was stored"
    if not made <= store.load_after < store.first_use <= here.last_use + 1:
        yield (
            f"{name} is made at {made} and leaves the device after {here.last_use}, but residence {store.id} stores it "
            f"after {store.load_after} and waits for that at {store.first_use}"
        )
    if not (store.first_use <= load.load_after + 1 and load.first_use <= used <= load.last_use <= store.last_use):
        yield f"{name} is used at {used}: residence {load.id} brings it for {load.first_use} to {load.last_use}"
