"""Configurations as repositories have them, small: planned is what their libraries build, with PEFT's adapter."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import memplan
from memplan.errors import InputError, ModelError
from tests.support.training import CPU

pytestmark = pytest.mark.filterwarnings("ignore")

_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_MXFP4 = {"quant_method": "mxfp4"}
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
_NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

SETTINGS = {
    "clip": {
        "architectures": ["CLIPModel"], "model_type": "clip", "text_config": {**_TEXT, "projection_dim": 16},
        "vision_config": _VISION,
    },
    "siglip": {
        "architectures": ["SiglipModel"], "model_type": "siglip", "text_config": _TEXT, "vision_config": _VISION,
    },
    "mistral3": {
        "model_type": "mistral3", "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
    },
    "llama4_text": {"model_type": "llama4_text", **_TEXT, **_EXPERTS, "intermediate_size_mlp": 48},
    "qwen3_moe": {"model_type": "qwen3_moe", **_TEXT, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 16},
    "falcon_h1": {"model_type": "falcon_h1", **_TEXT, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
                  "mamba_n_groups": 1, "mamba_d_state": 16},
    "gpt_oss": {"model_type": "gpt_oss", **_TEXT, **_EXPERTS, "quantization_config": _MXFP4},
    "qwen3-fp8": {"model_type": "qwen3", **_TEXT, "quantization_config": _FP8},
    "llama-compressed": {"model_type": "llama", **_TEXT, "quantization_config": _COMPRESSED},
    "llama-nvfp4": {"model_type": "llama", **_TEXT, "quantization_config": _NVFP4},
}  # fmt: skip
TARGETS = {
    "llama4_text": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "falcon_h1": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj"],
}
"""Where the default puts the adapter; else on all linear layers."""
RANK = 2


def counted(settings):
    """Return the parameters that transformers and PEFT make: the frozen ones and the adapter's."""
    plain = {name: value for name, value in settings.items() if name != "quantization_config"}
    config = AutoConfig.for_model(plain.pop("model_type"), **plain)
    kind = "mistral3" if "vision_config" in plain and "projection_dim" not in plain["text_config"] else "text"
    if config.model_type in ("clip", "siglip"):
        auto = AutoModel
    else:
        auto = AutoModelForImageTextToText if kind == "mistral3" else AutoModelForCausalLM
    if config.model_type == "mistral3":
        config.tie_word_embeddings = False  # as its checkpoint has both, from_pretrained keeps both
    with torch.device("meta"):
        model = auto.from_config(config)
        targets = TARGETS.get(config.model_type, "all-linear")
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(p.numel() for p in model.parameters()) - trained, trained


def planned(folder, **options):
    given = {"adapter": {"rank": RANK, "targets": "default"}, "vram": "1GiB", "ram": "1GiB", "hardware": CPU}
    plan = memplan.plan(folder, (2,) if options.pop("pairs", False) else (2, 16), **given, **options)
    adapters = next(fixed.size_bytes for fixed in plan.table.fixed if fixed.kind == "adapters")
    frozen = sum(torch.Size(tensor.shape).numel() for block in plan.table.blocks for tensor in block.tensors)
    return frozen, adapters // 4, plan


def saved(folder, name):
    (folder / "config.json").write_text(json.dumps(SETTINGS[name]))
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_parameters_are_those_that_the_libraries_make(name, tmp_path):
    folder = saved(tmp_path, name)
    options = {"quantization": "none"} if "quantization_config" in SETTINGS[name] else {}
    frozen, adapters, plan = planned(folder, dtype="fp32", pairs=name in ("clip", "siglip"), **options)
    assert (frozen, adapters) == counted(SETTINGS[name])
    assert bool(options) == any("dequantized to float32" in note for note in plan.notes)


@pytest.mark.parametrize("name", [name for name, given in SETTINGS.items() if "quantization_config" in given])
def test_a_repository_whose_weights_no_adapter_is_trained_on(name, tmp_path):
    with pytest.raises(ModelError, match="give --quantization none"):
        planned(saved(tmp_path, name))


def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch):
    from memplan.model import meta_model

    def build(config, options):
        raise ImportError("TimmWrapperModel requires the timm library but it was not found in your environment.")

    monkeypatch.setattr(meta_model, "_builder", lambda transformers, config: build)
    with pytest.raises(InputError, match="needs timm, which is not installed: pip install timm"):
        planned(saved(tmp_path, "llama4_text"))
