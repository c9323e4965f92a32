"""``memplan run``: the script is not changed, and what it makes is the same, byte for byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from memplan.trainers.launch import STARTUP, VARIABLE
from memplan.trainers.serve_script import _why_not
from tests.trainers.conftest import exact, least_vram
from tests.trainers.forked import ROOT, clean

NO_TRAINING = "memplan: no training was seen: no model that memplan serves was called with gradients"
SCRIPT = Path(__file__).with_name("script.py")
FROM_HUB = Path(__file__).with_name("script_hub.py")
OWN_MODEL = Path(__file__).with_name("script_lightning.py")


def command(checkpoint, out, hardware, vram, mode="lora", *options, path=""):
    """The whole command, with its own start."""
    given = [
        sys.executable, "-m", "memplan", "run", "--vram", vram, "--ram", "64MiB", "--hardware", hardware, *options,
        "--", sys.executable, SCRIPT, checkpoint, out, mode,
    ]  # fmt: skip
    return subprocess.run(given, capture_output=True, text=True, env=clean(path), timeout=200, check=False)


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


MODES = ["merged"]
MORE = [
    "counted",
    "best",
    "cast",
    "adapters",
    "written",
    "swapped",
    "checkpointing",
    "dora",
    "reordered",
    "workers",
    "lora",
    "generate",
    "resized",
    "grouped",
    "reentrant",
    "autocast",
    "found",
    "smoothed",
]
VRAM = {"checkpointing": "1500KiB", "reentrant": "1500KiB", "autocast": "3MiB", "grouped": "3MiB"}
SAID = {"generate": 6, "counted": 15, "best": 4, "adapters": 19, "smoothed": 9}


def test_a_traced_run_writes_what_was_planned_and_what_was_measured(checkpoint, under, tmp_path):
    trace = tmp_path / "trace.json"
    done = under("2500KiB", SCRIPT, checkpoint, tmp_path / "run", "lora", trace=trace)
    assert done.returncode == 0, done.stderr[-3000:]
    events = json.loads(trace.read_text())["traceEvents"]
    accesses = {pid: {e["name"] for e in events if e.get("cat") == "compute" and e["pid"] == pid} for pid in (1, 2)}
    layers = {name for name in accesses[1] if "layers" in name}
    assert layers
    assert layers <= accesses[2]


@pytest.mark.parametrize("mode", [*MODES, *(pytest.param(mode, marks=pytest.mark.full) for mode in MORE)])
def test_the_same_as_without(checkpoint, alone, under, tmp_path, mode):
    whole = alone(SCRIPT, checkpoint, tmp_path / "whole", mode)
    assert whole.returncode == 0, whole.stderr[-3000:]
    report = tmp_path / "report.txt"
    done = under(VRAM.get(mode, "2500KiB"), SCRIPT, checkpoint, tmp_path / "run", mode, report=report)
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(done) == exact(whole)
    assert len(exact(done)) == SAID.get(mode, 5)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert "streamed from" in done.stderr
    assert "inactive: " not in done.stderr
    assert "measured" in report.read_text()
    if mode == "merged":
        name = "merged/model.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.quick(
    "full-2500KiB-nothing in the model is frozen",
    "hooks-2500KiB-accelerate offloads the model already",
    "unsloth-2500KiB-unsloth offloads by itself",
)
@pytest.mark.parametrize(
    ("mode", "vram", "why"),
    [
        ("full", "2500KiB", "nothing in the model is frozen"),
        ("hooks", "2500KiB", "accelerate offloads the model already"),
        ("lora", "1GiB", "the whole model fits"),
        ("unsloth", "2500KiB", "unsloth offloads by itself"),
        ("full_eval", "2500KiB", "casts the model to evaluate it"),
        pytest.param("compiled", "2500KiB", "compiles the model as a whole", marks=pytest.mark.full),
    ],
)
def test_what_it_cannot_help_runs_as_without_it(checkpoint, alone, under, tmp_path, mode, vram, why):
    whole = alone(SCRIPT, checkpoint, tmp_path / "whole", mode)
    done = under(vram, SCRIPT, checkpoint, tmp_path / "run", mode)
    assert (done.returncode, whole.returncode) == (0, 0), done.stderr[-3000:]
    assert exact(done) == exact(whole)
    name = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    told = [line for line in done.stderr.splitlines() if line.startswith("memplan:")]
    assert len(told) == 1
    assert why in told[0]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"is_deepspeed_enabled": True}, "DeepSpeed"),
        ({"is_fsdp_enabled": True}, "FSDP"),
        ({"args": {"world_size": 2}}, "one of several"),
        ({"args": {"n_gpu": 2}}, "several devices"),
    ],
)
def test_who_else_places_the_model_does_so(flags, why):
    """What neither this machine nor this process has: only what the trainer says of it is looked at."""
    args = {"world_size": 1, "n_gpu": 1, "bf16_full_eval": False, "fp16_full_eval": False} | flags.pop("args", {})
    given = {"train_dataset": [1], "is_deepspeed_enabled": False, "is_fsdp_enabled": False} | flags
    assert why in _why_not(SimpleNamespace(args=SimpleNamespace(**args), **given), torch.nn.Linear(2, 2))


@pytest.mark.quick("never-0")
@pytest.mark.parametrize(("mode", "code"), [("never", 0), ("fail", 7)])
def test_a_script_that_never_trains_is_told_so_at_its_end(checkpoint, alone, under, tmp_path, mode, code):
    whole = alone(SCRIPT, checkpoint, tmp_path, mode)
    done = under("2500KiB", SCRIPT, checkpoint, tmp_path, mode)
    assert (done.returncode, whole.returncode) == (code, code)
    assert done.stdout == whole.stdout
    assert [line for line in done.stderr.splitlines() if "memplan" in line] == [NO_TRAINING]


def test_an_adapters_folder_is_loaded_as_ever(checkpoint, alone, under, tmp_path):
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(checkpoint),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    whole = alone(SCRIPT, tmp_path / "adapter", tmp_path, "adapter")
    done = under("2500KiB", SCRIPT, tmp_path / "adapter", tmp_path, "adapter")
    assert (done.returncode, whole.returncode) == (0, 0), done.stderr[-2000:]
    assert exact(done) == exact(whole)
    assert len(exact(done)) == 1


def test_weights_that_are_stored_apart_stay_apart(checkpoint, alone, under, tmp_path):
    """Though the configuration says that they are tied: as without memplan, whatever that is."""
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    whole = alone(SCRIPT, tmp_path / "model", tmp_path, "adapter")
    done = under("2500KiB", SCRIPT, tmp_path / "model", tmp_path, "adapter")
    assert (done.returncode, whole.returncode) == (0, 0), done.stderr[-2000:]
    assert exact(done) == exact(whole)


def test_the_whole_command(checkpoint, alone, hardware, tmp_path):
    whole = alone(SCRIPT, checkpoint, tmp_path / "whole")
    report = tmp_path / "report.txt"
    report.symlink_to("elsewhere.txt")
    done = command(checkpoint, tmp_path / "run", hardware, "2500KiB", "lora", "--report", report)
    assert done.returncode == 0, done.stderr[-3000:]
    assert exact(done) == exact(whole)[-1:]
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert report.is_symlink()
    assert "measured" in (tmp_path / "elsewhere.txt").read_text()


@pytest.mark.full
def test_the_report_on_standard_output(checkpoint, hardware, tmp_path):
    done = command(checkpoint, tmp_path, hardware, "2500KiB", "lora", "--report", "-")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "measured" in done.stdout
    assert not (tmp_path / "-").exists()


@pytest.mark.full
def test_what_does_not_fit_ends_with_one(checkpoint, hardware, tmp_path):
    done = command(checkpoint, tmp_path / "run", hardware, "100KiB")
    assert done.returncode == 1
    assert "Does not fit: a micro-batch of 48 tokens needs at least" in done.stderr
    assert least_vram(done) > 100 * 1024
    assert "Traceback" not in done.stderr
    assert "no training" not in done.stderr
    assert exact(done) == []


@pytest.mark.quick("import torch-told0", "import torch, torch.distributed.run-told2")
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import torch", [NO_TRAINING]),
        ("import torch; raise SystemExit(3)", [NO_TRAINING]),
        ("import torch, torch.distributed.run", []),  # its children train
        ("import torch; 1 / 0", []),
    ],
)
def test_a_command_that_has_torch_and_trains_nothing(code, told):
    command = [sys.executable, "-m", "memplan", "run", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=60, check=False)
    assert done.returncode == (3 if "SystemExit" in code else 1 if "1 / 0" in code else 0)
    assert [line for line in done.stderr.splitlines() if "memplan" in line] == told
    assert ("ZeroDivisionError" in done.stderr) == ("1 / 0" in code)


@pytest.mark.full
def test_an_other_sitecustomize_runs_too(checkpoint, hardware, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('theirs')\n")
    done = command(checkpoint, tmp_path, hardware, "2500KiB", "fail", path=str(tmp_path))
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


@pytest.mark.full
def test_modules_keep_their_own_loaders():
    """Those who ask a module for its source or its loader find what they would without memplan."""
    code = (
        "import inspect, transformers.trainer as t; print(type(t.__spec__.loader).__name__, "
        "len(inspect.getsource(t)) > 9)"
    )
    env = clean(str(STARTUP)) | {VARIABLE: json.dumps({})}
    env["PYTHONPATH"] = os.pathsep.join([str(STARTUP), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=100, check=False
    )
    assert done.stdout == "SourceFileLoader True\n", done.stderr[-2000:]


@pytest.mark.full
def test_killed_and_resumed_under_another_budget(checkpoint, alone, under, tmp_path):
    whole = alone(SCRIPT, checkpoint, tmp_path / "whole", "saved")
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = under("2500KiB", SCRIPT, checkpoint, tmp_path / "run", "killed")
    assert killed.returncode == -signal.SIGKILL
    assert "streamed from" in killed.stderr
    done = under("3000KiB", SCRIPT, checkpoint, tmp_path / "run", "saved")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "streamed from" in done.stderr
    assert exact(killed)[:2] + exact(done) == exact(whole)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_a_name_on_a_hub(checkpoint, alone, under, tmp_path):
    """From its cache, as transformers finds it; the adapter says the name that it was given."""
    folder = tmp_path / "hub" / "models--someone--small" / "snapshots" / "0123"
    shutil.copytree(checkpoint, folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("0123")
    cache = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    whole = alone(FROM_HUB, tmp_path / "whole", str(tmp_path / "hub"), **cache)
    assert whole.returncode == 0, whole.stderr[-2000:]
    done = under("2500KiB", FROM_HUB, tmp_path / "run", str(tmp_path / "hub"), **cache)
    assert done.returncode == 0, done.stderr[-2000:]
    assert exact(done) == exact(whole)
    assert len(exact(done)) == 2
    assert "streamed from" in done.stderr
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")
    assert (
        json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/small"
    )


def test_a_lightning_module_that_makes_its_own_model(alone, under, tmp_path):
    """Its model is known to no ``from_pretrained``: Lightning asks memplan for a callback."""
    whole = alone(OWN_MODEL, tmp_path / "whole.pt")
    assert whole.returncode == 0, whole.stderr[-2000:]
    done = under("1500KiB", OWN_MODEL, tmp_path / "run.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    assert exact(done) == exact(whole)
    assert len(exact(done)) == 4
    assert "streamed from" in done.stderr
    assert torch.equal(torch.load(tmp_path / "run.pt"), torch.load(tmp_path / "whole.pt"))
