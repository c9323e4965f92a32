"""Small configurations to ask about."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig


def config_of(kind):
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=256, vocab_size=128)
    return LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=6, num_attention_heads=4, vocab_size=256,
        tie_word_embeddings=False,
    )  # fmt: skip
