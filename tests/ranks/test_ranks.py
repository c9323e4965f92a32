"""Two ranks on gloo: losses and adapters are those of whole DDP to the last bit, or all of them end and say why."""

from __future__ import annotations

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


def exact(done):
    return [[line for line in out.splitlines() if line.startswith(("loss", "eval"))] for out in done.stdout]


def adapter(folder):
    return (folder / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="session")
def whole(ranks, checkpoint, tmp_path_factory):
    """Runs a kind of script as whole DDP, once."""
    known = {}

    def run(kind):
        kind = "+".join(
            part
            for part in kind.split("+")
            if part not in ("disk", "checked", "late", "memory", "wrapped", "grouped", "callback")
        )
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


@pytest.mark.full
@pytest.mark.parametrize("kind", CASES)
def test_memplans_own_lines_train_as_whole_ddp(whole, ranks, checkpoint, tmp_path, kind):
    vram = next((VRAM[part] for part in kind.split("+") if part in VRAM), "2500KiB")
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
    vram = next((VRAM[part] for part in kind.split("+") if part in VRAM), "2500KiB")
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
@pytest.mark.parametrize("how", ["apart", "unshared"])
def test_where_memory_cannot_be_shared_each_has_its_own(whole, ranks, checkpoint, tmp_path, how):
    done = ranks(SCRIPT, checkpoint, tmp_path, "trainer+memory", "2500KiB", "64MiB", FAULT=how)
    same_as_whole(whole, "trainer", done, tmp_path)
    assert all(resident == 0 for resident, *_ in memory(done))
    assert all(("cannot share memory" in text) == (how == "unshared") for text in done.stderr)


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
