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
) -> float:
    """Return the compute time of an access.

    Matrix products take the longer of their arithmetic and their memory traffic; every other operator is bound by
    memory; each operator costs ``launch_s`` besides. Source: the roofline model (Williams, Waterman, Patterson, 2009).
    Left out: caches, operators that overlap, and that a small product reaches less than the rate of a large one.
    """
    products_s = max(flops / flops_per_s, matmul_bytes / bytes_per_s)
    return products_s + other_bytes / bytes_per_s + kernels * launch_s
