"""A model more than three times larger than vram and ram together trains from disk, without ever being held whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from memplan.units import MIB

VRAM, RAM = 256 * MIB, 64 * MIB
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 1024, 2816, 24, 512
SLACK = 600 * MIB


def write_checkpoint(folder: Path) -> int:
    """Write the model shard by shard, one layer in memory at a time; return its bytes."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCABULARY, max_position_embeddings=64, dtype="float32", use_cache=False,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    weight_map, total = {}, 0

    def write(shard: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))
        total += sum(t.numel() * 4 for t in tensors.values())

    for index in range(LAYERS):
        p = f"model.layers.{index}."
        tensors = {p + f"self_attn.{n}_proj.weight": normal(HIDDEN, HIDDEN) for n in "qkvo"}
        tensors |= {p + f"mlp.{n}_proj.weight": normal(INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        tensors[p + "mlp.down_proj.weight"] = normal(HIDDEN, INTERMEDIATE)
        tensors |= {p + f"{n}_layernorm.weight": torch.ones(HIDDEN) for n in ("input", "post_attention")}
        write(f"model-{index:05d}.safetensors", tensors)
    write(
        "model-rest.safetensors",
        {
            "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN),
            "lm_head.weight": normal(VOCABULARY, HIDDEN),
            "model.norm.weight": torch.ones(HIDDEN),
        },
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def run(folder: Path, out: Path, mode: str) -> dict[str, object]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "tests/trainers/big_model.py", folder, out, mode, f"{VRAM}B", f"{RAM}B"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_trains_from_disk_within_its_budget(tmp_path, record_property):
    folder = tmp_path / "model"
    folder.mkdir()
    model_bytes = write_checkpoint(folder)
    assert model_bytes > 3 * (VRAM + RAM)
    placed = run(folder, tmp_path / "placed", "placed")
    record_property("model_bytes", model_bytes)
    record_property("rise_bytes", placed["rise_bytes"])
    limit = VRAM + RAM + SLACK
    assert placed["rise_bytes"] <= limit
    assert limit < model_bytes, "the limit could hide a model that is held whole"
    assert "disk" in placed["homes"]
    whole = run(folder, tmp_path / "whole", "whole")
    assert whole["rise_bytes"] > model_bytes
    assert whole["losses"] == placed["losses"]
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "placed" / name).read_bytes()
