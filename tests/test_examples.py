"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]


def run(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plain_loop():
    text = run("plain_loop.py", "5MiB", "8MiB")
    assert "Fits" in text
    losses = [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss ")]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 5


def test_transformers_trainer(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=96, dtype="float32", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    text = run("transformers_trainer.py", tmp_path / "model", "6MiB", "20MiB", tmp_path / "out")
    assert "Fits" in text
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.name)
def test_each_is_tried_here(file):
    assert file.name in Path(__file__).read_text()
