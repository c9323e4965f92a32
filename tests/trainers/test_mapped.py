"""Weights that are cast as they load: from a file of their own, which nobody else sees."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from memplan.run.memory.arena import is_placeholder
from memplan.trainers.loading import mapped_weights as mapped
from memplan.trainers.loading.hf_transformers import skeleton_of
from memplan.trainers.loading.mapped_weights import map_weights, release_mapped


@pytest.fixture
def cast(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    model = skeleton_of(LlamaForCausalLM, checkpoint, {"dtype": torch.bfloat16})
    map_weights(model, checkpoint)
    return model.requires_grad_(False)


def test_they_are_what_transformers_makes_of_them(cast, checkpoint, tmp_path):
    whole = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for ours, theirs in zip(cast.parameters(), whole.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert list(tmp_path.iterdir()) == []  # no name, so that nothing stays


def test_what_was_written_to_does_not_give_way(cast):
    with torch.no_grad():
        cast.lm_head.weight[-1, -1] = 1
    before = {name: parameter.clone() for name, parameter in cast.named_parameters()}
    undo = release_mapped(cast, torch.device("cpu"))
    assert [name for name, parameter in cast.named_parameters() if not is_placeholder(parameter)] == ["lm_head.weight"]
    undo()
    assert all(torch.equal(parameter, before[name]) for name, parameter in cast.named_parameters())


def test_another_tensor_in_its_place_does_not_either(cast, checkpoint):
    other = skeleton_of(LlamaForCausalLM, checkpoint, {"dtype": torch.bfloat16})
    map_weights(other, checkpoint)
    layers = cast.model.layers
    layers[0].mlp.up_proj.weight.data = layers[1].mlp.up_proj.weight.data
    release_mapped(cast, torch.device("cpu"))
    assert not is_placeholder(layers[0].mlp.up_proj.weight)
    assert is_placeholder(layers[1].mlp.up_proj.weight)


def test_without_room_they_are_in_ram(checkpoint, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = skeleton_of(LlamaForCausalLM, checkpoint, {"dtype": torch.bfloat16})
    map_weights(model, checkpoint)
    whole = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_what_is_fused_as_it_loads_takes_no_ram_either(monkeypatch, tmp_path):
    """Experts that transformers makes of many tensors lie in the file without a name."""
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path / "cache"))
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=96,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    whole = MixtralForCausalLM.from_pretrained(tmp_path / "model")
    model = skeleton_of(MixtralForCausalLM, tmp_path / "model", {})
    map_weights(model, tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    areas = mapped._file_areas()
    for name, parameter in model.named_parameters():
        begin, size = parameter.data_ptr(), parameter.numel() * parameter.element_size()
        assert any(area.begin <= begin and begin + size <= area.end for area in areas), name


def test_they_go_with_their_model(checkpoint, monkeypatch, tmp_path):
    def held():
        return [area for area in mapped._file_areas() if area.path.startswith(str(tmp_path))]

    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    model = skeleton_of(LlamaForCausalLM, checkpoint, {"dtype": torch.bfloat16})
    map_weights(model, checkpoint)
    assert held()
    del model
    gc.collect()
    assert not held()
