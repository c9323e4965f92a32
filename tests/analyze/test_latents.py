"""Models of diffusers by sizes in pixels: what a pipeline calls them with, as plans and as training."""

from __future__ import annotations

import json
from itertools import chain

import diffusers
import pytest
import torch

import memplan
from memplan.analyze.inputs.batch import batch_for
from memplan.analyze.trace.trace import analyze
from memplan.cli import main
from memplan.errors import InputError
from memplan.model.meta_model import from_configuration
from tests.support import diffusion_types, other_types
from tests.support.diffusion_types import NAMES, ROWS, settings_of
from tests.support.training import CPU

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINED = ("FluxTransformer2DModel", "WanTransformer3DModel", "UNet2DConditionModel")
OPTIONAL = {"encoder_attention_mask"}
"""Pipelines of some give it, of others not."""


def sizes_of(name):
    frames = {"frames": 5} if "3D" in name or "Video" in name else {}
    return {"batch": ROWS, "height": 64, "width": 64, "seq": 6, **frames}


def built(name):
    torch.manual_seed(0)
    return getattr(diffusers, name)(**settings_of(name))


@pytest.mark.quick(*TRAINED, "QwenImageTransformer2DModel", "ZImageTransformer2DModel")
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_takes_what_sizes_make(name):
    model = built(name)
    call = batch_for(model, sizes_of(name)).calls[0].kwargs
    assert call.keys() - OPTIONAL == diffusion_types.batch_of(name).keys() - OPTIONAL
    with torch.no_grad():
        model(**call)


@pytest.mark.quick("FluxTransformer2DModel")
@pytest.mark.parametrize("name", TRAINED)
def test_training_under_a_plan_of_sizes_is_bit_identical(name):
    def step(model):
        torch.manual_seed(5)
        call = batch_for(model, sizes_of(name)).changed(
            lambda tensor: torch.randn_like(tensor) if tensor.dtype.is_floating_point else tensor
        )
        loss = other_types.loss_of(model(**call.calls[0].kwargs))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model = other_types.adapted(built(name))
    expected = step(model)
    model.zero_grad()
    layers = [block.name for block in analyze(model, sizes_of(name), loss=other_types.loss_of).blocks if block.stack]
    assert len(layers) >= 3
    plan = memplan.plan(
        model, sizes_of(name), loss=other_types.loss_of, pins=dict.fromkeys(layers, "host"), vram="1GiB", ram="1GiB",
        hardware=CPU, gains=False,
    )  # fmt: skip
    with memplan.attach(model, plan):
        found = step(model)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.quick("downloaded in part")
@pytest.mark.parametrize("index", [True, False], ids=["pipeline", "downloaded in part"])
def test_a_pipeline_s_directory_on_the_command_line(index, tmp_path, capsys):
    part = tmp_path / "flux" / "transformer"
    built("FluxTransformer2DModel").save_config(part)
    if index:
        (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    out = tmp_path / "plan.json"
    given = ["plan", str(part.parent), "--vram", "1GiB", "--ram", "1GiB", "--gpu", "rtx-4090", "--height", "256"]
    assert main([*given, "--width", "128", "--quantization", "nf4", "--out", str(out)]) == 0
    plan = memplan.Plan.load(out)
    assert plan.model == "flux"
    assert plan.workload.batch["hidden_states"] == (1, 16 * 8, 8)
    kinds = {tensor.dtype for block in plan.table.blocks for tensor in chain(block.tensors)}
    assert "uint8" in kinds
    capsys.readouterr()
    assert main([*given, "--frames", "9"]) == 2
    assert "makes images: leave the frames out" in capsys.readouterr().err


def test_the_autoencoder_beside_says_how_much_smaller_latents_are(tmp_path):
    name = "WanTransformer3DModel"
    built(name).save_config(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scale_factor_spatial": 16, "scale_factor_temporal": 2}))
    model = from_configuration(tmp_path / "transformer", None, None).model
    shapes = batch_for(model, {"batch": 1, "height": 64, "width": 96, "frames": 9}).shapes()
    assert shapes["hidden_states"] == (1, 4, 5, 4, 6)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("FluxTransformer2DModel", {"height": 250}, "takes multiples of 16: give 240 or 256"),
        ("FluxTransformer2DModel", {"frames": 5}, "makes images"),
        ("UNet2DConditionModel", {"width": 0}, "at least 1"),
    ],
)
def test_sizes_that_cannot_be(name, sizes, message):
    with pytest.raises(InputError, match=message):
        batch_for(built(name), {"batch": 1, **sizes})


def test_what_follows_from_no_size_is_named():
    model = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=4
    )
    with pytest.raises(InputError, match="takes proj_embedding besides"):
        batch_for(model, (1,))


def test_sizes_are_for_models_of_diffusers():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(InputError, match="height were given, but LlamaForCausalLM is no model of diffusers"):
        memplan.plan(config, {"batch": 1, "height": 64}, adapter={"rank": 2}, hardware=CPU, vram="1GiB", ram="1GiB")
