"""LayerGraph + HardwareProfile -> CostTable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.analyze.graph import Access, Fixed, LayerGraph
from memplan.cost.reserved import reserved
from memplan.cost.table import AccessRow, CostTable
from memplan.cost.time import access_seconds
from memplan.device_kinds import is_apart

if TYPE_CHECKING:
    from memplan.analyze.blocks.measure import Times
    from memplan.hardware.profile import Figure, HardwareProfile

ACHIEVED = 0.85
"""Of a datasheet's rates, what large products and large copies reach: an H200 NVL was measured at 836 of 989 TFLOP/s in
float16; cuBLAS on an L20 at 105 to 115 of 119.5 (CUDA-Learn-Notes, hgemm). Rates that were measured count as they are.
"""

OPERATOR_S = 13e-6
"""Time of a GPU's host for an operator of a training step where a profile does not say: ``memplan calibrate`` on a
server's Xeon, 2026-11-30, torch 2.13."""

STEP_SHARE = 0.25
"""Of ``operator_s``, what an operator of the optimizer's takes: no module around it, no autograd. Measured on a CPU."""

FOREACH = 64
"""Tensors that one kernel of torch's foreach takes on a GPU, about."""

PAGEABLE_SHARE = 0.5
"""Of the rate from page-locked RAM, where a profile has none for pageable RAM: each byte is copied once more."""

FALLBACK_DTYPE = "float32"
"""Its rate stands in where a profile has none for the model's dtype."""


def cost_table(graph: LayerGraph, hardware: HardwareProfile, times: Times | None = None) -> CostTable:
    """Return the graph's rows with the times that ``hardware`` takes, and the process's context among the fixed bytes.

    ``times``: measured ones of its accesses, which go before the estimates.

    Where the profile has no rate for the dtype of the model's matrix products, float32's is taken: see
    :func:`notes`.
    """
    rates = hardware.matmul_flops_per_s
    flops_per_s = achieved(rates.get(graph.matmul_dtype, rates[FALLBACK_DTYPE]))
    float32_costs = flops_per_s / achieved(rates[FALLBACK_DTYPE]) - 1
    """What a FLOP in float32 costs beyond one in the dtype of most, in such FLOPs."""

    bytes_per_s = achieved(hardware.memory_bytes_per_s)
    runs_ahead = is_apart(hardware.device)
    unknown_s = OPERATOR_S if runs_ahead else 0.0
    operator_s = unknown_s if hardware.operator_s is None else hardware.operator_s.value

    def seconds(
        *, flops: int, matmul_bytes: int, other_bytes: int, kernels: int, operator_s: float = operator_s
    ) -> float:
        return access_seconds(
            flops=flops,
            matmul_bytes=matmul_bytes,
            other_bytes=other_bytes,
            kernels=kernels,
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            launch_s=hardware.launch_s.value,
            operator_s=operator_s,
            runs_ahead=runs_ahead,
        )

    def estimated(access: Access) -> float:
        kernels, each_s = access.kernels, operator_s
        if access.kind == "optimizer":
            each_s *= STEP_SHARE
            kernels = -(-kernels // FOREACH) if runs_ahead else kernels
        return seconds(
            flops=access.flops + int(max(0.0, float32_costs) * access.float32_flops),
            matmul_bytes=access.matmul_bytes,
            other_bytes=access.other_bytes,
            kernels=kernels,
            operator_s=each_s,
        )

    def row(access: Access) -> AccessRow:
        time_s = None if times is None else times.access_s[access.index]
        recompute_s = None if times is None else times.recompute_s[access.index]
        return AccessRow(
            index=access.index,
            kind=access.kind,
            module=access.module,
            forward=access.forward,
            blocks=access.blocks,
            rows=access.rows,
            time_s=estimated(access) if time_s is None else time_s,
            recompute_s=recompute_s
            if recompute_s is not None
            else seconds(
                flops=access.recompute_flops,
                matmul_bytes=access.recompute_matmul_bytes,
                other_bytes=access.recompute_other_bytes,
                kernels=access.recompute_kernels,
            ),
            transient_bytes=access.transient_bytes,
            transient_recompute_bytes=access.transient_recompute_bytes,
            transient_offload_bytes=access.transient_offload_bytes,
            offload_bytes=access.offload_bytes,
            offload_s=2 * access.offload_bytes / bytes_per_s,  # read once, written once
            weight_copy_bytes=access.weight_copy_bytes,
            gradient_bytes=access.gradient_bytes,
        )

    context = Fixed(kind="context", size_bytes=int(hardware.context_bytes.value))
    pageable, duplex = hardware.pageable_bytes_per_s, hardware.duplex_factor
    to_device = hardware.host_to_device_bytes_per_s.value
    return CostTable(
        blocks=graph.blocks,
        accesses=tuple(row(access) for access in graph.accesses),
        lifetimes=graph.lifetimes,
        fixed=(*graph.fixed, context),
        recomputable=graph.recomputable,
        device=hardware.device,
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=hardware.device_to_host_bytes_per_s.value,
        disk_bytes_per_s=hardware.disk_bytes_per_s.value,
        load_latency_s=hardware.load_latency_s.value,
        pageable_bytes_per_s=(to_device * PAGEABLE_SHARE if pageable is None else pageable.value)
        if is_apart(hardware.device)
        else None,
        duplex_factor=1.0 if duplex is None else min(1.0, duplex.value),
        reserved=reserved(graph, hardware),
    )


def achieved(rate: Figure) -> float:
    """Return what is reached of a rate."""
    return rate.value * (ACHIEVED if rate.kind == "datasheet" else 1)


def notes(graph: LayerGraph, hardware: HardwareProfile, times: Times | None = None) -> tuple[str, ...]:
    """Return what the reader of a report should know of the times, one sentence each."""
    if times is not None:
        where, count = hardware.device.upper(), times.passes
        text = f"Times of accesses were measured on this {where}: medians over {count} micro-batches."
        if times.unseen:
            text += f" {times.unseen} of {len(times.access_s)} did not run with what was given and are estimated."
        return (text,)
    if graph.matmul_dtype in hardware.matmul_flops_per_s:
        return ()
    return (
        f"The profile {hardware.name} has no rate for {graph.matmul_dtype} matrix products: {FALLBACK_DTYPE}'s was "
        f"taken.",
    )
