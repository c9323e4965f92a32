"""Two ranks on gloo: losses and adapters are those of whole DDP to the last bit, or all of them end and say why."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.trainers.forked import clean

SCRIPT = Path(__file__).with_name("script_ranks.py")
EXAMPLES = Path(__file__).parents[2] / "examples"
VRAM = {"grouped": "4MiB", "checkpointing": "1300KiB", "cast": "1200KiB"}
OTHERS = 30
"""Seconds until the others have ended too, once one rank has failed."""

WAYS = ("asked", "run")
GRID = [
    "ddp+resident+checked",
    "ddp+accumulated+checkpointing",
    "ddp+disk+static",
    "ddp+resident+unused+checkpointing",
    "ddp+quiet+accumulated+disk",
    "ddp+packed+evaluated+checkpointing",
    "ddp+resident+static+checkpointing",
    "ddp+unused+disk",
    "ddp+quiet+checkpointing",
    "ddp+resident+quiet+accumulated",
    "ddp+packed+unused+accumulated",
    "ddp+disk+checkpointing+accumulated",
]
"""Every two of: where homes are, checkpointing, accumulation under no_sync, DDP's own settings (of which torch has no
static graph with no_sync before the first sum). The first six are quick.
"""
CASES = [
    "ddp",
    "ddp+accumulated+disk+checked",
    "ddp+packed+accumulated",
    "ddp+static+checkpointing",
    "ddp+unused+evaluated+quiet",
    "ddp+uneven+disk",
    "ddp+written+late",
    "accelerate+accumulated+checkpointing",
    "accelerate+disk+checked",
    "trainer+accumulated+disk",
    "trainer+checkpointing+packed",
    "trainer+cast",
    "trainer+wrapped+accumulated",
    "trainer+grouped+accumulated",
    "trainer+callback",
    "lightning",
    "lightning+checkpointing+disk",
]


def vram_for(kind):
    """So much that something is streamed."""
    if "resident" in kind:
        return "1600KiB" if "checkpointing" in kind else "2MiB"
    return next((VRAM[part] for part in kind.split("+") if part in VRAM), "2500KiB")


def exact(done):
    return [[line for line in out.splitlines() if line.startswith(("loss", "eval"))] for out in done.stdout]


def adapter(folder):
    return (folder / "adapter.safetensors").read_bytes()


def without(kind):
    """What of a kind is not memplan's."""
    of_memplan = ("disk", "resident", "checked", "late", "memory", "wrapped", "grouped", "callback")
    return "+".join(part for part in kind.split("+") if part not in of_memplan)


@pytest.fixture(scope="session")
def whole(ranks, checkpoint, tmp_path_factory):
    """Runs a kind of script as whole DDP, once."""
    known = {}

    def run(kind):
        kind = without(kind)
        if kind not in known:
            out = tmp_path_factory.mktemp("whole")
            done = ranks(SCRIPT, checkpoint, out, kind)
            assert done.codes == [0, 0], done.stderr
            known[kind] = exact(done), adapter(out)
        return known[kind]

    return run


def same_as_whole(whole, kind, done, out):
    assert done.codes == [0, 0], [text[-3000:] for text in done.stderr]
    losses, its = whole(kind)
    assert exact(done) == losses
    assert len(losses[0]) >= 3
    assert adapter(out) == its


def memory(done):
    """The kB of each rank: resident, proportional and its own of what is shared; its own of the checkpoint's files."""
    return [[int(word) for word in out.split("memory ")[1].split()[:4]] for out in done.stdout]


def test_a_script_as_it_is_trains_as_whole_ddp_and_shares_its_weights(whole, ranks_under, checkpoint, tmp_path):
    done = ranks_under("2500KiB", SCRIPT, checkpoint, tmp_path, "trainer+memory")
    same_as_whole(whole, "trainer", done, tmp_path)
    assert "streamed from" in done.stderr[0]
    assert "memplan" not in done.stderr[1]
    for resident, proportional, own, of_files in memory(done):
        assert resident > 800
        assert proportional <= 0.55 * resident
        assert own == 0
        assert of_files == 0


def cases(done):
    """The losses that each rank tells of each case, of several that one launch trains in turn."""
    found = []
    for out in done.stdout:
        told = [part.splitlines()[1:] for part in out.split("case ")[1:]]
        found.append([[line for line in lines if line.startswith(("loss", "eval"))] for lines in told])
    return [list(one) for one in zip(*found, strict=True)]


@pytest.mark.parametrize("kinds", [GRID[:6], pytest.param(GRID[6:], marks=pytest.mark.full)], ids=["quick", "more"])
def test_one_launch_after_another_model_trains_as_whole_ddp(ranks, checkpoint, tmp_path, kinds):
    vrams = ",".join(vram_for(kind) for kind in kinds)
    whole = ranks(SCRIPT, checkpoint, tmp_path / "whole", ",".join(map(without, kinds)))
    assert whole.codes == [0, 0], whole.stderr
    asked = SCRIPT, checkpoint, tmp_path / "run", ",".join(kinds), vrams, "64MiB"
    done = ranks(*asked, MEMPLAN_CACHE=str(tmp_path / "cache"))
    assert done.codes == [0, 0], [text[-3000:] for text in done.stderr]
    assert len(cases(done)) == len(kinds)
    for number, (kind, its, wholes) in enumerate(zip(kinds, cases(done), cases(whole), strict=True)):
        assert its == wholes, kind
        assert len(its[0]) >= 3
        assert adapter(tmp_path / "run" / str(number)) == adapter(tmp_path / "whole" / str(number)), kind
    for out in done.stdout:
        assert out.count("streamed True") == len(kinds)
        assert out.count("left 0") == len(kinds)


@pytest.mark.full
@pytest.mark.parametrize("kind", CASES)
def test_memplans_own_lines_train_as_whole_ddp(whole, ranks, checkpoint, tmp_path, kind):
    vram = vram_for(kind)
    done = ranks(SCRIPT, checkpoint, tmp_path, kind, vram, "64MiB", MEMPLAN_CACHE=str(tmp_path / "cache"))
    same_as_whole(whole, kind, done, tmp_path)
    assert all("streamed True" in out for out in done.stdout)
    packed = [*(tmp_path / "cache" / "blocks").glob("*.block")]
    assert len(packed) == (4 if "packed" in kind else 0)
    if kind.startswith("ddp"):
        assert all("left 0" in out for out in done.stdout), done.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    "kind", ["ddp", "ddp+written", "ddp+built", "accelerate+accumulated", "trainer+checkpointing", "lightning"]
)
def test_scripts_as_they_are(whole, ranks_under, checkpoint, tmp_path, kind):
    vram = vram_for(kind)
    done = ranks_under(vram, SCRIPT, checkpoint, tmp_path, kind)
    same_as_whole(whole, kind, done, tmp_path)
    assert "streamed from" in done.stderr[0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("trainer+unlike", "the frozen weights of rank 1 are not those of rank 0 (model.layers.2)"),
        pytest.param("ddp+seeded", "the frozen weights of rank 1 are not those of rank 0", marks=pytest.mark.full),
        pytest.param("ddp+replanned", "rank 1 has another plan than rank 0", marks=pytest.mark.full),
        pytest.param("trainer+thinned", "rank 1 has another model than rank 0", marks=pytest.mark.full),
    ],
)
def test_what_differs_is_an_error_that_names_the_rank(ranks, checkpoint, tmp_path, kind, said):
    done = ranks(SCRIPT, checkpoint, tmp_path, kind, "2500KiB", "64MiB", alone=True)
    assert all(done.codes)
    assert all(said in text for text in done.stderr), done.stderr
    assert max(done.seconds) - min(done.seconds) < OTHERS


FAULTS = [
    (where, faulty, way)
    for where in ("plans", "maps", "fills", "packs", "attaches", "fills killed")
    for faulty in (0, 1)
    for way in WAYS
]


@pytest.mark.quick("asked-1-fills")
@pytest.mark.parametrize(("where", "faulty", "way"), FAULTS, ids=[f"{way}-{f}-{where}" for where, f, way in FAULTS])
def test_a_fault_on_one_rank_ends_all(ranks, ranks_under, checkpoint, tmp_path, where, faulty, way):
    if where == "packs" and faulty == 1:
        faulty = 0  # the first of the node packs
    kind = "trainer+packed" if where == "packs" else "trainer"
    fault = {"FAULT": where, "FAULTY": str(faulty), "MEMPLAN_CACHE": str(tmp_path / "cache"), "alone": True}
    if way == "asked":
        done = ranks(SCRIPT, checkpoint, tmp_path, kind, "2500KiB", "64MiB", **fault)
    else:
        done = ranks_under("2500KiB", SCRIPT, checkpoint, tmp_path, kind, **fault)
    if where == "packs" and way == "run":
        return  # without pins nothing is packed
    assert all(done.codes), done.stderr
    assert max(done.seconds) - min(done.seconds) < OTHERS
    told = done.stderr[1 - faulty]
    # Rank 0 keeps the store, and where it has gone before it was met nobody can be asked.
    assert f"rank {faulty}" in told, told[-2000:]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["trainer+memory", "ddp+disk+accumulated"])
def test_two_nodes_train_as_whole_ddp(whole, ranks, nodes, checkpoint, tmp_path, kind):
    """They are network and process namespaces of one machine: ranks that meet over a link, and share nothing."""
    done = ranks(SCRIPT, checkpoint, tmp_path, kind, "2500KiB", "64MiB", nodes=nodes)
    same_as_whole(whole, kind, done, tmp_path)
    if "memory" in kind:
        assert all(resident == 0 for resident, *_ in memory(done))


@pytest.mark.full
@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("where", ["plans", "maps", "fills", "packs", "attaches", "trains"])
def test_a_fault_on_one_node_ends_the_other(ranks, nodes, checkpoint, tmp_path, where, faulty):
    kind = {"packs": "trainer+packed", "trains": "ddp+faulted"}.get(where, "trainer")
    fault = {"FAULTY": str(faulty), "MEMPLAN_CACHE": str(tmp_path / "cache"), "alone": True, "nodes": nodes}
    if where != "trains":
        fault["FAULT"] = where
    done = ranks(SCRIPT, checkpoint, tmp_path, kind, "2500KiB", "64MiB", **fault)
    assert all(done.codes), done.stderr
    assert max(done.seconds) - min(done.seconds) < OTHERS
    told = done.stderr[1 - faulty]
    # Who keeps the store takes it along, where it fails in training.
    assert f"rank {faulty}" in told, told[-2000:]


@pytest.mark.full
@pytest.mark.parametrize("how", ["apart", "unshared"])
def test_where_memory_cannot_be_shared_each_has_its_own(whole, ranks, checkpoint, tmp_path, how):
    done = ranks(SCRIPT, checkpoint, tmp_path, "trainer+memory", "2500KiB", "64MiB", FAULT=how)
    same_as_whole(whole, "trainer", done, tmp_path)
    assert all(resident == 0 for resident, *_ in memory(done))
    assert all(("cannot share memory" in text) == (how == "unshared") for text in done.stderr)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ddp+disk+accumulated", "ddp+packed"])
def test_a_node_reads_its_disk_as_one_rank_does(whole, ranks, checkpoint, tmp_path, kind):
    def read(count, out):
        asked = checkpoint, tmp_path / out, kind, "2500KiB", "64MiB"
        done = ranks(SCRIPT, *asked, ranks=count, RING="262144", MEMPLAN_CACHE=str(tmp_path / "cache"))
        assert not any(done.codes), done.stderr
        return done, [int(re.search(r"read (\d+)", text)[1]) for text in done.stdout]

    read(1, "packed")  # from here on what has to be packed is there
    _, one = read(1, "one")
    done, two = read(2, "two")
    same_as_whole(whole, kind, done, tmp_path / "two")
    blocks = 4 * (96 << 10)
    assert one[0] > 5 * blocks  # they are loaded over and over
    assert sum(two) <= 1.1 * one[0]
    assert sum(two) > 0.5 * one[0]


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "said"),
    [("ddp+faulted", "ended by ValueError: something of the script's own"), ("ddp+killed", "was there no more")],
)
def test_who_fails_in_training_ends_all(ranks, checkpoint, tmp_path, kind, said):
    done = ranks(SCRIPT, checkpoint, tmp_path, kind, "2500KiB", "64MiB", alone=True)
    assert all(done.codes)
    assert max(done.seconds) - min(done.seconds) < OTHERS
    assert f"memplan: rank 1 {said}" in done.stderr[0]


@pytest.mark.full
def test_memory_that_runs_out_under_no_sync_is_had_by_trying_again(whole, ranks, checkpoint, tmp_path):
    done = ranks(SCRIPT, checkpoint, tmp_path, "ddp+accumulated+crowded", "2500KiB", "64MiB")
    assert done.codes == [0, 0], done.stderr
    assert "streamed True 0" in done.stdout[0]
    assert "streamed True 1" in done.stdout[1]
    assert adapter(tmp_path) == whole("ddp+accumulated")[1]


@pytest.mark.full
def test_memory_that_runs_out_where_gradients_are_summed_is_an_error(ranks, checkpoint, tmp_path):
    done = ranks(SCRIPT, checkpoint, tmp_path, "ddp+crowded", "2500KiB", "64MiB")
    assert all(done.codes)
    assert "rank 1 ran out of device memory" in done.stderr[1]
    assert "B) at most" in done.stderr[1]


@pytest.mark.full
def test_a_restart_goes_on_with_what_one_that_ran_out_of_memory_has_left(whole, ranks, checkpoint, tmp_path):
    asked = SCRIPT, checkpoint, tmp_path, "trainer+crowded", "2500KiB", "64MiB"
    more = {"TORCHELASTIC_MAX_RESTARTS": "1", "MEMPLAN_CACHE": str(tmp_path / "cache")}
    done = ranks(*asked, **more, TORCHELASTIC_RESTART_COUNT="0")
    assert all(done.codes)
    smaller = int(re.search(r"The launcher's restart plans for vram of .* \((\d+)B\)", done.stderr[1])[1])
    done = ranks(*asked, **more, TORCHELASTIC_RESTART_COUNT="1")
    same_as_whole(whole, "trainer", done, tmp_path)
    assert [re.search(r"budget (\d+)", text)[1] for text in done.stdout] == [str(smaller)] * 2
    fresh = ranks(*asked, **more, TORCHELASTIC_RESTART_COUNT="0")
    assert "restart plans for" in fresh.stderr[1]  # a run of its own begins with its own budget
    assert str(smaller) in fresh.stderr[1]


def processes_of(mark):
    """The processes that have a line in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(folder)
    return found


@pytest.mark.full
@pytest.mark.parametrize(("who", "restarts"), [("killed", 1), ("killed", 0), ("felled", 0)])
def test_who_is_killed_leaves_nothing_and_a_restart_trains_anew(whole, checkpoint, hardware, tmp_path, who, restarts):
    mark = f"MEMPLAN_TEST={tmp_path}"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--max-restarts",
        str(restarts), SCRIPT, checkpoint, tmp_path, f"ddp+disk+{who}", "2500KiB", "64MiB",
    ]  # fmt: skip
    # Else gloo finds what the ranks before have left in the launcher's store, and may fail to connect (torch 2.13).
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    env = clean() | {"PROFILE": str(hardware)} | own_store | dict([mark.split("=")])
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)
    assert (done.returncode == 0) == bool(restarts), done.stderr[-3000:]
    assert "-9" in done.stderr
    if restarts:
        assert adapter(tmp_path) == whole("ddp")[1]
    assert processes_of(mark) == []  # memory without a name goes with the last of them


@pytest.mark.full
@pytest.mark.parametrize("way", ["before", "after", "accelerate"])
def test_launchers(whole, checkpoint, hardware, tmp_path, way):
    budgets = ["--vram", "2500KiB", "--ram", "64MiB", "--hardware", hardware, "--report", tmp_path / "report.txt"]
    memplan = [sys.executable, "-m", "memplan", "run", *budgets, "--"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = [SCRIPT, checkpoint, tmp_path, "trainer"]
    command = {
        "before": [*memplan, *torchrun, *script],
        "after": [*torchrun, "--no-python", *memplan, sys.executable, *script],
        "accelerate": [
            *memplan, sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *script,
        ],
    }[way]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert adapter(tmp_path) == whole("trainer")[1]
    assert done.stderr.count("streamed from") == 1
    assert "measured" in (tmp_path / "report.txt").read_text()


@pytest.mark.full
@pytest.mark.parametrize("name", ["trl_sft", "transformers_trainer"])
def test_examples(ranks, ranks_under, checkpoint, data, tmp_path, name):
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def given(out):
        return EXAMPLES / f"{name}.py", checkpoint, data / "text.jsonl", tmp_path / out, "--steps", 4

    first = ranks(*given("whole"), **cache)
    assert first.codes == [0, 0], first.stderr
    refused = ranks_under("10KiB", *given("none"), **cache)
    assert all(refused.codes)
    least = [re.search(r"vram \((\d+) bytes\)", text) for text in refused.stderr]
    assert all(least), refused.stderr
    assert least[0][1] == least[1][1]
    done = ranks_under(f"{int(least[0][1]) + 100_000}B", *given("run"), **cache)
    assert done.codes == [0, 0], done.stderr
    assert "streamed from" in done.stderr[0]
    assert exact(done) == exact(first)
    assert len(exact(done)[0]) >= 4
    name = "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("fewer", [1, 2])
def test_training_goes_on_with_another_number_of_ranks(ranks, ranks_under, checkpoint, tmp_path, fewer):
    for out, run in ((tmp_path / "whole", ranks), (tmp_path / "run", partial(ranks_under, "2500KiB"))):
        assert run(SCRIPT, checkpoint, out, "trainer+saved").codes == [0, 0]
        assert not any(run(SCRIPT, checkpoint, out, "trainer+resumed", ranks=fewer).codes)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.full
def test_pinned_memory_is_shared_and_who_writes_to_it_does_so_alone(ranks, tmp_path):
    done = ranks(SCRIPT.with_name("script_device.py"), tmp_path, timeout_s=200)
    assert done.codes == [0, 0], [text[-3000:] for text in done.stderr]
    for out in done.stdout:
        assert re.search(r"pinned and shared [1-9]\d* True", out)
        assert "written True True" in out
        assert "same True" in out
    read = [tuple(map(int, re.search(r"read (\d+) of (\d+)", out).groups())) for out in done.stdout]
    assert 0 < sum(one for one, _ in read) <= read[0][1]  # by way of what they share, which has room for all
