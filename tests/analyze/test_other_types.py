"""Model types that are no causal language models, small: the predicted peak of a pass against a count of what is alive.

The count is of a pass after the trace: the model must be as it was.
"""

from __future__ import annotations

import gc
import json

import pytest
import torch
from transformers import ResNetConfig, RobertaConfig, ViTConfig, Wav2Vec2Config, WhisperConfig

import memplan
from memplan.analyze.inputs.batch import batch_for
from memplan.analyze.trace.trace import analyze
from memplan.cli import main
from memplan.errors import InputError, ModelError
from memplan.model.meta_model import from_configuration
from tests.analyze.steps import count_pass
from tests.analyze.test_memory import live_bytes
from tests.support import diffusion_types, other_types
from tests.support.other_types import KINDS, NOT_BUILT, config_of, loss_of, make
from tests.support.training import CPU

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, of kernels and of names that go away

WITHIN = 0.03
QUICK = (
    "masked/bert", "image/vit", "image/resnet", "ctc/wav2vec2", "image-text/llava",
    "diffusion/PixArtTransformer2DModel",
)  # fmt: skip


def error_of(kind):
    """Return how much more is predicted than is counted, relative, weights included."""
    model, batch = make(kind)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    predicted = max(live_bytes(analyze(model, batch, loss=loss_of)))
    return (weights + predicted) / (weights + count_pass(model, batch, loss_of)) - 1


def failure_of(kind):
    """Return how a library fails to build or run a kind."""
    try:
        model, batch = make(kind)
        loss_of(model(**batch)).backward()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return "it can be built and run now"


@pytest.mark.quick("masked/bert")
@pytest.mark.parametrize("kind", QUICK)
def test_some(kind):
    assert abs(error_of(kind)) <= WITHIN


@pytest.mark.full
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("group", sorted({kind.partition("/")[0] for kind in KINDS}))
def test_all(group, record_property):
    """What cannot be built, or run, is listed with its error, and must still fail so: else it belongs to the others."""
    errors, wrong = {}, {}
    for kind in (kind for kind in KINDS if kind.startswith(group + "/")):
        if kind in NOT_BUILT:
            if not (failed := failure_of(kind)).startswith(NOT_BUILT[kind][:60]):
                wrong[kind] = failed
            continue
        try:
            errors[kind] = error_of(kind)
        except Exception as error:
            wrong[kind] = f"{type(error).__name__}: {error}"
        gc.collect()
    record_property("within 3%", sum(abs(error) <= WITHIN for error in errors.values()))
    record_property("exact to 0.1%", sum(abs(error) <= 0.001 for error in errors.values()))
    further = {kind: round(error, 4) for kind, error in errors.items() if abs(error) > WITHIN}
    assert not wrong
    assert not further


# ---- from a configuration
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "named", "made", "batch", "shapes"),
    [
        ("image/vit", None, "ViTForImageClassification", (3,), {"pixel_values": (3, 3, 64, 64), "labels": (3,)}),
        ("image/vit", "ViTModel", "ViTModel", (3,), {"pixel_values": (3, 3, 64, 64)}),
        ("masked/bert", None, "BertForMaskedLM", (2, 7), {"input_ids": (2, 7), "labels": (2, 7)}),
        ("masked/bert", "BertForSequenceClassification", None, (2,), {"input_ids": (2, 64), "labels": (2,)}),
        ("speech/whisper", None, "WhisperForConditionalGeneration", (2, 9), {"labels": (2, 9)}),
        ("ctc/wav2vec2", None, "Wav2Vec2ForCTC", (2, 4000), {"input_values": (2, 4000), "labels": (2, 4)}),
        ("image-text/llava", None, "LlavaForConditionalGeneration", (2, 7), {"input_ids": (2, 7)}),
    ],
)
def test_from_a_configuration(kind, named, made, batch, shapes):
    """The class that the configuration names, else the first that knows it; and the tensors that it reads."""
    config = config_of(*kind.split("/"))
    config.architectures = [named] if named else None
    model = from_configuration(config, None, None).model
    assert type(model).__name__ == (made or named)
    assert shapes.items() <= batch_for(model, batch).shapes().items()


def test_a_directory_of_images(tmp_path, capsys):
    config_of("image", "vit").save_pretrained(tmp_path)
    given = ["plan", str(tmp_path), "--batch", "8", "--vram", "1GiB", "--ram", "1GiB", "--hardware", "rtx-4090"]
    assert main([*given, "--out", str(tmp_path / "plan.json")]) == 0
    plan = memplan.Plan.load(tmp_path / "plan.json")
    assert plan.workload.batch == {"pixel_values": (8, 3, 64, 64), "labels": (8,)}
    capsys.readouterr()
    assert main([*given, "--seq", "5"]) == 2
    assert "takes images" in capsys.readouterr().err


@pytest.mark.quick("None")
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_a_directory_of_diffusers(tmp_path, dtype):
    name = "PixArtTransformer2DModel"
    model, batch = diffusion_types.make(name)
    model.save_config(tmp_path)
    if dtype is not None:
        batch = {key: value.bfloat16() if key.endswith("hidden_states") else value for key, value in batch.items()}
    plan = memplan.plan(tmp_path, batch, adapter={"rank": 2}, dtype=dtype, hardware=CPU, vram="1GiB", ram="1GiB")
    assert {block.name for block in plan.table.blocks} >= {f"transformer_blocks.{index}" for index in range(3)}
    by_sizes = memplan.plan(tmp_path, (2,), adapter={"rank": 2}, dtype=dtype, hardware=CPU, vram="1GiB", ram="1GiB")
    assert by_sizes.fingerprint == plan.fingerprint


@pytest.mark.parametrize("name", ["NoSuchModel", "logging", "DDPMScheduler", 3, "os.system"])
def test_a_directory_that_names_no_model_of_diffusers(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match="no model of this diffusers"):
        memplan.plan(tmp_path, (2,), hardware=CPU)


@pytest.mark.parametrize(
    ("config", "batch", "message"),
    [
        (ResNetConfig(architectures=["ResNetForImageClassification"]), (2,), "does not say of what size"),
        (ViTConfig(num_hidden_layers=1), (2, 224), r"takes images of the size.* give \(2,\)"),
        (ViTConfig(num_hidden_layers=1), (0,), "at least 1"),
        (ViTConfig(num_hidden_layers=1), {"pixel_values": torch.zeros(2, 3, 100, 100)}, "doesn't match model"),
        (Wav2Vec2Config(num_hidden_layers=1), (2,), r"give \(batch, samples\)"),
        (WhisperConfig(encoder_layers=1, decoder_layers=1), (1, 449), "knows 448 positions"),
        (RobertaConfig(num_hidden_layers=1, max_position_embeddings=514), (1, 513), "knows 512 positions"),
    ],
)
def test_what_no_batch_can_be(config, batch, message):
    with pytest.raises((InputError, ModelError), match=message):
        memplan.plan(config, batch, adapter={"rank": 2}, hardware=CPU, vram="8GiB", ram="8GiB")


def test_kinds_that_cannot_be_built_are_known():
    assert set(NOT_BUILT) <= set(KINDS)
    assert len(KINDS) - len(NOT_BUILT) >= other_types.LEAST
