"""The judge of plans: it replays the residences on the cost rows. It shares no code with the solvers.

Every solver's answer passes it, every plan that is loaded or edited by hand passes it, and the runtime refuses one
that does not.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan import device_kinds
from memplan.device_kinds import is_apart
from memplan.errors import PlanCheckError
from memplan.program.check.flow import flow_faults
from memplan.program.check.groups import device_bytes, group_faults
from memplan.program.check.occupancy import absence_faults
from memplan.program.check.offloads import offload_faults
from memplan.program.check.page_locks import page_lock_faults
from memplan.program.check.ranks import host_bytes, rank_faults
from memplan.program.schema import Address, Item, Plan, Residence, Tier
from memplan.units import ALIGNMENT_BYTES, format_bytes


def require(plan: Plan) -> None:
    """Raise PlanCheckError with every fault found, if there is any."""
    faults = check(plan)
    if faults:
        raise PlanCheckError(faults)


def check(plan: Plan) -> tuple[str, ...]:
    """Return every fault of a plan, one sentence each; empty where it holds."""
    references = (*_references(plan), *rank_faults(plan))
    if references:  # nothing further can be looked up
        return references
    return (
        *_homes(plan),
        *offload_faults(plan),
        *group_faults(plan),
        *_layout(plan),
        *_order(plan),
        *_coverage(plan),
        *_overlaps(plan),
        *absence_faults(plan),
        *page_lock_faults(plan),
        *_peaks(plan),
        *flow_faults(plan),
    )


# ---- does everything named exist, once ------------------------------------------------------------------------------


def _references(plan: Plan) -> Iterator[str]:
    table = plan.table
    rows = (
        ("block", [block.id for block in table.blocks]),
        ("item", [item.id for item in plan.items]),
        ("arena", [arena.id for arena in plan.arenas]),
        ("residence", [stay.id for stay in plan.residences]),
    )
    for what, ids in rows:
        for index, found in enumerate(ids):
            if found != index:
                yield f"{what}s[{index}] has id {found}"
    for index, access in enumerate(table.accesses):
        if access.index != index:
            yield f"accesses[{index}] has id {access.index}"
        if any(not 0 <= block < len(table.blocks) for block in access.blocks):
            yield f"access {index} reads a block that is not there"
        if any(rows.block not in access.blocks for rows in access.rows):
            yield f"access {index} reads rows of a block that it does not read"
        if any(rows.size_bytes < 0 for rows in access.rows):
            yield f"access {index} reads less than nothing of rows"
        if access.kind in ("forward", "backward") and not 0 <= access.forward < len(table.accesses):
            yield f"access {index} belongs to forward {access.forward}, which is not there"
    rows_of: dict[str, set[frozenset[int]]] = {}
    for access in table.accesses:
        rows_of.setdefault(access.module, set()).add(frozenset(rows.block for rows in access.rows))
    for module, kinds in rows_of.items():
        if len(kinds) > 1:  # a module's weights are pointed in one way for all of its calls
            yield f"{module} reads rows of a block in one access, and all of it or nothing in another"
    if not table.accesses:
        yield "there are no accesses"
    if fault := device_kinds.fault(table.device):
        yield f"the table cannot be a machine's: {fault}"
    for item in plan.items:
        if not 0 <= item.block < len(table.blocks):
            yield f"item {item.id} is of block {item.block}, which is not there"
    for address in plan.addresses:
        if not (0 <= address.item < len(plan.items) and 0 <= address.arena < len(plan.arenas)):
            yield f"an address is of item {address.item} in arena {address.arena}, which are not both there"
    for stay in plan.residences:
        if not (0 <= stay.item < len(plan.items) and 0 <= stay.arena < len(plan.arenas)):
            yield f"residence {stay.id} is of item {stay.item} in arena {stay.arena}, which are not both there"
        source = stay.source.removeprefix("residence:")
        if source != stay.source and not (
            source.isdecimal() and source.isascii() and int(source) < len(plan.residences)
        ):
            yield f"residence {stay.id} comes from {stay.source}, which is not there"
    for life in table.lifetimes:
        if not 0 <= life.born <= life.last < len(table.accesses):
            yield f"a lifetime runs from access {life.born} to {life.last}, which are not both there, or in that order"
        elif life.kind == "optimizer" and {table.accesses[life.born].kind, table.accesses[life.last].kind} != {
            "optimizer"
        }:
            yield (
                f"the optimizer's state is on the device from access {life.born} to {life.last}, not for its step alone"
            )
    rates = (
        ("host to device", table.host_to_device_bytes_per_s),
        ("device to host", table.device_to_host_bytes_per_s),
        ("disk", table.disk_bytes_per_s),
    )
    for what, rate in rates:
        if not rate > 0:
            yield f"the rate of the {what} link is {rate} bytes/s: nothing could ever be loaded"
    if table.pageable_bytes_per_s is not None and not table.pageable_bytes_per_s > 0:
        yield f"the rate of pageable RAM is {table.pageable_bytes_per_s} bytes/s: nothing could ever be loaded from it"
    if not 0 < table.duplex_factor <= 1:
        yield (
            f"a direction of the link reaches {table.duplex_factor} of its rate while the other is busy: 0 to 1 can be"
        )
    if plan.group < 1:
        yield f"a group has {plan.group} micro-batches"
    if plan.workload.accumulation < 1:
        yield f"a step has {plan.workload.accumulation} micro-batches"
    if plan.group != table.group:
        yield f"groups are of {plan.group} micro-batches, and of {table.group} by the rows"
    if not 0 <= plan.prediction.vram_peak_at < len(table.accesses):
        yield f"the prediction's vram peak is at access {plan.prediction.vram_peak_at}, which is not there"
    modules = {policy.module for policy in plan.activations}
    if modules != set(table.recomputable) or len(plan.activations) != len(modules):
        yield "the activation policies are not one for each module that may be recomputed"


# ---- homes and addresses --------------------------------------------------------------------------------------------


def _homes(plan: Plan) -> Iterator[str]:
    weights = [item for item in plan.items if item.kind == "weights"]
    of_block: dict[int, list[Item]] = {}
    for item in weights:
        of_block.setdefault(item.block, []).append(item)
    for block in plan.table.blocks:
        mine = of_block.get(block.id, [])
        if len(mine) != 1:
            yield f"the block {block.name} has {len(mine)} homes"
        elif mine[0].size_bytes != block.size_bytes:
            yield f"the item of {block.name} has {mine[0].size_bytes} bytes, the block {block.size_bytes}"
    of_item: dict[int, list[Residence]] = {}
    for stay in plan.residences:
        of_item.setdefault(stay.item, []).append(stay)
    for item in weights:
        block = plan.table.blocks[item.block]
        stays = of_item.get(item.id, [])
        on_device = [stay for stay in stays if plan.arenas[stay.arena].tier == "device"]
        on_host = [stay for stay in stays if plan.arenas[stay.arena].tier == "host"]
        if item.home == "device" and [stay.begins for stay in on_device] != ["always"]:
            yield f"the block {block.name} has its home on the device, but is not always there"
        if block.pinned_because and item.home != "device":
            yield (
                f"the block {block.name} must stay on the device ({block.pinned_because}), but its home is {item.home}"
            )
        if item.home == "host" and not any(stay.begins == "always" for stay in on_host):
            yield f"the block {block.name} has its home on the host, but is not always there"
        if item.home != "device" and any(stay.begins == "always" for stay in on_device):
            yield f"the block {block.name} is always on the device, but its home is {item.home}"
        for stay in stays:
            if stay.begins == "made" or stay.ends != "drop":
                yield f"residence {stay.id} of {block.name} makes or stores frozen weights, which are only ever read"
        for stay in on_device:
            if stay.begins == "load":
                expected = _expected_source(item.home, plan.table.device)
                from_host = stay.channel == "h2d" and _is_copy_of(plan, stay)
                if (stay.source, stay.channel) != expected and not from_host:
                    yield (
                        f"residence {stay.id} brings {block.name} from {stay.source or 'nowhere'} over "
                        f"{stay.channel}, but its home is {item.home}: it comes from {expected[0]} over {expected[1]}"
                    )
    if any(item.home == "disk" for item in plan.items) and plan.staging_bytes <= 0:
        yield "blocks have their home on disk, but no staging bytes are set aside to read them"


def _is_copy_of(plan: Plan, stay: Residence) -> bool:
    """Return whether a load's source is a host residence of the same item that is there until the load has ended."""
    if not stay.source.startswith("residence:"):
        return False
    source = plan.residences[int(stay.source.removeprefix("residence:"))]
    if source.item != stay.item or plan.arenas[source.arena].tier != "host":
        return False
    return source.begins == "always" or (
        source.first_use <= stay.load_after + 1 and source.last_use >= stay.first_use - 1
    )


def _expected_source(home: Tier, device: str) -> tuple[str, str]:
    if home == "disk":
        return ("staging" if is_apart(device) else "home", "disk")
    return ("home", "h2d")


def _layout(plan: Plan) -> Iterator[str]:
    for arena in plan.arenas:
        end = 0
        for segment in sorted(arena.segments, key=lambda segment: segment.offset_bytes):
            if segment.size_bytes < 0 or segment.offset_bytes < end:
                yield f"the segments of arena {arena.id} overlap or have negative sizes"
            end = segment.offset_bytes + segment.size_bytes
    seen = set()
    for address in plan.addresses:
        item = plan.items[address.item]
        name = item.module or plan.table.blocks[item.block].name
        if (address.item, address.arena) in seen:
            yield f"{name} has two addresses in arena {address.arena}"
        seen.add((address.item, address.arena))
        if address.size_bytes != item.size_bytes:
            yield f"the address of {name} has {address.size_bytes} bytes, the item {item.size_bytes}"
        if address.offset_bytes % ALIGNMENT_BYTES or address.offset_bytes < 0:
            yield (
                f"the address of {name} in arena {address.arena} is {address.offset_bytes}: no multiple of "
                f"{ALIGNMENT_BYTES}"
            )
        if not any(
            segment.offset_bytes <= address.offset_bytes
            and address.offset_bytes + address.size_bytes <= segment.offset_bytes + segment.size_bytes
            for segment in plan.arenas[address.arena].segments
        ):
            yield f"the address of {name} reaches beyond arena {address.arena}"
    for stay in plan.residences:
        if (stay.item, stay.arena) not in seen:
            yield f"residence {stay.id} has no address for its item in arena {stay.arena}"
    for block in plan.table.blocks:
        end = 0
        for tensor in block.tensors:
            if tensor.offset_bytes < end or tensor.offset_bytes % ALIGNMENT_BYTES:
                yield f"the tensor {tensor.name} starts at {tensor.offset_bytes}, inside another or off its alignment"
            end = tensor.offset_bytes + tensor.size_bytes
        if end > block.size_bytes:
            yield f"the tensors of {block.name} reach beyond its {block.size_bytes} bytes"


# ---- order ----------------------------------------------------------------------------------------------------------


def _order(plan: Plan) -> Iterator[str]:
    length = len(plan.table.accesses)
    orders: dict[str, list[int]] = {}
    for stay in plan.residences:
        name = _name(plan, stay)
        if stay.begins == "load":
            if stay.channel is None:
                yield f"residence {stay.id} of {name} is loaded over no channel"
            else:
                orders.setdefault(stay.channel, []).append(stay.order)
            if not 0 <= stay.first_use < length:
                yield f"residence {stay.id} of {name} is first used at {stay.first_use}, outside of the micro-batch"
            if not stay.load_after < stay.first_use <= stay.last_use:
                yield (
                    f"residence {stay.id} of {name} is loaded after {stay.load_after}, used from {stay.first_use} to "
                    f"{stay.last_use}: not in that order"
                )
            if stay.last_use - stay.load_after > length:
                yield f"residence {stay.id} of {name} lasts longer than a micro-batch"
        elif stay.begins == "made" and not 0 <= stay.first_use <= stay.last_use < length:
            yield f"residence {stay.id} of {name} is made at {stay.first_use} and used until {stay.last_use}"
        elif stay.begins == "always" and (stay.first_use > 0 or stay.last_use < length - 1):
            yield (
                f"residence {stay.id} of {name} is there always, but used from {stay.first_use} to {stay.last_use} only"
            )
    for channel, found in orders.items():
        if sorted(found) != list(range(len(found))):
            yield f"the orders on the channel {channel} are not 0 to {len(found) - 1}"


def _coverage(plan: Plan) -> Iterator[str]:
    length = len(plan.table.accesses)
    spans: dict[int, list[Residence]] = {}
    on_host: set[int] = set()
    for stay in plan.residences:
        item = plan.items[stay.item]
        if item.kind == "weights" and plan.arenas[stay.arena].tier == "device":
            spans.setdefault(item.block, []).append(stay)
        elif item.kind == "weights" and stay.begins == "always" and item.home == "host":
            on_host.add(item.block)
    for block, stays in spans.items():
        for stay in stays if 0 <= block < len(plan.table.blocks) else ():
            for at in (stay.first_use, stay.last_use) if stay.begins == "load" else ():
                access = plan.table.accesses[at % length]
                if block not in access.blocks:
                    yield (
                        f"residence {stay.id} has {plan.table.blocks[block].name} used from {stay.first_use} to "
                        f"{stay.last_use}, but access {access.index} does not read it"
                    )
    for access in plan.table.accesses:
        for block in access.blocks:
            if block in on_host and access.reads_rows_of(block):
                continue
            stays = spans.get(block, [])
            if not any(
                stay.begins == "always"
                or any(stay.first_use <= at <= stay.last_use for at in (access.index, access.index + length))
                for stay in stays
            ):
                yield (
                    f"access {access.index} ({access.kind} of {access.module}) reads "
                    f"{plan.table.blocks[block].name}, which no residence has on the device then"
                )


def _overlaps(plan: Plan) -> Iterator[str]:
    """No two stays overlap both in bytes and in time; a stay's time runs from when its load may start."""
    length = len(plan.table.accesses)
    places: dict[tuple[int, int], Address] = {(a.item, a.arena): a for a in plan.addresses}
    stays = [(stay, places[stay.item, stay.arena]) for stay in plan.residences if (stay.item, stay.arena) in places]
    stays.sort(key=lambda pair: (pair[0].arena, pair[1].offset_bytes))
    for position, (one, here) in enumerate(stays):
        for other, there in stays[position + 1 :]:
            if other.arena != one.arena or there.offset_bytes >= here.offset_bytes + here.size_bytes:
                break
            if here.size_bytes and there.size_bytes and _meet(one, other, length):
                yield (
                    f"residences {one.id} of {_name(plan, one)} and {other.id} of {_name(plan, other)} take the "
                    "same bytes at the same time"
                )


def _meet(one: Residence, other: Residence, length: int) -> bool:
    if one.begins == "always" or other.begins == "always":
        return True
    if one.id == other.id:
        return False
    # Modulo the cycle, from the one's beginning to the other's: within the one, or the other way round.
    one_begins, other_begins = one.load_after + 1, other.load_after + 1
    return (other_begins - one_begins) % length <= _until(one, other) - one_begins or (
        one_begins - other_begins
    ) % length <= _until(other, one) - other_begins


def _until(stay: Residence, other: Residence) -> int:
    """The last access at which a load of ``other`` into the same bytes must not start.

    What is stored is on its way until the access after ``last_use`` begins, which waits for it: the compute may write
    there from then on, but a load does not wait for that access before it has ended.
    """
    return stay.last_use + (stay.ends == "store" and other.begins == "load")


# ---- budgets --------------------------------------------------------------------------------------------------------


def _peaks(plan: Plan) -> Iterator[str]:
    table, budgets, stated = plan.table, plan.budgets, plan.prediction
    beside = device_bytes(plan)

    def bytes_at(index: int) -> int:
        return beside[index] + sum(
            segment.size_bytes
            for arena in plan.arenas
            for segment in arena.segments
            if arena.tier == "device" and all(index < first or last < index for first, last in segment.absent)
        )

    vram, at = max((bytes_at(access.index), -access.index) for access in table.accesses)
    access = table.accesses[-at]
    if vram > budgets.vram_bytes:
        yield (
            f"at access {access.index} ({access.kind} {access.module}) {format_bytes(vram)} of vram are needed, "
            f"{format_bytes(vram - budgets.vram_bytes)} over the budget of {format_bytes(budgets.vram_bytes)}"
        )
    on_disk = sum(item.size_bytes for item in plan.items if item.home == "disk")
    ram = host_bytes(plan)
    if ram > budgets.ram_bytes:
        yield f"{format_bytes(ram)} of ram are needed, the budget is {format_bytes(budgets.ram_bytes)}"
    if budgets.disk_bytes is not None and on_disk > budgets.disk_bytes:
        yield f"{format_bytes(on_disk)} of disk are needed, the budget is {format_bytes(budgets.disk_bytes)}"
    there = bytes_at(stated.vram_peak_at)
    if there != vram:
        yield (
            f"the prediction's vram peak is at access {stated.vram_peak_at}, where {there} bytes are needed, not {vram}"
        )
    moved = [(plan.items[stay.item], stay.channel) for stay in plan.residences if stay.begins == "load"]
    loads = [item.size_bytes for item, _ in moved if item.kind == "weights"]
    stored = sum(item.size_bytes for item, channel in moved if channel == "d2h")
    homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
    rows = sum(r.size_bytes for access in table.accesses for r in access.rows if homes.get(r.block) == "host")
    rows *= plan.group
    if rows != stated.rows_bytes_per_pass:
        yield (
            f"the prediction says {stated.rows_bytes_per_pass} bytes of rows are read on the host, the rows are {rows}"
        )
    if stored != stated.offloaded_bytes_per_pass:
        yield (
            f"the prediction says {stated.offloaded_bytes_per_pass} bytes are offloaded, the residences store {stored}"
        )
    if (len(loads), sum(loads)) != (stated.loads_per_pass, stated.loaded_bytes_per_pass):
        yield (
            f"the prediction says {stated.loads_per_pass} loads of {stated.loaded_bytes_per_pass} bytes a micro-batch, "
            f"the residences are {len(loads)} of {sum(loads)}"
        )
    for what, found, said in (
        ("vram", vram, stated.peaks.vram_bytes),
        ("ram", ram, stated.peaks.ram_bytes),
        ("disk", on_disk, stated.peaks.disk_bytes),
    ):
        if found != said:
            yield f"the prediction says a {what} peak of {said} bytes, the rows say {found}"
    for what, parts, total in (
        ("vram", stated.vram_parts, stated.peaks.vram_bytes),
        ("ram", stated.ram_parts, stated.peaks.ram_bytes),
    ):
        if sum(parts.values()) != total or min(parts.values(), default=0) < 0:
            yield f"the parts of the {what} peak do not sum to it"


def _name(plan: Plan, stay: Residence) -> str:
    item: Item = plan.items[stay.item]
    return f"what {item.module} saves" if item.module else plan.table.blocks[item.block].name
