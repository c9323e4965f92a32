"""Models by name: the table, names on the hub, and what is neither."""

from __future__ import annotations

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

import memplan
from memplan.errors import InputError, MemplanError
from memplan.model import models
from memplan.model.meta_model import from_configuration
from tests.support.training import CPU

UNTIED_ON_THE_HUB = {"t0-3b", "flan-t5-xl", "flan-t5-xxl", "mt0-xxl"}
"""Their checkpoints hold a head apart, which transformers' T5 ties from 5.0 on whatever the configuration says."""


QUICK = ("llama-3.1-8b", "mixtral-8x7b", "qwen3-30b-a3b", "gemma-2-9b", "phi-4", "bloomz-7b1", "mt0-xxl", "flux.1-dev")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in models.table()]
)
def test_parameters_are_those_of_the_checkpoint(name):
    """Two sources agree: the shapes of config.json, and the number on the model's card."""
    known = models.table()[name]
    settings = dict(known.config)
    if kind := settings.pop("_class_name", None):
        with init_empty_weights():
            model = getattr(diffusers, kind).from_config(settings)
    else:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        kind = AutoModelForImageTextToText if "vision_config" in settings else kind
        if name == "mistral-small-3.1-24b":
            config.tie_word_embeddings = False  # as its checkpoint holds them
        with torch.device("meta"):
            model = kind.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    if name in UNTIED_ON_THE_HUB:
        count += config.vocab_size * config.d_model
    assert count == known.parameters


def test_found_by_either_name():
    known = models.find("llama-3.1-8b")
    assert known == models.find("meta-llama/Llama-3.1-8B") == models.find("LLAMA-3.1-8B")
    assert models.find("llama-9") is None
    assert from_configuration("Qwen/Qwen3-0.6B", "bf16", None).name == "qwen3-0.6b"
    assert from_configuration("stabilityai/stable-diffusion-xl-base-1.0", "bf16", None).name == "sdxl"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3.1-9b", "near it: llama-3.1-8b"),
        ("nothing-like-it-at-all", "neither a directory with a config.json nor a model that memplan knows"),
        ("someone/a-model", "the configuration of someone/a-model could not be fetched from the Hub"),
        ("../elsewhere", "neither a directory"),
        ("a/b/c", "neither a directory"),
    ],
)
def test_what_there_is_not(name, message):
    with pytest.raises(InputError, match=message):
        memplan.plan(name, (1, 8), hardware=CPU, adapter={"rank": 2})


def test_the_hubs_cache_is_enough(tmp_path, monkeypatch):
    """A configuration that was fetched before is read without a network."""
    from huggingface_hub import constants

    folder = tmp_path / "models--someone--small"
    snapshot = folder / "snapshots" / "0123"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    AutoConfig.for_model("llama", **small).save_pretrained(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    plan = memplan.plan(
        "someone/small", (1, 8), adapter={"rank": 2}, vram="1GiB", ram="1GiB", hardware=CPU, dtype="fp32"
    )
    assert plan.model == "small"
    assert sum(block.kind == "layer" for block in plan.table.blocks) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "--seq", "2048"], "knows 1024 positions"),
        (["x" * 300], "neither a directory"),
        (["llama-3.1-8b", "--batch", "0"], "0 is not in the range"),
        (["llama-3.1-8b", "--optimizer", "adamwise"], "the optimizer 'adamwise' is not known"),
        (["llama-3.1-8b", "--hardware", "rtx-5099"], "there is no hardware profile named 'rtx-5099'"),
        (["llama-3.1-8b", "--dtype", "int3"], "the dtype was given as 'int3'"),
    ],
)
def test_bad_input_on_the_command_line(arguments, message, capsys, tmp_path):
    from memplan.cli import main
    from memplan.hardware.profile import save

    save(CPU, tmp_path / "cpu.json")
    hardware = [] if "--hardware" in arguments else ["--hardware", str(tmp_path / "cpu.json")]
    assert main(["plan", *arguments, *hardware]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": -64},
        {"num_attention_heads": 0},
        {"vocab_size": 10**18, "hidden_size": 10**9},
        {"hidden_size": "x"},
    ],
    ids=str,
)
def test_absurd_sizes(wrong, tmp_path):
    import json

    small = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **small, **wrong}))
    with pytest.raises(MemplanError):
        memplan.plan(tmp_path, (1, 8), adapter={"rank": 2}, vram="1GiB", ram="1GiB", hardware=CPU)


def test_a_head_that_transformers_ties_is_told():
    (note,) = from_configuration("t0-3b", "bfloat16", None).notes
    assert note.startswith("Its configuration parts head and embedding")
    assert note.endswith("count 125.5 MiB more.")
    assert from_configuration("llama-3.2-1b", "bfloat16", None).notes == ()


def test_weights_that_no_access_reads_are_told():
    """Text alone for a model of images and text."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28
        ),
        image_token_index=3,
    )
    plan = memplan.plan(config, (1, 8), adapter={"rank": 2}, vram="1GiB", ram="1GiB", hardware=CPU)
    assert any("are never read with this batch" in note and "vision" in note for note in plan.notes)
