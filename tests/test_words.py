"""What is asked for in words: near misses are taken or named, and a slip costs no import of torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

import memplan
from memplan.analyze.blocks.optimizers import optimizer_name
from memplan.cli import main
from memplan.errors import HardwareError, InputError
from memplan.hardware import cards
from memplan.hardware import profile as profiles
from memplan.hardware.budgets import beyond, require_vram
from memplan.model import models, quantization
from memplan.model.arguments import QUANTIZATIONS, TARGETS, understood
from memplan.model.meta_model import _builder
from memplan.units import GIB
from tests.support.training import CPU

ROOT = Path(__file__).parents[1]
PLAN = "plan gpt2 --hardware t4 --vram 1GiB "
SLIPS = {
    "plan llama-3.1-9b": "near it: llama-3.1-8b",
    "plan ./nowhere": "./nowhere is neither a directory with a config.json nor a model",
    "plan adapter": "it holds an adapter; give its base model",
    "plan pipeline": "it holds a pipeline of diffusers",
    "plan weights.gguf": "it is a file; give the directory",
    "plan broken": "config.json cannot be used",
    "plan listed": "config.json cannot be used: it holds no settings",
    "plan someone/no-such-model": "the configuration of someone/no-such-model could not be fetched from the Hub",
    PLAN + "--dtype bf61": "near it: bf16",
    PLAN + "--dtype int8": "the dtype was given as 'int8', which is a quantization: give --quantization int8",
    PLAN + "--lora-targets q_proj": "'q_proj', which no layer of a gpt2 model is called",
    PLAN + "--lora-targets c_attn,c_porj": "'c_porj', which no layer of a gpt2 model is called; near it: c_proj",
    PLAN + "--lora-targets .*attn": "target was given as '.*attn'",
    PLAN + "--quantization int5": "near it: int8",
    PLAN + "--quantization fp8": "give one of nf4, ",
    PLAN + "--optimizer adamwise": "near it: adamw",
    PLAN + "--attention flash-attention-2": "near it: flash_attention_2",
    PLAN + "--pin wte=gpu": "not BLOCK=TIER",
    PLAN + "--activations none": "is not one of 'keep'",
    PLAN + "--batch x": "is not a valid integer",
    PLAN + "--seq 0": "0 is not in the range",
    PLAN + "--max-step-s -1": "the longest step was given as -1.0 s",
    "plan gpt2 --vram 24": "did you mean 24GiB?",
    "plan gpt2 --ram 25769803776": "did you mean 25769803776B?",
    "plan gpt2 --vram 24Gb/s": "is not a size",
    "plan gpt2 --gpu rtx-4099": "near it: rtx-4090",
    "plan gpt2 --gpu A100": "may be a100-40gb or a100-80gb",
    "plan gpt2 --hardware nowhere.json": "cannot be read",
    "plan gpt2 --gpu 3060 --vram 36.9GiB": "rtx-3060-12gb has 12.00 GiB, of which about 10.68 GiB are usually free",
    PLAN + "--measure": "the hardware is t4, not this machine",
    "fit gpt2 --gpu t4 --dtype bf61": "near it: bf16",
    "fit gpt2 --gpu 3060 --vram 36GiB": "rtx-3060-12gb has 12.00 GiB",
    "frontier gpt2 --gpu 3060 --vram 36GiB": "rtx-3060-12gb has 12.00 GiB",
    "frontier gpt2 --gpu t4 --lora-targets zzz": "which no layer of a gpt2 model is called",
    "run --vram 24 -- true": "did you mean 24GiB?",
    "run --gpu 4099 -- true": "near it: rtx-4090",
    "run --gpu 3060 --vram 36.9GiB -- true": "rtx-3060-12gb has 12.00 GiB",
}
ONE_PROCESS = """
import contextlib, io, json, sys, time
from memplan.cli import main
found = {}
for slip in json.load(sys.stdin):
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(slip.split())
    heavy = sorted({"torch", "transformers", "peft"} & set(sys.modules))
    found[slip] = (code, " ".join(err.getvalue().split()), heavy, time.process_time() - began, out.getvalue())
json.dump(found, sys.stdout)
"""


def test_a_slip_costs_no_import_of_torch(tmp_path: Path) -> None:
    for folder, file, text in (
        ("adapter", "adapter_config.json", "{}"),
        ("pipeline", "model_index.json", "{}"),
        ("broken", "config.json", '{"model_type": "ll'),
        ("listed", "config.json", "[]"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    (tmp_path / "weights.gguf").touch()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MEMPLAN_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        cwd=tmp_path,
        env=variables,
        input=json.dumps(list(SLIPS)),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    for slip, says in SLIPS.items():
        code, err, heavy, spent_s, out = found[slip]
        assert (code, heavy, out) == (2, [], ""), slip
        assert says in err, slip
        assert spent_s < 1.5, slip  # well under a second, on a machine that does nothing else


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("LLAMA3.1-8b", "llama-3.1-8b"),
        ("https://huggingface.co/Qwen/Qwen3-8B", "qwen3-8b"),
        ("hf.co/Qwen/Qwen3-8B-Base/tree/main?x=1", "qwen3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("google/gemma-2-9b-it", "gemma-2-9b"),
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("qwen 3 8b", "qwen3-8b"),
        # Of the same shapes is nothing known of these.
        ("unsloth/Qwen3-8B", None),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", None),
        ("mistral-7b-v0.1", None),
        ("gpt2-medium", None),
        ("qwen3-4b-instruct-2507", None),
        ("", None),
    ],
)
def test_names_of_models(given: str, known: str | None) -> None:
    found = models.find(given)
    assert (found and found[0]) == known


def test_every_model_is_found_by_its_own_names_alone() -> None:
    for name, model in models.table().items():
        for given in (name, model.hub, name.upper(), f"https://huggingface.co/{model.hub}", f"{name}-Instruct"):
            if name != "mixtral-8x22b" or "-Instruct" not in given:
                found = models.find(given)
                assert found is not None
                assert found[0] == name


def test_a_near_miss_is_told() -> None:
    asked = understood("Qwen/Qwen3-0.6B-Base", dtype="BF16", quantization="none")
    assert asked == (
        "qwen3-0.6b",
        "bfloat16",
        None,
        ("Qwen/Qwen3-0.6B-Base is planned as Qwen/Qwen3-0.6B: the same shapes.",),
    )
    assert understood("https://huggingface.co/Qwen/Qwen3-0.6B").notes == ()
    plan = memplan.plan(
        "smollm2-135m-instruct", (1, 8), adapter={"rank": 2}, dtype="half", vram="2GiB", ram="2GiB", hardware=CPU
    )
    assert plan.model == "smollm2-135m"
    assert plan.notes[0] == "smollm2-135m-instruct is planned as HuggingFaceTB/SmolLM2-135M: the same shapes."


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("4bit", "nf4"),
        ("8-bit", "int8"),
        ("NF4", "nf4"),
        ("load_in_4bit", "nf4"),
        ("nf4_nested", "nf4-nested"),
        ("none", None),
    ],
)
def test_names_of_quantizations(given: str, known: str | None) -> None:
    assert understood(nn.Linear(1, 1), quantization=given).quantization == known


def test_none_is_not_what_a_quantized_model_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(InputError, match="is quantized by its configuration"):
        understood(tmp_path, quantization="none")
    config = AutoConfig.for_model("llama", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="the model is quantized by its configuration"):
        understood(config, quantization="none")


def test_the_names_of_quantizations_are_those_that_are_built() -> None:
    built = (*quantization._BITSANDBYTES, "int8", *quantization._TORCHAO, *quantization._PACKED)
    assert sorted(QUANTIZATIONS) == sorted(built)


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_a_library_that_is_missing_is_named(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    name = "nf4" if library == "bitsandbytes" else "torchao-int8"
    with pytest.raises(InputError, match=f"the quantization needs {library}, which is not installed"):
        understood("gpt2", quantization=name)


def test_names_of_optimizers() -> None:
    assert [optimizer_name(name) for name in ("AdamW", "adamw-torch", "PagedAdamW_8bit", "SGD")] == [
        "adamw", "adamw_torch", "paged_adamw_8bit", "sgd",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "known"),
    [
        ("4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("rtx 4090 24GB", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("3060", "rtx-3060-12gb"), ("RTX 3060 12GB", "rtx-3060-12gb"),
        ("A100-80G", "a100-80gb"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla T4", "t4"), ("NVIDIA RTX A6000", "rtx-a6000"), ("4060 Ti 16GB", "rtx-4060-ti-16gb"),
        # Other cards.
        ("4080 super", "rtx-4080-super"), ("3080 ti", None), ("3060 8gb", None), ("4060", "rtx-4060"),
        ("V100-SXM2-32GB", None),
        ("4090 48GB", None), ("L40", None), ("A10G", None), ("A100", None), ("", None), ("rtx", None),
    ],
)  # fmt: skip
def test_names_of_cards(given: str, known: str | None) -> None:
    if known is None:
        with pytest.raises(HardwareError):
            profiles.load(given)
    else:
        assert profiles.load(given).name == known


def test_every_profile_is_found_by_its_name_alone() -> None:
    for name in profiles.names():
        spoken = name.replace("-", " ").upper()
        size = cards.size_of(name)
        assert profiles.load(spoken) == profiles.load(name)
        assert profiles.load(f"NVIDIA {spoken}").name == name
        assert size in (None, round(profiles.load(name).device_bytes.value / 1e9))


def test_vram_above_the_cards_memory() -> None:
    """A datasheet's GB may be GiB on the card; above that nothing is."""
    profile = profiles.load("rtx-3060-12gb")
    require_vram(profile, 12 * GIB)
    with pytest.raises(InputError, match=r"^vram was given as 12\.00 GiB, but rtx-3060-12gb has 12\.00 GiB"):
        require_vram(profile, 12 * GIB + 1)
    for vram in (36 * GIB, "36.9GiB"):
        for ask in (memplan.plan, memplan.frontier):
            with pytest.raises(InputError, match=r"rtx-3060-12gb has 12\.00 GiB, of which about 10\.68 GiB"):
                ask("gpt2", (1, 8), vram=vram, hardware="3060", adapter={"rank": 2})
    mine = msgspec.structs.replace(profile, device_bytes=figure(12 * 10**9))  # as CUDA says it, to the byte
    with pytest.raises(InputError, match=r"has 11\.18 GiB"):
        require_vram(mine, 12 * GIB)


def figure(value: int) -> profiles.Figure:
    return profiles.Figure(value=value, kind="measured", source="a test", date="2026")


def test_budgets_beyond_the_machine_are_told() -> None:
    """A plan may be for another machine, which a newcomer may not have at hand; what it needs is right there too."""
    assert beyond(CPU, 16 * GIB, 16 * GIB) == ()
    of_vram, of_ram = beyond(CPU, 16 * GIB + 1, 16 * GIB + 1)
    assert of_vram.startswith("The vram is more than the 16.00 GiB of RAM of test-cpu, whose CPU is the compute device")
    assert of_ram == "The ram is more than the 16.00 GiB of test-cpu: it fits on another machine alone."
    card = profiles.load("rtx-3060-12gb")
    assert beyond(card, 12 * 10**9, 1 << 50) == ()  # of the machine around it nothing is known
    (all_of_it,) = beyond(card, 12 * GIB, 0)
    assert all_of_it.endswith("about 10.68 GiB are usually free.")
    plan = memplan.plan("gpt2", (1, 8), vram="64GiB", ram="1GiB", hardware=CPU, adapter={"rank": 2}, gains=False)
    assert of_vram in plan.notes


@pytest.mark.parametrize("kind", TARGETS)
def test_the_targets_are_what_the_models_have(kind: str) -> None:
    """Against transformers' own modules: linear ones, embeddings, and experts that are one parameter."""
    settings = next(dict(model.config) for model in models.table().values() if model.config["model_type"] == kind)
    settings |= {
        name: 1 for name in ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers") if name in settings
    }
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = _builder(transformers, config)(config, {})
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))
        or any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
    }
    assert there == set(TARGETS[kind]) - ({"wi"} if kind in ("t5", "mt5") else set())


def test_targets_that_only_others_have_are_told() -> None:
    """A list that is handed on from model to model: PEFT takes what it finds."""
    asked = understood("phi-4", adapter={"targets": ["q_proj", "qkv_proj"]})
    assert asked.notes == ("No layer of a phi3 model is called q_proj: PEFT puts the adapter on the others alone.",)
    assert understood("gpt2", adapter={"targets": ["h.0.attn.c_attn"]}).notes == ()
    assert understood("gpt2", adapter={"targets": ".*attn"}).notes == ()


def test_gpu_is_another_name_for_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "gpt2", "--seq", "8", "--vram", "2G", "--ram", "auto", "--json"]
    assert main([*arguments, "--gpu", "4090"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["hardware"] == "rtx-4090"
    assert out["budgets"]["vram_bytes"] == 2 * GIB
