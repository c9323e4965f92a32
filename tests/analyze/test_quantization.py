"""A quantized base from its configuration is what is loaded: every tensor's bytes, and the peak of a pass."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    TorchAoConfig,
)

import memplan
from memplan.analyze.adapters import prepare
from memplan.analyze.trace import analyze
from memplan.cli import main
from memplan.errors import InputError, ModelError
from memplan.quantization import NAMES, PackedLinear
from memplan.skeleton import with_adapter

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

SHAPE = (2, 16)
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 128}
SMALL = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2, **TOKENS,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_hidden_layers=2, attention_bias=True),
    "qwen3": Qwen3Config(**SMALL, num_hidden_layers=2, head_dim=16, tie_word_embeddings=True),
    "t5": T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=128, decoder_start_token_id=0),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS),
}
REAL = ("nf4", "nf4-nested", "fp4", "int8", "torchao-int8")
QUICK = {("llama", "nf4-nested"), ("llama", "int8"), ("qwen3", "fp4"), ("t5", "nf4"), ("llama", "torchao-int8")}
LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj", "q", "wo", "c_attn"]}


def real_configuration(name, compute):
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name[:3], bnb_4bit_use_double_quant=name.endswith("nested"),
        bnb_4bit_compute_dtype=compute,
    )  # fmt: skip


def loaded(config, name, folder, dtype):
    """The model with its adapter as transformers loads it from real files."""
    automatic = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    automatic.from_config(config, dtype=dtype).save_pretrained(folder)
    base = automatic.from_pretrained(
        folder, quantization_config=real_configuration(name, dtype), dtype=dtype, device_map={"": "cpu"}
    )
    return with_adapter(base, LORA, real=True)


def weights_of(graph):
    return {t.name: (t.shape, t.dtype, t.size_bytes) for block in graph.blocks for t in block.tensors}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in QUICK else pytest.mark.full)
        for kind in CONFIGS
        for name in REAL
    ],
)
def test_it_is_what_is_loaded(tmp_path, kind, name, dtype):
    config = CONFIGS[kind]
    real = analyze(loaded(config, name, tmp_path, getattr(torch, dtype)), SHAPE)
    graph = analyze(prepare(config, adapter=LORA, dtype=dtype, quantization=name).model, SHAPE)
    assert weights_of(graph) == weights_of(real)
    assert graph.fixed == real.fixed
    assert graph.lifetimes == real.lifetimes
    assert [a.transient_bytes for a in graph.accesses] == [a.transient_bytes for a in real.accesses]
    assert sum(a.flops for a in graph.accesses) == sum(a.flops for a in real.accesses)


@pytest.mark.parametrize("name", ["nf4-nested", "torchao-int8"])
def test_a_configuration_may_say_it_itself(tmp_path, name):
    config = LlamaConfig(**SMALL, num_hidden_layers=2)
    plain = analyze(prepare(config, adapter=LORA, dtype="float32", quantization=name).model, SHAPE)
    config.quantization_config = real_configuration(name, torch.float32)
    config.save_pretrained(tmp_path)
    for given in (config, tmp_path):
        assert analyze(prepare(given, adapter=LORA, dtype="float32").model, SHAPE).blocks == plain.blocks
    with pytest.raises(InputError, match="quantized by its configuration"):
        prepare(tmp_path, adapter=LORA, quantization=name)


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True},
            {"qweight": 176 // 8 * 64 * 4, "scales": 11 * 64 * 2, "qzeros": 11 * 8 * 4, "g_idx": 176 * 4},
        ),
        (
            {"quant_method": "gptq", "bits": 3, "group_size": -1},
            {"qweight": 17 * 64 * 4, "scales": 64 * 2, "qzeros": 6 * 4, "g_idx": 176 * 4},
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True},
            {"qweight": 176 * 8 * 4, "scales": 11 * 64 * 2, "qzeros": 11 * 8 * 4},
        ),
    ],
    ids=["gptq", "gptq-3", "awq"],
)
def test_packed_formats_have_their_true_sizes(said, sizes):
    """By hand, of down_proj (176 to 64): words of 32 bits, 32/bits values in each, a scale a group."""
    config = LlamaConfig(**SMALL, num_hidden_layers=1)
    config.quantization_config = said
    plan = memplan.plan(config, SHAPE, adapter=LORA, dtype="fp16", hardware="t4", vram="4GiB", ram="1GiB")
    found = {
        tensor.name.rpartition(".")[2]: tensor.size_bytes
        for block in plan.table.blocks
        for tensor in block.tensors
        if "down_proj" in tensor.name
    }
    assert found == sizes
    assert any("were not traced" in note for note in plan.notes)
    layer = prepare(config, adapter=LORA, dtype="fp16").model.get_base_model().model.layers[0]
    assert isinstance(layer.mlp.up_proj, PackedLinear)
    # A product holds its whole dequantized weight for a moment, in forward and in backward.
    mine = [row for row in plan.table.accesses if row.module == "model.layers.0"]
    assert all(row.transient_bytes >= 176 * 64 * 2 for row in mine)


def test_a_70b_in_four_bits_is_planned(tmp_path):
    """70 billion parameters are traced by a few layers, quantized ones too: this takes seconds."""
    given = {"adapter": LORA, "quantization": "nf4", "dtype": "bf16", "hardware": "rtx-4090"}
    plan = memplan.plan("llama-3.1-70b", (1, 512), vram="24GiB", ram="64GiB", **given)
    # 68.5 billion parameters in the layers, half a byte and for 64 of each a float32 scale; 2.1 billion in bfloat16.
    wanted = 68_452_352_000 * (0.5 + 4 / 64) + 2 * 2 * 128256 * 8192
    assert sum(block.size_bytes for block in plan.table.blocks) == pytest.approx(wanted, rel=0.005)


@pytest.mark.parametrize("given", ["nf5", "", "NF4"])
def test_what_is_not_known(given):
    with pytest.raises(InputError, match=f"given as '{given}': give one of {', '.join(NAMES)}"):
        prepare(CONFIGS["llama"], adapter=LORA, quantization=given)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "mxfp4"}, "quantized by mxfp4, which memplan does not know"),
        ({"quant_method": "gptq", "bits": 5}, "bits 5 and group_size 128"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "'nf3'"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "float3"},
            "'float3': no dtype",
        ),
    ],
    ids=str,
)
def test_configurations_that_are_not_known(tmp_path, capsys, said, message):
    config = {"model_type": "llama", **SMALL, "num_hidden_layers": 1, "quantization_config": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        prepare(tmp_path, adapter=LORA)
    assert main(["plan", str(tmp_path), "--vram", "1GiB", "--hardware", "t4"]) == 2


def test_with_a_model_that_is_built():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(InputError, match="quantization was given with a model that is built already"):
        memplan.plan(model, SHAPE, adapter=LORA, quantization="nf4")
