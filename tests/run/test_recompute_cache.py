"""Layers that are recomputed under a key-value cache: it is written to as ever, and read as it was."""

from __future__ import annotations

import gc

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration
from transformers.cache_utils import DynamicLayer

import memplan
from memplan.hooks.recompute import wrap
from tests.support.training import CPU

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


@pytest.mark.quick("llama", "prefix")
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


def hybrid(kind):
    """Layers that keep a state which is written to in place."""
    from transformers import Lfm2Config, Lfm2ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(5)
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": True, **TEXT,
    }  # fmt: skip
    if kind == "lfm2":
        return Lfm2ForCausalLM(Lfm2Config(full_attn_idxs=[1, 3], block_auto_adjust_ff_dim=False, **shape))
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            mlp_only_layers=[0, 1, 2, 3],
            **shape,
        )
    )


def recomputed(model):
    layers = model.get_base_model().model.layers
    return [wrap(layer) for layer in layers]


@pytest.mark.parametrize("kind", ["lfm2", "qwen3-next", "static"])
def test_a_state_that_is_written_to_in_place(kind):
    results = []
    for again in (False, True):
        base = make("llama")[0].unload() if kind == "static" else hybrid(kind)
        torch.manual_seed(4)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()
        if again:
            recomputed(model)
        ids = torch.arange(18).view(2, 9) + 3
        more = {"past_key_values": StaticCache(base.config, max_cache_len=16)} if kind == "static" else {}
        loss = model(input_ids=ids, labels=ids, **more).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_forward_without_a_backward_leaves_nothing():
    model, batch = make("llama")
    recomputed(model)
    for _ in range(3):
        model(**batch)
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is DynamicLayer]


def test_a_layer_that_runs_again_is_given_a_cache_of_as_many_layers():
    """A compiled one would be compiled anew for another."""
    model, batch = make("llama")
    layers = model.base_model.model.model.layers
    seen = [[] for _ in layers]
    for layer, of in zip(layers, seen, strict=True):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, of=of: of.append(
                [item.is_initialized for item in kwargs["past_key_values"].layers]
            ),
            with_kwargs=True,
        )
    undo = [wrap(layer) for layer in layers]
    model(**batch).loss.backward()
    assert all(len(of) == 1 for of in seen)  # hooks are outside
    for layer, of in zip(layers, seen, strict=True):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, of=of: of.append(
                [item.is_initialized for item in kwargs["past_key_values"].layers]
            ),
            with_kwargs=True,
        )
        of.clear()
    model(**batch).loss.backward()
    for of in seen:
        assert len({tuple(state) for state in of}) == 1
        assert len(of) == 3
    for end in undo:
        end()


class Sparse:
    """A cache that holds a state for some layers alone, written to in place: places are not layers' numbers."""

    def __init__(self):
        self.layers = [State()]

    def get_seq_length(self):
        return 0

    def update(self):
        raise NotImplementedError


class State:
    def __init__(self):
        self.states = {0: torch.zeros(3)}


class Counting(torch.nn.Module):
    layer_idx = 5

    def forward(self, x, cache):
        state = cache.layers[0].states[0]
        state += 1
        return x * state.sum()


def test_a_cache_whose_places_are_not_the_layers_numbers_is_copied_whole():
    layer, cache, x = Counting(), Sparse(), torch.ones(3, requires_grad=True)
    wrap(layer)
    layer(x, cache).sum().backward()
    assert cache.layers[0].states[0].tolist() == [1, 1, 1]
    assert x.grad.tolist() == [3, 3, 3]
