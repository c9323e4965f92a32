"""A small Llama in several shards."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def save_small_llama(folder: Path) -> list[Path]:
    """Save it in a folder, and return its shards."""
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, dtype="float32", use_cache=False, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    return shards
