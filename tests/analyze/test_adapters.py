"""A configuration, a directory or a module -> a model that can be traced; the user's own stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, CLIPVisionConfig, LlamaConfig, T5Config, ViTConfig

from memplan.analyze.inputs.prepare import describe, prepare
from memplan.analyze.trace.trace import analyze
from memplan.errors import InputError, ModelError
from tests.support import models

ADAPTER = {"rank": 4, "targets": "all-linear", "alpha": 8}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama(**changes):
    return LlamaConfig(**SMALL, **changes)


def test_a_configuration():
    prepared = prepare(llama(), adapter=ADAPTER, dtype="bf16", attention="eager")
    assert (prepared.name, prepared.folder) == ("LlamaForCausalLM", None)
    assert {p.device.type for p in prepared.model.parameters()} == {"meta"}
    assert {p.dtype for p in prepared.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert prepared.model.config._attn_implementation == "eager"
    assert describe(prepared.model) == "LoRA r=4 on all-linear"
    assert prepared.shapes((2, 8)) == {"input_ids": (2, 8), "attention_mask": (2, 8), "labels": (2, 8)}
    assert len(analyze(prepared.model, (2, 8)).blocks) == 5


@pytest.mark.parametrize("as_file", [True, False])
def test_a_directory(tmp_path, as_file):
    folder = tmp_path / "my-llama"
    llama(architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    prepared = prepare(folder / "config.json" if as_file else str(folder), adapter=ADAPTER)
    assert (prepared.name, prepared.folder) == ("my-llama", folder)
    assert next(prepared.model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0),
            "T5ForConditionalGeneration",
        ),
        (BertConfig(**SMALL, architectures=["BertForSequenceClassification"]), "BertForSequenceClassification"),
        (
            ViTConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
                architectures=["ViTForImageClassification"],
            ),
            "ViTForImageClassification",
        ),
    ],
)
def test_other_kinds_of_models(config, name):
    with models.quiet():
        prepared = prepare(config, adapter={"rank": 4})
    if name.startswith("Bert"):  # known as a causal model too; its architecture says what it is
        assert prepared.name in (name, "BertLMHeadModel")
    else:
        assert prepared.name == name
    batch = (2, 8) if not name.startswith("ViT") else {"pixel_values": torch.rand(2, 3, 16, 16)}
    graph = analyze(prepared.model, batch)
    assert len(graph.recomputable) >= 2


def test_a_module_gets_its_adapter_on_a_copy():
    model = models.Plain()
    model.requires_grad_(False)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    prepared = prepare(model, adapter=ADAPTER)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.device.type for p in prepared.model.parameters()} == {"meta"}
    assert prepared.name == "Plain"
    assert describe(prepared.model) == "LoRA r=4 on all-linear"


def test_ties_survive_the_copy():
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64, **ends))
    copied = prepare(model, adapter={"rank": 2, "targets": ["attn.c_proj"], "alpha": 2}).model.base_model.model
    assert copied.lm_head.weight is copied.transformer.wte.weight


def test_a_peft_configuration():
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    prepared = prepare(llama(), adapter=config)
    assert describe(prepared.model) == "LoRA r=2 on q_proj, v_proj"
    assert config.target_modules == {"q_proj", "v_proj"}


def test_a_model_with_its_trainables_is_taken_as_it_is():
    model, _ = models.llama()
    prepared = prepare(model)
    assert prepared.model is model
    assert describe(model) == "LoRA r=4 on all-linear"
    assert describe(models.Plain()) == ""


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (7, {}, "int"),
        ("no/such/folder", {}, "config.json"),
        (llama(), {"adapter": {"rank": 0}}, "rank"),
        (llama(), {"adapter": {"ranks": 2}}, "ranks"),
        (llama(), {"adapter": {"rank": 2, "targets": ["nothing"]}}, "nothing"),
        (llama(), {"adapter": "lora"}, "str"),
        (llama(), {"dtype": "int3"}, "int3"),
        (models.Plain(), {"dtype": "bf16"}, "built already"),
        (models.Plain(), {"quantization": "nf4"}, "built already"),
    ],
)
def test_what_cannot_be_used(model, options, said):
    with pytest.raises(InputError, match=said):
        prepare(model, **options)


def test_a_second_adapter():
    model, _ = models.llama()
    with pytest.raises(InputError, match="already"):
        prepare(model, adapter=ADAPTER)


def test_code_from_a_checkpoint_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}})
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="runs no code"):
        prepare(tmp_path)


def test_an_unknown_configuration():
    with pytest.raises(ModelError, match="architectures"):
        prepare(CLIPVisionConfig())


def test_a_plain_module_without_a_linear_layer():
    with pytest.raises(InputError, match="no linear layer"):
        prepare(nn.Sequential(nn.Conv1d(2, 2, 1)), adapter={"rank": 2})
