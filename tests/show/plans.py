"""Plans and records written by hand, so that these tests need no solver. Sums are right, times are chosen."""

from __future__ import annotations

import functools

import msgspec

from memplan.analyze.graph import AccessKind, Activations, Block, BlockKind, Fixed, FixedKind, Tensor
from memplan.cost.table import AccessRow, CostTable
from memplan.place.solve import place
from memplan.program.record import BlockRecord, RunRecord
from memplan.program.schema import (
    SCHEMA_VERSION,
    ActivationPolicy,
    Budgets,
    Item,
    Peaks,
    Plan,
    Prediction,
    Tier,
    Workload,
)
from memplan.units import GIB, MIB
from tests.support.tables import NAMES, budgets, make_table

LAYER_BYTES = 200 * MIB
EMBEDDING_BYTES = 500 * MIB
_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
)
FORWARD_S, BACKWARD_S, RECOMPUTE_S, LOSS_S = 0.010, 0.015, 0.005, 0.020


def make_plan(
    homes: str,
    *,
    recomputed: str = "",
    stall_s: float = 0.0,
    bound_s: float | None = None,
    stack: str = "model.layers",
    rename: dict[int, str] | None = None,
    device: str = "cuda",
    disk_bytes: int | None = None,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return a plan of an embedding, ``len(homes) - 2`` layers and a head.

    ``homes``: a letter a block: d, h or k (disk). ``recomputed``: ``^`` under those that are.
    ``rename``: names by block.
    """
    count = len(homes)
    names = ["model.embed_tokens", *(f"{stack}.{i}" for i in range(count - 2)), "lm_head"]
    for index, name in (rename or {}).items():
        names[index] = name
    tiers: dict[str, Tier] = {"d": "device", "h": "host", "k": "disk"}
    recomputed = recomputed.ljust(count)
    blocks = tuple(_block(i, name, stack if 0 < i < count - 1 else "") for i, name in enumerate(names))
    items = tuple(
        Item(id=block.id, kind="weights", block=block.id, size_bytes=block.size_bytes, home=tiers[home])
        for block, home in zip(blocks, homes, strict=True)
    )
    held = {tier: sum(item.size_bytes for item in items if item.home == tier) for tier in tiers.values()}
    streamed = [item for item in items if item.home != "device"]
    slots = min(2, len(streamed)) * LAYER_BYTES
    fixed: dict[FixedKind, int] = {
        "adapters": 60 * MIB,
        "optimizer": 120 * MIB,
        "context": 300 * MIB,
        "batch": 16 << 10,
    }
    vram: dict[str, int] = {
        "weights": held["device"],
        "slots": slots,
        **{str(kind): size for kind, size in fixed.items()},
        "gradients": 60 * MIB,
        "buffers": 0,
        "activations": 700 * MIB,
        "workspace": 90 * MIB,
    }
    staging = 64 * MIB if held["disk"] else 0
    rows = _rows(names, recomputed)
    compute_s = sum(row.time_s for row in rows) + RECOMPUTE_S * recomputed.count("^")
    pass_s = compute_s + stall_s
    loads = max(0, 2 * len(streamed) - 4)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model="LlamaForCausalLM",
        fingerprint="ab" * 32,
        workload=Workload(
            batch={"input_ids": (4, 512), "labels": (4, 512)},
            tokens=2048,
            accumulation=2,
            optimizer="adamw",
            adapter="LoRA r=16 on all-linear",
        ),
        budgets=Budgets(vram_bytes=sum(vram.values()) + 200 * MIB, ram_bytes=24 * GIB, disk_bytes=disk_bytes),
        hardware="rtx-4070",
        table=CostTable(
            blocks=blocks,
            accesses=rows,
            lifetimes=(),
            fixed=tuple(Fixed(kind=kind, size_bytes=size) for kind, size in fixed.items()),
            recomputable=tuple(names[1:-1]),
            device=device,
            host_to_device_bytes_per_s=24e9,
            device_to_host_bytes_per_s=24e9,
            disk_bytes_per_s=3e9,
            load_latency_s=2e-5,
        ),
        items=items,
        arenas=(),
        addresses=(),
        residences=(),
        activations=tuple(
            ActivationPolicy(module=names[i], activations="recompute" if recomputed[i] == "^" else "keep")
            for i in range(1, count - 1)
        ),
        prediction=Prediction(
            compute_s=compute_s,
            pass_s=pass_s,
            step_s=2 * pass_s + 0.004,
            bound_s=pass_s if bound_s is None else bound_s,
            stall_s=stall_s,
            binds="link" if stall_s else "compute",
            loads_per_pass=loads,
            loaded_bytes_per_pass=loads * LAYER_BYTES,
            offloaded_bytes_per_pass=0,
            peaks=Peaks(vram_bytes=sum(vram.values()), ram_bytes=held["host"] + staging, disk_bytes=held["disk"]),
            vram_peak_at=count + 2,
            vram_parts=vram,
            ram_parts={"weights": held["host"], "staging": staging},
        ),
        staging_bytes=staging,
        notes=notes,
    )


def make_record(plan: Plan, *, pass_s: float, extra_bytes: int = 0, passes: int = 40, **fields: object) -> RunRecord:
    """Return the record of a run under ``plan``: block i was waited for i milliseconds in all."""
    streamed = [item.block for item in plan.items if item.home != "device"]
    allocated_bytes = plan.prediction.peaks.vram_bytes - plan.prediction.vram_parts.get("context", 0) + extra_bytes
    values: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": plan.fingerprint,
        "device": plan.table.device,
        "passes": passes,
        "wall_s": pass_s * passes + 1,
        "pass_s": pass_s,
        "stall_s": 0.03,
        "loads": passes * plan.prediction.loads_per_pass + 8,
        "loaded_bytes": passes * plan.prediction.loaded_bytes_per_pass,
        "misses": 3,
        "out_of_order": 1,
        "learned": 0,
        "offloaded_bytes": 0,
        "offload_skipped": 0,
        "recoveries": 0,
        "vram_peak_bytes": allocated_bytes,
        "vram_reserved_bytes": allocated_bytes + 6 * MIB,
        "ram_peak_bytes": plan.prediction.peaks.ram_bytes,
        "blocks": tuple(
            BlockRecord(block=i, loads=2 * passes, loaded_bytes=LAYER_BYTES * passes, stall_s=i * 1e-3, misses=i % 2)
            for i in streamed
        ),
    }
    return RunRecord(**(values | fields))  # type: ignore[arg-type]


@functools.cache
def solve_plan(layers: int = 6) -> Plan:
    """Return a plan that the solver made and that its check holds: half the layers fit."""
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(layers)), "lm_head"]
    plan = make_plan("d" + "h" * layers + "d")
    fixed_bytes = sum(row.size_bytes for row in plan.table.fixed)
    return place(
        plan.table,
        Budgets(
            vram_bytes=fixed_bytes + 2 * EMBEDDING_BYTES + (layers // 2 + 2) * LAYER_BYTES,
            ram_bytes=24 * GIB,
            disk_bytes=None,
        ),
        model=plan.model,
        fingerprint=plan.fingerprint,
        workload=plan.workload,
        hardware=plan.hardware,
        pins={names.index("model.embed_tokens"): "device"},
        staging_bytes=64 * MIB,
        notes=(),
    )


@functools.cache
def disk_plan() -> Plan:
    """Return a plan that holds, streams from RAM and from disk, waits, and has activations on the host."""
    table = make_table([40 * MIB] * 9, link=2e9, disk=5e8, device="cuda", offloadable=True)
    policies: dict[str, Activations] = {"layers.2": "offload", "layers.3": "recompute"}
    return place(table, budgets(240 * MIB, ram=170 * MIB, disk=1 << 30), activations=policies, pieces=False, **NAMES)


def pageable_plan() -> Plan:
    """Return a plan on a card beside which not all RAM may be page-locked."""
    table = make_table([40 * MIB] * 9, link=2e9, pageable=1e9, device="cuda", recomputable=False)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    return place(table, budgets(rest + 120 * MIB, page_lock=150 * MIB), pieces=False, **NAMES)


@functools.cache
def long_plan() -> Plan:
    """Return a plan of two stacks of 63 layers in seven parts each: as many as are ever planned."""
    return place(_in_parts(63), budgets(1500 * MIB, ram=2000 * MIB, disk=1 << 40), pieces=False, **NAMES)


@functools.cache
def parts_plan() -> Plan:
    """Return a plan of two stacks of four layers in seven parts each, of which some lie on each tier."""
    return place(_in_parts(4), budgets(130 * MIB, ram=80 * MIB, disk=1 << 40), pieces=False, **NAMES)


def _in_parts(layers: int) -> CostTable:
    """Return the table of two stacks of ``layers`` layers in seven parts each."""
    each = 7 * layers
    table = make_table(
        [4 * MIB] * 2 * each, [range(7 * i, 7 * i + 7) for i in range(2 * layers)], link=2e9, device="cuda"
    )
    stacks = [("encoder" if i < each else "decoder") + ".layers" for i in range(2 * each)]
    named = tuple(
        msgspec.structs.replace(
            block, name=f"{stacks[block.id]}.{block.id // 7 % layers}.{_PARTS[block.id % 7]}", stack=stacks[block.id]
        )
        for block in table.blocks
    )
    return msgspec.structs.replace(table, blocks=named)


def _block(index: int, name: str, stack: str) -> Block:
    size = LAYER_BYTES if stack else EMBEDDING_BYTES
    weight = Tensor(name=f"{name}.weight", shape=(size // 2,), dtype="bfloat16", offset_bytes=0, size_bytes=size)
    kind: BlockKind = "layer" if stack else ("embedding" if index == 0 else "head")
    return Block(id=index, name=name, kind=kind, stack=stack, tensors=(weight,), size_bytes=size, pinned_because="")


def _rows(names: list[str], recomputed: str) -> tuple[AccessRow, ...]:
    count = len(names)
    rows = [_row(i, "forward", name, i, (i,), FORWARD_S) for i, name in enumerate(names)]
    rows.append(_row(count, "loss", "", -1, (), LOSS_S))
    for back, block in enumerate(reversed(range(count))):
        again = RECOMPUTE_S if 0 < block < count - 1 else 0.0
        rows.append(_row(count + 1 + back, "backward", names[block], block, (block,), BACKWARD_S, again))
    rows.append(_row(2 * count + 1, "optimizer", "", -1, (), 0.0))
    return tuple(rows)


def _row(
    index: int,
    kind: AccessKind,
    module: str,
    forward: int,
    blocks: tuple[int, ...],
    time_s: float,
    again_s: float = 0.0,
) -> AccessRow:
    return AccessRow(
        index=index,
        kind=kind,
        module=module,
        forward=forward,
        blocks=blocks,
        time_s=time_s,
        recompute_s=again_s,
        transient_bytes=0,
        transient_recompute_bytes=0,
    )
