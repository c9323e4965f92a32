"""Synthetic cost tables: what a solver and its judge are tried on."""

from __future__ import annotations

from memplan.analyze.graph import Block, Fixed, Lifetime, Tensor
from memplan.cost.table import AccessRow, CostTable
from memplan.program.schema import Budgets, Workload

MIB = 1 << 20
WORKLOAD = Workload(batch={"input_ids": (1, 64)}, tokens=64, accumulation=1, optimizer="adamw", adapter="")


def make_table(
    sizes,
    reads=None,
    *,
    forward_s=0.01,
    backward_s=0.02,
    saved_bytes=4 * MIB,
    boundary_bytes=MIB // 4,
    transient_bytes=MIB,
    recomputable=True,
    offloadable=False,
    link=1e9,
    disk=2e8,
    latency_s=0.0,
    device="cpu",
    pageable=None,
    duplex=1.0,
):
    """A stack of blocks of ``sizes``, read in order and back; ``reads`` may name the blocks that each module reads."""
    reads = [(index,) for index in range(len(sizes))] if reads is None else reads
    count = len(reads)
    blocks = tuple(
        Block(
            id=index,
            name=f"layers.{index}",
            kind="layer",
            stack="layers",
            tensors=(
                Tensor(name=f"layers.{index}.w", shape=(size // 4,), dtype="float32", offset_bytes=0, size_bytes=size),
            ),
            size_bytes=size,
            pinned_because="",
        )
        for index, size in enumerate(sizes)
    )

    def row(index, kind, module, forward, blocks, time_s, recompute_s=0.0, transient=transient_bytes):
        return AccessRow(
            index=index,
            kind=kind,
            module=module,
            forward=forward,
            blocks=tuple(blocks),
            time_s=time_s,
            recompute_s=recompute_s,
            transient_bytes=transient,
            transient_recompute_bytes=transient + (saved_bytes if kind == "backward" else 0),
            transient_offload_bytes=transient + (saved_bytes if offloadable and kind == "forward" else 0),
            offload_bytes=saved_bytes if offloadable and kind == "forward" else 0,
        )

    accesses = [row(i, "forward", f"layers.{i}", i, reads[i], forward_s) for i in range(count)]
    accesses.append(row(count, "loss", "", -1, (), 0.001))
    for i in reversed(range(count)):
        accesses.append(row(len(accesses), "backward", f"layers.{i}", i, reads[i], backward_s, forward_s))
    accesses.append(row(len(accesses), "optimizer", "", -1, (), 0.001))
    back = {a.forward: a.index for a in accesses if a.kind == "backward"}
    lifetimes = []
    for i in range(count):
        lifetimes.append(Lifetime(kind="activations", born=i, last=back[i], size_bytes=saved_bytes, policy="keep"))
        lifetimes.append(Lifetime(kind="activations", born=i, last=back[i], size_bytes=boundary_bytes, policy="any"))
        lifetimes.append(
            Lifetime(
                kind="gradients", born=back[i], last=len(accesses) - 1, size_bytes=boundary_bytes // 2, policy="any"
            )
        )
    return CostTable(
        blocks=blocks,
        accesses=tuple(accesses),
        lifetimes=tuple(lifetimes),
        fixed=(Fixed(kind="adapters", size_bytes=MIB), Fixed(kind="optimizer", size_bytes=2 * MIB)),
        recomputable=tuple(f"layers.{i}" for i in range(count)) if recomputable else (),
        device=device,
        host_to_device_bytes_per_s=link,
        device_to_host_bytes_per_s=link,
        disk_bytes_per_s=disk,
        load_latency_s=latency_s,
        pageable_bytes_per_s=pageable,
        duplex_factor=duplex,
    )


def budgets(vram, ram=1 << 40, disk=None, page_lock=None):
    return Budgets(vram_bytes=vram, ram_bytes=ram, disk_bytes=disk, page_lock_bytes=page_lock)


NAMES = {"model": "made", "fingerprint": "0" * 64, "workload": WORKLOAD, "hardware": "made"}
