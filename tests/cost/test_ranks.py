"""Plans of several ranks: RAM of a node, rates with all loading, the all-reduce, and what the judge says of them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

import memplan
from memplan.cost.data_parallel import HOP_S, NCCL_CHANNELS, NCCL_CONNECTION_BYTES, with_ranks
from memplan.cost.ranks import Ranks
from memplan.errors import DoesNotFitError, HardwareError, InputError, PlanCheckError, SizeError
from memplan.hardware.profile import Figure, load
from memplan.place.solve import place
from memplan.program.check.judge import check, require
from memplan.program.memory_timeline import timeline
from memplan.program.schema import RING_BYTES, Plan
from memplan.program.timeline import timeline_of
from memplan.program.whole import everything_kept
from memplan.units import align_up, parse_rate
from tests.support.tables import MIB, NAMES, budgets, make_table

CARD = load("rtx-4090")


def table_of(**more):
    return make_table([10 * MIB] * 8, device="cuda", pageable=5e8, offloadable=True, saved_bytes=6 * MIB, **more)


def ranked(table, nodes=1, per_node=2, network=None):
    return with_ranks(table, CARD, Ranks(nodes=nodes, per_node=per_node), network)[0]


def offloading(table, ram=1 << 40):
    saved = dict.fromkeys(table.recomputable, "offload")
    vram = 70 * MIB + sum(row.size_bytes for row in table.fixed if row.kind == "communication")
    return place(table, budgets(vram, ram=ram, page_lock=RING_BYTES), activations=saved, pieces=False, **NAMES)


def test_ram_is_a_nodes():
    """Weights once; offloaded activations, staging and state of every rank: in the plan, its judge and its chart."""
    one = offloading(table_of())
    for per_node in (2, 4):
        plan = offloading(ranked(table_of(), per_node=per_node))
        want = {kind: size if kind == "weights" else per_node * size for kind, size in one.prediction.ram_parts.items()}
        assert plan.prediction.ram_parts == want
        assert plan.prediction.ram_parts["activations"] > 0 < plan.prediction.ram_parts["staging"]
        assert plan.prediction.peaks.ram_bytes == sum(want.values())
        assert max(moment.ram_bytes for moment in timeline(plan)) == sum(want.values())
        assert plan.staging_bytes == one.staging_bytes
        assert offloading(plan.table, ram=sum(want.values())).prediction.peaks.ram_bytes == sum(want.values())
        pins = {item.block: "host" for item in plan.items if item.kind == "weights" and item.home == "host"}
        short = budgets(plan.budgets.vram_bytes, ram=sum(want.values()) - 1, disk=0, page_lock=RING_BYTES)
        with pytest.raises(DoesNotFitError):
            place(plan.table, short, activations=plan.policies(), pins=pins, pieces=False, **NAMES)


def test_weights_counted_once_a_rank_are_caught():
    plan = offloading(ranked(table_of()))
    said = plan.prediction
    weights, parts = said.ram_parts["weights"], dict(said.ram_parts)
    for wrong in (2 * weights, 0):  # each rank its own, and none
        peaks = replace(said.peaks, ram_bytes=said.peaks.ram_bytes - weights + wrong)
        mutant = replace(plan, prediction=replace(said, peaks=peaks, ram_parts={**parts, "weights": wrong}))
        assert any("ram peak" in fault for fault in check(mutant))
    own = said.peaks.ram_bytes - (said.ram_parts["activations"] // 2)
    of_one = replace(said, peaks=replace(said.peaks, ram_bytes=own))
    assert any("ram peak" in fault for fault in check(replace(plan, prediction=of_one)))
    small = replace(plan, budgets=replace(plan.budgets, ram_bytes=said.peaks.ram_bytes - 1))
    assert any("of ram are needed" in fault for fault in check(small))
    more = replace(plan, table=replace(plan.table, ranks=replace(plan.ranks, per_node=3)))
    assert any("ram peak" in fault for fault in check(more))


def test_vram_has_buckets_and_connections():
    table = table_of()
    rows = ranked(table)
    gradients = sum(life.size_bytes for life in table.lifetimes if life.kind == "gradients")
    plan = offloading(rows)
    want = gradients + 2 * NCCL_CHANNELS * NCCL_CONNECTION_BYTES
    assert plan.prediction.vram_parts["communication"] == want
    assert max(moment.vram["communication"] for moment in timeline(plan)) == want
    assert rows.device_bytes({}) == [size + want for size in table.device_bytes({})]
    on_cpu = with_ranks(make_table([MIB] * 4), replace(CARD, device="cpu"), Ranks(per_node=2))[0]
    assert on_cpu.fixed[-1].size_bytes == sum(
        align_up(life.size_bytes) for life in on_cpu.lifetimes if life.kind == "gradients"
    )  # gloo has none of NCCL's


def test_rates_are_shared():
    """Of the RAM where nothing was measured, and as measured where it was."""
    table = table_of(link=25e9)
    assert ranked(table, per_node=1, nodes=4).host_to_device_bytes_per_s == 25e9
    assert ranked(table, per_node=2).host_to_device_bytes_per_s == 20e9  # of 40e9, assumed
    figure = Figure(value=120e9, kind="datasheet", source="six channels", date="2024")
    server = replace(CARD, host_memory_bytes_per_s=figure)
    rows, told = with_ranks(table, server, Ranks(per_node=8))
    assert rows.host_to_device_bytes_per_s == 15e9
    assert "not measured" in told[0]
    assert "assumed" not in told[0]
    seen = replace(CARD, host_to_device_of_ranks={"2": replace(figure, value=12.5e9)})
    rows, told = with_ranks(table, seen, Ranks(per_node=2))
    assert (rows.host_to_device_bytes_per_s, rows.device_to_host_bytes_per_s) == (12.5e9, 12.5e9)
    assert told == ()
    with pytest.raises(HardwareError, match="host_to_device_of_ranks has 'two'"):
        replace(CARD, host_to_device_of_ranks={"two": figure})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_what_the_last_backward_does_not_hide(accumulation):
    """Buckets of a MiB, then of 25, one after another behind the accesses that fill them."""
    table = make_table([4 * MIB] * 8, boundary_bytes=20 * MIB)  # gradients of 10 MiB a layer
    names = {**NAMES, "workload": replace(NAMES["workload"], accumulation=accumulation)}
    one = place(table, budgets(1 << 30), **names)
    rows = with_ranks(table, replace(CARD, device="cpu"), Ranks(nodes=2), 100e6)[0]
    assert [reduce.size_bytes // MIB for reduce in rows.ranks.reduces] == [10, 30, 30, 10]
    ends = [at for at, row in enumerate(table.accesses) if row.kind == "backward"]
    assert [reduce.after for reduce in rows.ranks.reduces] == [ends[0], ends[3], ends[6], ends[7]]
    latency_s = 2 * HOP_S
    assert rows.ranks.reduces[0].time_s == pytest.approx(latency_s + 10 * MIB / 100e6)

    plan = place(rows, budgets(1 << 30), **names)
    first_s = timeline_of(plan).access_end_s[ends[0]]  # from then on the network never rests
    want = first_s + 4 * latency_s + 80 * MIB / 100e6 - one.prediction.pass_s
    assert plan.prediction.reduce_s == pytest.approx(want)
    assert plan.prediction.step_s == pytest.approx(one.prediction.step_s + want)
    assert everything_kept(plan).step_s == pytest.approx(everything_kept(one).step_s + want)
    fast = place(with_ranks(table, replace(CARD, device="cpu"), Ranks(nodes=2), 1e12)[0], budgets(1 << 30), **names)
    assert fast.prediction.reduce_s == pytest.approx(latency_s + 10 * MIB / 1e12)  # of the last bucket alone

    for field in ("reduce_s", "step_s"):
        wrong = replace(plan.prediction, **{field: getattr(plan.prediction, field) * 1.1})
        with pytest.raises(PlanCheckError):
            require(replace(plan, prediction=wrong))


def test_ranks_that_cannot_be_are_caught():
    plan = place(with_ranks(make_table([MIB] * 4), CARD, Ranks(nodes=2))[0], budgets(1 << 30), **NAMES)
    reduce = plan.ranks.reduces[0]
    for wrong in (
        replace(plan.ranks, nodes=0),
        replace(plan.ranks, nodes=1),
        replace(plan.ranks, reduces=(replace(reduce, after=99),)),
        replace(plan.ranks, reduces=(replace(reduce, time_s=-1.0),)),
    ):
        assert check(replace(plan, table=replace(plan.table, ranks=wrong)))


def test_an_old_plan_is_of_one_rank(tmp_path):
    plan = place(table_of(), budgets(1 << 30), **NAMES)
    plan.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    import json

    old = json.loads(text)
    del old["table"]["ranks"], old["prediction"]["reduce_s"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "old.json") == plan
    assert plan.ranks == Ranks()


def test_rates_are_read():
    assert parse_rate("10Gbit", "network") == parse_rate("10 Gbit/s", "network") == 1.25e9
    assert parse_rate("1GB/s", "network") == parse_rate(10**9, "network") == 1e9
    for wrong in ("fast", "10", 0, -1, "0Gbit", True):
        with pytest.raises(SizeError):
            parse_rate(wrong, "network")


def test_options_and_notes():
    """Of a real model: what is asked, what is assumed, and what would help where every rank waits for its loads."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=512,
    )  # fmt: skip
    more = {"hardware": "rtx-4090", "vram": "2GiB", "ram": "4GiB", "adapter": {"rank": 8, "targets": "all-linear"}}
    pins = {f"layers.{at}": "host" for at in range(4)}
    plan = memplan.plan(config, (1, 16), gpus=2, nodes=2, pins=pins, gains=False, **more)
    assert (plan.ranks.nodes, plan.ranks.per_node) == (2, 2)
    assert any("10 Gbit/s, assumed" in note for note in plan.notes), plan.notes
    assert any(note.startswith("Every rank loads all that streams") for note in plan.notes), plan.prediction
    assert sum(reduce.size_bytes for reduce in plan.ranks.reduces) == sum(
        life.size_bytes for life in plan.table.lifetimes if life.kind == "gradients" and life.policy != "recompute"
    )
    assert memplan.plan(config, (1, 16), gains=False, pins=pins, **more).ranks == Ranks()
    given = memplan.plan(config, (1, 16), nodes=2, network="1Gbit", gains=False, **more)
    assert any("1 Gbit/s, as given" in note for note in given.notes)
    assert given.prediction.reduce_s > 0
    for wrong in ({"gpus": 0}, {"nodes": True}, {"gpus": 2, "accumulation": 4, "group": 2}, {"network": "quick"}):
        with pytest.raises((InputError, SizeError)):
            memplan.plan(config, (1, 16), gains=False, **more, **wrong)
