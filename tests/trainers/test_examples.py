"""Each trainer, by its example: as it is, under ``memplan run``, and with memplan's own lines. The same, byte for
byte.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from tests.trainers.conftest import least_vram
from tests.trainers.forked import clean

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = {
    "transformers_trainer": ("checkpoint", "text", AutoModelForCausalLM),
    "seq2seq_trainer": ("t5", "pairs", AutoModelForSeq2SeqLM),
    "trl_sft": ("checkpoint", "text", AutoModelForCausalLM),
    "trl_sft_packed": ("checkpoint", "text", AutoModelForCausalLM),
    "trl_dpo": ("checkpoint", "pairs", AutoModelForCausalLM),
    "trl_reward": ("checkpoint", "pairs", AutoModelForSequenceClassification),
    "accelerate_loop": ("checkpoint", "text", AutoModelForCausalLM),
    "lightning_trainer": ("checkpoint", "text", AutoModelForCausalLM),
    "peft_loop": ("checkpoint", "text", AutoModelForCausalLM),
    "accelerate_loop_bf16": ("checkpoint", "text", AutoModelForCausalLM),
    "diffusers_unet": ("unet", None, None),
    "diffusers_dit": ("dit", None, None),
}


def exact(done):
    """What a script printed that does not change from run to run."""
    return [line for line in done.stdout.splitlines() if line.startswith(("loss", "eval", "val_", "generated"))]


def slightly_more(refused):
    """What a budget of nothing says would do, and a little."""
    return f"{least_vram(refused) + 100_000}B"


def adapter(out):
    return (out / "adapter_model.safetensors").read_bytes()


def config(out):
    """An adapter's configuration; the names in it have no order."""
    read = json.loads((out / "adapter_config.json").read_text())
    return read | {"target_modules": sorted(read["target_modules"])}


LONG = (
    "accelerate_loop",
    "trl_sft",
    "diffusers_unet",
    "lightning_trainer",
    "trl_dpo",
    "trl_sft_packed",
    "trl_reward",
    "accelerate_loop_bf16",
    "peft_loop",
    "diffusers_dit",
    "seq2seq_trainer",
    "transformers_trainer",
)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.full) if k in LONG else k for k in KINDS])
def test_the_same_in_each_way(request, alone, under, data, tmp_path, kind):
    model, rows, loads = KINDS[kind]
    folder = request.getfixturevalue(model)
    script = EXAMPLES / (
        "diffusers_lora.py" if kind.startswith("diffusers") else f"{re.sub('_(bf16|packed)$', '', kind)}.py"
    )
    more = [] if rows is None else [data / f"{rows}.jsonl"]

    def arguments(out, *options):
        packing = ["--packing"] * kind.endswith("packed")
        return [script, folder, *more, tmp_path / out, "--steps", 4, *packing, *options]

    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    if kind.endswith("bf16"):
        cache["ACCELERATE_MIXED_PRECISION"] = "bf16"
    whole = alone(*arguments("whole"), **cache)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert len(exact(whole)) >= 4

    def asked(out, vram):
        return alone(*arguments(out, "--vram", vram, "--ram", "64MiB"), **cache)

    run = under(slightly_more(under("10KiB", *arguments("none"), **cache)), *arguments("run"), **cache)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "streamed" in run.stderr
    assert "inactive: " not in run.stderr
    wrapped = asked("asked", slightly_more(asked("none", "10KiB")))
    assert wrapped.returncode == 0, wrapped.stderr[-4000:]
    assert "streamed" in wrapped.stdout
    for done, out in ((run, "run"), (wrapped, "asked")):
        assert exact(done) == exact(whole), out
        assert adapter(tmp_path / out) == adapter(tmp_path / "whole"), out
    if loads is not None:
        assert config(tmp_path / "run") == config(tmp_path / "asked") == config(tmp_path / "whole")
        base = loads.from_pretrained(folder, **({"num_labels": 1} if "reward" in kind else {}))
        assert PeftModel.from_pretrained(base, tmp_path / "run").peft_config["default"].r == 8


def test_a_loop_of_ones_own(alone):
    done = alone(EXAMPLES / "plain_loop.py", "5MiB", "8MiB")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Fits" in done.stdout
    losses = [
        float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ") and "x" not in line
    ]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5


@pytest.mark.parametrize("script", sorted(file.stem for file in EXAMPLES.glob("*_*.py")))
@pytest.mark.full
def test_without_arguments(script, tmp_path):
    """As someone new tries it: with a model and rows that it makes itself."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py"],
        env={**clean(), "TMPDIR": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "measured" in done.stdout


def test_each_is_tried_here():
    tried = {re.sub("_(unet|dit|bf16|packed)$", "", kind) for kind in KINDS}
    tried = {name.replace("diffusers", "diffusers_lora") for name in tried} | {"plain_loop"}
    assert {file.stem for file in EXAMPLES.glob("*.py")} == tried | {"small"}
