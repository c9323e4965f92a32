"""The cost table: the graph's rows with times, and a machine's figures."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from memplan.analyze.graph import Access, Block, Fixed, LayerGraph, Lifetime
from memplan.cost.build import ACHIEVED, OPERATOR_S, cost_table, notes
from memplan.cost.reserved import WORKSPACE_BYTES, rounding_bytes
from memplan.cost.time import access_seconds
from memplan.hardware.profile import Figure, HardwareProfile, load
from memplan.units import MIB

RATE, BANDWIDTH, LAUNCH = 1e12, 1e11, 1e-6


def figure(value):
    return Figure(value=value, kind="assumed", source="a test", date="2026-01-01")


def profile(**rates):
    return HardwareProfile(
        schema_version=1,
        name="test",
        description="",
        device="cuda",
        device_bytes=figure(1e9),
        host_bytes=None,
        matmul_flops_per_s={"float32": figure(RATE), **{k: figure(v) for k, v in rates.items()}},
        memory_bytes_per_s=figure(BANDWIDTH),
        host_to_device_bytes_per_s=figure(3e9),
        device_to_host_bytes_per_s=figure(2e9),
        disk_bytes_per_s=figure(1e9),
        launch_s=figure(LAUNCH),
        load_latency_s=figure(5e-6),
        context_bytes=figure(1000),
    )


def graph(dtype="float32"):
    access = Access(
        index=0,
        kind="forward",
        module="layer",
        forward=0,
        blocks=(0,),
        flops=10**12,
        matmul_bytes=10**9,
        other_bytes=10**10,
        kernels=1000,
        recompute_flops=10**6,
        recompute_matmul_bytes=10**11,
        recompute_other_bytes=0,
        recompute_kernels=0,
        transient_bytes=-5,
        transient_recompute_bytes=7,
    )
    block = Block(id=0, name="layer", kind="layer", stack="", tensors=(), size_bytes=0, pinned_because="")
    life = Lifetime(kind="activations", born=0, last=1, size_bytes=3, policy="any")
    return LayerGraph(
        model="m",
        fingerprint="f",
        blocks=(block,),
        accesses=(access,),
        lifetimes=(life,),
        fixed=(Fixed(kind="batch", size_bytes=8),),
        recomputable=("layer",),
        tokens=1,
        trainable_bytes=0,
        matmul_dtype=dtype,
    )


def test_rates_of_pageable_ram_and_of_both_ways():
    plain = cost_table(graph(), profile())
    assert (plain.pageable_bytes_per_s, plain.duplex_factor) == (1.5e9, 1.0)
    known = replace(profile(), pageable_bytes_per_s=figure(2e9), duplex_factor=figure(0.7))
    table = cost_table(graph(), known)
    assert (table.pageable_bytes_per_s, table.duplex_factor) == (2e9, 0.7)
    assert cost_table(graph(), replace(known, device="cpu")).pageable_bytes_per_s is None


def test_a_roofline():
    common = {"flops_per_s": RATE, "bytes_per_s": BANDWIDTH, "launch_s": LAUNCH, "operator_s": 0.0, "runs_ahead": True}
    bound_by_flops = access_seconds(flops=10**12, matmul_bytes=1, other_bytes=0, kernels=0, **common)
    bound_by_memory = access_seconds(flops=1, matmul_bytes=10**11, other_bytes=0, kernels=0, **common)
    small = access_seconds(flops=0, matmul_bytes=0, other_bytes=10**11, kernels=10**6, **common)
    assert (bound_by_flops, bound_by_memory, small) == pytest.approx((1.0, 1.0, 2.0))
    busy = {"flops": 10**12, "matmul_bytes": 1, "other_bytes": 0, "kernels": 10**6}
    common["operator_s"] = 5 * LAUNCH  # of the host
    assert access_seconds(**busy, **common) == pytest.approx(max(1 + 10**6 * LAUNCH, 5 * 10**6 * LAUNCH))
    common["runs_ahead"] = False
    assert access_seconds(**busy, **common) == pytest.approx(1 + 5 * 10**6 * LAUNCH)


def test_rows():
    table = cost_table(graph(), profile())
    (row,) = table.accesses
    assert row.time_s == pytest.approx(1.0 + 0.1 + 0.001)
    assert row.recompute_s == pytest.approx(1.0)
    assert (row.transient_bytes, row.transient_recompute_bytes) == (-5, 7)
    assert (row.index, row.kind, row.module, row.forward, row.blocks) == (0, "forward", "layer", 0, (0,))
    assert table.fixed == (Fixed(kind="batch", size_bytes=8), Fixed(kind="context", size_bytes=1000))
    assert (table.blocks, table.lifetimes, table.recomputable) == (graph().blocks, graph().lifetimes, ("layer",))
    assert (table.device, table.host_to_device_bytes_per_s, table.disk_bytes_per_s) == ("cuda", 3e9, 1e9)
    assert table.load_latency_s == 5e-6


def test_the_rate_is_that_of_the_models_dtype():
    fast = cost_table(graph("bfloat16"), profile(bfloat16=10 * RATE)).accesses[0].time_s
    assert fast == pytest.approx(0.1 + 0.1 + 0.001)
    assert notes(graph("bfloat16"), profile(bfloat16=10 * RATE)) == ()


def test_a_rate_that_is_missing_is_float32s_and_said():
    table = cost_table(graph("float16"), profile())
    assert table.accesses[0].time_s == cost_table(graph(), profile()).accesses[0].time_s
    (note,) = notes(graph("float16"), profile())
    assert "float16" in note
    assert "float32" in note


def test_a_datasheets_rates_are_not_reached_and_measured_ones_are():
    def of(kind):
        rates = {"float32": replace(figure(RATE), kind=kind)}
        memory = replace(figure(BANDWIDTH), kind=kind)
        known = replace(profile(), matmul_flops_per_s=rates, memory_bytes_per_s=memory)
        return cost_table(graph(), known).accesses[0].time_s

    assert of("measured") == of("assumed") == pytest.approx(1.1 + 0.001)
    assert of("datasheet") == pytest.approx(1.1 / ACHIEVED + 0.001)


def test_products_in_float32_cost_what_float32_does():
    access = replace(graph().accesses[0], float32_flops=10**11)
    mixed = replace(graph("bfloat16"), accesses=(access,))
    time_s = cost_table(mixed, profile(bfloat16=10 * RATE)).accesses[0].time_s
    assert time_s == pytest.approx(0.09 + 0.1 + 0.1 + 0.001)
    slower = cost_table(mixed, profile(bfloat16=RATE / 2)).accesses[0].time_s  # float32 gains nothing there
    assert slower == pytest.approx(2 + 0.1 + 0.001)


def test_a_host_that_nobody_measured_takes_its_time_with_each_operator():
    many = replace(graph(), accesses=(replace(graph().accesses[0], kernels=10**6),))
    assert cost_table(many, profile()).accesses[0].time_s == pytest.approx(10**6 * OPERATOR_S)
    known = replace(profile(), operator_s=figure(2e-5))
    assert cost_table(many, known).accesses[0].time_s == pytest.approx(20)


def test_what_is_reserved_beside_peaks():
    made = replace(graph(), fragmentation_bytes=77)
    lines = {line.what: line.size_bytes for line in cost_table(made, profile()).reserved}
    assert lines == {"fragmentation": 77, "workspaces": 2 * WORKSPACE_BYTES}
    hopper = {line.what: line.size_bytes for line in cost_table(made, load("h200")).reserved}
    assert hopper["workspaces"] == 64 * MIB
    assert cost_table(made, replace(profile(), device="cpu")).reserved == ()
    assert all(line.source for line in cost_table(made, profile()).reserved)


def test_weights_that_are_loaded_one_by_one_are_rounded_up():
    assert rounding_bytes([20 * MIB, 21 * MIB]) == MIB
    assert rounding_bytes([MIB // 2] * 3) == 2 * MIB - 3 * MIB // 2
