"""Layers that are recomputed under a key-value cache: it is written to as ever, and read as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import memplan
from tests.training import CPU

TEXT = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make(kind):
    torch.manual_seed(5)
    if kind == "t5":
        config = T5Config(
            d_model=64, d_ff=192, d_kv=16, num_heads=4, num_layers=4, decoder_start_token_id=0, **TEXT,
        )  # fmt: skip
        base, task = T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM"
    else:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, use_cache=True, **TEXT,
        )  # fmt: skip
        base, task = LlamaForCausalLM(config), "CAUSAL_LM"
    adapter = (
        PrefixTuningConfig(num_virtual_tokens=5, task_type=task)
        if kind == "prefix"
        else LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False, task_type=task)
    )
    model = get_peft_model(base, adapter).train()
    numbers = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 90, (2, length), generator=numbers) for length in (9, 11 if kind == "t5" else 9))
    return model, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", ["llama", "t5", "prefix"])
def test_the_same_as_whole(kind):
    results = []
    for planned in (False, True):
        model, batch = make(kind)
        if planned:
            plan = memplan.plan(model, batch, vram="6MiB", ram="64MiB", hardware=CPU, activations="recompute")
            assert any("recompute" in str(choice) for choice in plan.activations)
            memplan.attach(model, plan, checked=True)
        torch.manual_seed(3)
        output = model(**batch)
        output.loss.backward()
        cache = output.past_key_values
        cache = getattr(cache, "self_attention_cache", cache)
        kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        results.append((output.loss, *gradients, *kept))
    assert len(results[0]) == len(results[1]) > 4
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
