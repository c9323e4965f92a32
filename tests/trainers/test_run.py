"""``memplan run``: the script is not changed, and what it makes is the same, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from memplan.trainers.launch import STARTUP, VARIABLE
from tests.trainers.small import save_small_llama
from tests.training import CPU

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("script.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Several shards whose tensors lie at multiples of 64 bytes, as they do in RAM: alignment changes bits."""
    folder = tmp_path_factory.mktemp("model")
    shards = save_small_llama(folder)
    for shard in shards:
        raw = shard.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        padded = -(-(size + 8) // 64) * 64 - 8
        shard.write_bytes(struct.pack("<Q", padded) + raw[8 : 8 + size].ljust(padded) + raw[8 + size :])
    # Another model, of which each weight begins with the same 4096 bytes.
    (folder / "other").mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder / "other")
    for shard in shards:
        tensors = load_file(shard)
        for tensor in tensors.values():
            tensor.view(-1)[1024:] += 0.01
        save_file(tensors, folder / "other" / shard.name, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def hardware(tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "cpu.json"
    file.write_bytes(msgspec.json.encode(CPU))
    return file


def clean(path: str = "") -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), path])), "OMP_NUM_THREADS": "1"}


def whole(checkpoint, out, mode="lora"):
    command = [sys.executable, SCRIPT, checkpoint, out, mode]
    return subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=200, check=False)


def under(checkpoint, out, hardware, mode="lora", vram="2500KiB", *options, path=""):
    command = [
        sys.executable, "-m", "memplan", "run", "--vram", vram, "--ram", "64MiB", "--hardware", hardware, *options,
        "--", sys.executable, SCRIPT, checkpoint, out, mode,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=clean(path), timeout=200, check=False)


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


def exact(done):
    """What a script printed that does not change from run to run."""
    return [line for line in done.stdout.splitlines() if line.startswith(("loss", "eval", "made", "sum"))]


LONG = [pytest.param(mode, marks=pytest.mark.full) for mode in ("lora", "generate", "resized")]


@pytest.mark.parametrize("mode", ["dora", "written", "reordered", "swapped", "counted", "merged", *LONG])
def test_the_same_as_without(checkpoint, hardware, tmp_path, mode):
    alone = whole(checkpoint, tmp_path / "whole", mode)
    assert alone.returncode == 0, alone.stderr[-3000:]
    report = tmp_path / "report.txt"
    done = under(checkpoint, tmp_path / "run", hardware, mode, "2500KiB", "--report", report)
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(done) == exact(alone)
    assert len(exact(done)) == {"generate": 6, "counted": 15}.get(mode, 5)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert "streamed from" in done.stderr
    assert "measured" in report.read_text()
    if mode == "merged":
        name = "merged/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("mode", "vram", "why"),
    [
        ("full", "2500KiB", "nothing in the model is frozen"),
        ("hooks", "2500KiB", "accelerate offloads the model already"),
        ("lora", "1GiB", "the whole model fits"),
    ],
)
def test_what_it_cannot_help_runs_as_without_it(checkpoint, hardware, tmp_path, mode, vram, why):
    alone = whole(checkpoint, tmp_path / "whole", mode)
    done = under(checkpoint, tmp_path / "run", hardware, mode, vram)
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr[-3000:]
    assert exact(done) == exact(alone)
    name = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    told = [line for line in done.stderr.splitlines() if line.startswith("memplan:")]
    assert len(told) == 1
    assert why in told[0]


@pytest.mark.parametrize(("mode", "code"), [("never", 0), ("fail", 7)])
def test_a_script_that_never_trains_is_left_alone(checkpoint, hardware, tmp_path, mode, code):
    alone = whole(checkpoint, tmp_path, mode)
    done = under(checkpoint, tmp_path, hardware, mode)
    assert (done.returncode, alone.returncode) == (code, code)
    assert done.stdout == alone.stdout
    assert "memplan" not in done.stderr


def test_an_adapters_folder_is_loaded_as_ever(checkpoint, hardware, tmp_path):
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(checkpoint),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    alone = whole(tmp_path / "adapter", tmp_path, "adapter")
    done = under(tmp_path / "adapter", tmp_path, hardware, "adapter")
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr[-2000:]
    assert exact(done) == exact(alone)
    assert len(exact(done)) == 1


def test_weights_that_are_stored_apart_stay_apart(checkpoint, hardware, tmp_path):
    """Though the configuration says that they are tied: as without memplan, whatever that is."""
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    alone = whole(tmp_path / "model", tmp_path, "adapter")
    done = under(tmp_path / "model", tmp_path, hardware, "adapter")
    assert (done.returncode, alone.returncode) == (0, 0), done.stderr[-2000:]
    assert exact(done) == exact(alone)


def test_what_does_not_fit_ends_with_one(checkpoint, hardware, tmp_path):
    done = under(checkpoint, tmp_path / "run", hardware, "lora", "100KiB")
    assert done.returncode == 1
    assert "DoesNotFitError" in done.stderr
    assert exact(done) == []


def test_an_other_sitecustomize_runs_too(checkpoint, hardware, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    done = under(checkpoint, tmp_path, hardware, "fail", path=str(tmp_path))
    assert done.stdout == "theirs\n" * 2  # the command's own Python, and the script's
    assert done.returncode == 7


def test_ctrl_c_ends_a_script_as_ever(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text("import time\nprint('now', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "memplan", "run", "--", sys.executable, str(script)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean())
    assert running.stdout is not None
    assert running.stdout.readline() == "now\n"
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert "memplan" not in errors


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--vram", "much", "--", "true"], "--vram"),
        (["--", "no-such-program"], "no-such-program"),
        (["--report", "/no/such/folder/report.txt", "--", "true"], "does not exist"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_starts_nothing(arguments, told):
    command = [sys.executable, "-m", "memplan", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=60, check=False)
    assert done.returncode == 2
    assert told in done.stderr


def test_options_of_the_script_are_its_own(tmp_path):
    script = tmp_path / "says.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    command = [sys.executable, "-m", "memplan", "run", sys.executable, str(script), "--vram", "x", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=60, check=False)
    assert done.stdout == "['--vram', 'x', '--json']\n"
    assert done.returncode == 0


def test_a_script_without_torch_stays_without(tmp_path):
    code = "import sys; print(sorted({'torch', 'numpy', 'click'} & set(sys.modules)), 'memplan' in sys.modules)"
    command = [sys.executable, "-m", "memplan", "run", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[] True\n", "", 0)


def test_modules_keep_their_own_loaders():
    """Those who ask a module for its source or its loader find what they would without memplan."""
    code = "import inspect, transformers.trainer as t; print(type(t.__spec__.loader).__name__, len(inspect.getsource(t)) > 9)"
    env = clean(str(STARTUP)) | {VARIABLE: json.dumps({})}
    env["PYTHONPATH"] = os.pathsep.join([str(STARTUP), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100, check=False
    )
    assert done.stdout == "SourceFileLoader True\n", done.stderr[-2000:]


def test_killed_and_resumed_under_another_budget(checkpoint, hardware, tmp_path):
    alone = whole(checkpoint, tmp_path / "whole", "saved")
    assert alone.returncode == 0, alone.stderr[-3000:]
    killed = under(checkpoint, tmp_path / "run", hardware, "killed", "2500KiB")
    assert killed.returncode == -signal.SIGKILL
    assert "streamed from" in killed.stderr
    done = under(checkpoint, tmp_path / "run", hardware, "saved", "3000KiB")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "streamed from" in done.stderr
    assert exact(killed)[:2] + exact(done) == exact(alone)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["plain", pytest.param("accelerate", marks=pytest.mark.full), "autocast", "lightning"])
def test_loops_of_the_scripts_own(checkpoint, hardware, tmp_path, kind):
    file, *more = ("script_lightning.py",) if kind == "lightning" else ("script_loop.py", kind)

    def script(out, *before):
        command = [*before, sys.executable, SCRIPT.with_name(file), checkpoint, out, *more]
        return subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=200, check=False)

    alone = script(tmp_path / "whole")
    assert alone.returncode == 0, alone.stderr[-3000:]
    run = [sys.executable, "-m", "memplan", "run", "--vram", "3000KiB", "--ram", "64MiB", "--hardware", hardware]
    report = tmp_path / "report.txt"
    done = script(tmp_path / "run", *run, "--report", report, "--")
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(done) == exact(alone)
    assert len(exact(done)) >= 6
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert "streamed from" in done.stderr
    assert "measured" in report.read_text()
