"""How long an access takes on a machine: a roofline, with a fixed time for each operator."""

from __future__ import annotations


def access_seconds(
    *,
    flops: int,
    matmul_bytes: int,
    other_bytes: int,
    kernels: int,
    flops_per_s: float,
    bytes_per_s: float,
    launch_s: float,
    operator_s: float,
    runs_ahead: bool,
) -> float:
    """Return the compute time of an access.

    Matrix products take the longer of their arithmetic and their memory traffic; every other operator is bound by
    memory; each operator costs ``launch_s`` of the device besides, and ``operator_s`` of the host. A host that
    ``runs_ahead`` of its device hides the lesser of the two. Source: the roofline model (Williams, Waterman, Patterson,
    2009). Left out: caches, operators that overlap, and that a small product reaches less than the rate of a large one.
    """
    products_s = max(flops / flops_per_s, matmul_bytes / bytes_per_s)
    device_s = products_s + other_bytes / bytes_per_s
    if runs_ahead:
        return max(device_s + kernels * launch_s, kernels * operator_s)
    return device_s + kernels * max(launch_s, operator_s)
