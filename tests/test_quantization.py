"""What is planned of a quantized model from its configuration alone is what its real modules give."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig

import memplan
from benchmarks import truth
from memplan.analyze.inputs.prepare import prepare
from memplan.analyze.trace.trace import analyze
from memplan.cli import main
from memplan.errors import InputError, ModelError, PlanMismatchError
from memplan.hardware.profile import save
from memplan.model.quantization import NAMES, PackedLinear
from tests.support import quantized
from tests.support.training import CPU, assert_equal, batch_of, train

pytestmark = pytest.mark.filterwarnings("ignore")  # the quantizers' own, of versions and of float32 inputs

LORA = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules="all-linear")
BUDGETS = {"ram": "1GiB", "disk": 0, "hardware": CPU}
HIDDEN, INNER = 64, 176
SMALL = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4, "vocab_size": 96}


def llama(layers=2, **settings):
    return LlamaConfig(**SMALL, num_hidden_layers=layers, num_key_value_heads=2, **settings)


def planned(model, **options):
    return memplan.plan(model, (1, 16), **{"vram": "1GiB", "adapter": {"rank": 4}, **BUDGETS, **options})


def linear_bytes(bytes_of, layers=2):
    """The sum of ``bytes_of(inputs, outputs)`` over the linear layers but the head."""
    half = HIDDEN // 2  # keys and values have half the heads
    shapes = [(HIDDEN, HIDDEN)] * 2 + [(HIDDEN, half)] * 2 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
    return layers * sum(bytes_of(*shape) for shape in shapes)


def layers_bytes(plan):
    """Bytes of the layers' weights, norms apart."""
    return sum(t.size_bytes for b in plan.table.blocks if b.kind == "layer" for t in b.tensors if "norm" not in t.name)


REAL = [kind for kind in quantized.QUANTIZED if kind != "gptq-like"]
QUICK = ("nf4-nested", "torchao-int8")


@pytest.mark.quick("nf4-nested")
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.full) for kind in REAL]
)
def test_equals_the_real_module(kind):
    """Blocks to each tensor's bytes, accesses, every peak: the whole plan, but for what the models are called."""
    real = memplan.plan(quantized.make(kind), (2, 16), vram="1GiB", **BUDGETS)
    given = kind if kind in NAMES and kind != "torchao-int4" else quantized._options(kind)["quantization_config"]
    config = AutoConfig.from_pretrained(quantized.folder().name)
    config.use_cache = False  # as the real one has it
    plan = memplan.plan(config, (2, 16), vram="1GiB", adapter=LORA, dtype="fp32", quantization=given, **BUDGETS)
    assert plan.fingerprint == real.fingerprint
    assert plan.table == real.table
    assert plan.prediction == real.prediction
    assert plan.notes[1:] == real.notes
    assert plan.notes[0].startswith("Planned as its quantizer loads it, without PEFT's prepare_model_for_kbit_training")
    assert "without autocast: QLoRA as PEFT documents it needs more" in plan.notes[0]


def prepared_for_kbit(kind, gradient_checkpointing=True):
    """A base as it is loaded in bfloat16, prepared by PEFT, with an adapter."""
    options = quantized._options(kind)
    options["quantization_config"].bnb_4bit_compute_dtype = torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(quantized.folder().name, **options, dtype=torch.bfloat16)
    base.config.use_cache = False
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=gradient_checkpointing)
    return get_peft_model(base, copy.deepcopy(LORA)).train()


KBIT = [("nf4-nested", True), ("nf4-nested", False), ("int8", True), ("torchao-int8", True)]


@pytest.mark.quick("nf4-nested-True")
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [case if case[0] == "nf4-nested" else pytest.param(*case, marks=pytest.mark.full) for case in KBIT],
)
def test_prepared_for_kbit_training_equals_the_real_module(kind, checkpointing):
    """As PEFT itself does it: blocks, adapters and optimizer state to the byte, every access, every peak."""
    model = prepared_for_kbit(kind, checkpointing)
    with torch.autocast("cpu", torch.bfloat16):
        real = memplan.plan(model, (2, 16), vram="1GiB", optimizer="paged_adamw_8bit", **BUDGETS)
    config = AutoConfig.from_pretrained(quantized.folder().name)
    config.use_cache = False
    each = {"kbit": True, "autocast": "bf16", "optimizer": "paged_adamw_8bit", "dtype": "bf16", "quantization": kind}
    given = {"qlora": True} if (kind, checkpointing) == KBIT[0] else each
    checkpoints = {} if checkpointing else {"gradient_checkpointing": False}
    plan = memplan.plan(config, (2, 16), vram="1GiB", adapter=LORA, **given, **checkpoints, **BUDGETS)
    assert plan.fingerprint == real.fingerprint
    assert plan.table == real.table
    assert plan.prediction == real.prediction
    assert plan.workload == real.workload
    how = "casts nothing of a torchao base" if kind.startswith("torchao") else "what is not quantized is in float32"
    assert plan.notes == (
        f"Planned as PEFT's prepare_model_for_kbit_training leaves it ({how}), "
        f"{'with' if checkpointing else 'without'} gradient checkpointing, under autocast to bfloat16.",
        *real.notes,
    )


def test_parts_of_qlora():
    """Each part that is given stands; what the configuration is quantized by stays."""
    float32 = {"float32"}

    def dtypes(plan):
        return {t.dtype for b in plan.table.blocks for t in b.tensors if "norm" in t.name or "embed" in t.name}

    def state(plan):
        return next(row.size_bytes for row in plan.table.fixed if row.kind == "optimizer")

    whole = planned(llama(), qlora=True)
    assert dtypes(whole) == float32
    assert whole.workload.optimizer == "paged_adamw_8bit"
    assert whole.table.recomputable == ()
    assert whole.fingerprint == planned(llama(), quantization="nf4-nested", dtype="bf16", kbit=True).fingerprint
    assert dtypes(planned(llama(), qlora=True, kbit=False)) == {"bfloat16"}
    adam = planned(llama(), qlora=True, optimizer="adamw")
    assert (adam.workload.optimizer, dtypes(adam)) == ("adamw", float32)
    assert state(adam) > state(planned(llama(), qlora=True, optimizer="adamw_8bit"))
    assert planned(llama(), qlora=True, gradient_checkpointing=False).table.recomputable
    int8 = planned(llama(), qlora=True, quantization="int8")
    own = llama()
    own.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert planned(own, qlora=True).fingerprint == int8.fingerprint != whole.fingerprint


@pytest.mark.parametrize("options", [{"qlora": True}, {"kbit": True}, {"gradient_checkpointing": True}], ids=str)
def test_a_module_is_prepared_by_its_owner(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} was given with a .* that is built already"):
        memplan.plan(quantized.make("nf4"), (1, 16), vram="1GiB", **options, **BUDGETS)


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        *(
            pytest.param(architecture, kind, marks=pytest.mark.full)
            for architecture, kind in (
                ("qwen3", "nf4"),
                ("qwen3", "int8"),
                ("t5", "nf4"),
                ("t5", "int8"),
                ("gpt2", "nf4"),
                ("mixtral", "nf4"),
            )
        ),
    ],
)
def test_equals_the_real_module_of_other_families(architecture, kind):
    case = truth.Case(architecture=architecture, quantization=kind)
    prepared = prepare(
        truth.configuration(case), adapter=truth.adapter(case), dtype=case.dtype, attention="sdpa", quantization=kind
    )
    assert analyze(prepared.model, (2, 32)) == analyze(truth.made(case), (2, 32))


def test_a_plan_from_the_configuration_is_kept_to(tmp_path):
    whole, model = quantized.make("nf4-nested"), quantized.make("nf4-nested")
    options = {"adapter": LORA, "dtype": "fp32", "quantization": "nf4-nested", "loss": None}
    shape = tuple(batch_of("llama")["input_ids"].shape)
    with pytest.raises(memplan.DoesNotFitError) as refused:
        memplan.plan(quantized.folder().name, shape, vram=1, **options, **BUDGETS)
    vram = refused.value.least_vram_bytes
    plan = memplan.plan(quantized.folder().name, shape, vram=vram, **options, **BUDGETS)
    with memplan.attach(model, plan, checked=True, cache=tmp_path) as handle:
        streamed = train(model, "llama")
        assert handle.record.loads > 0
        assert handle.record.misses == 0
    assert_equal(train(whole, "llama"), streamed)
    with pytest.raises(PlanMismatchError):
        memplan.attach(quantized.make("int8"), plan, cache=tmp_path)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full) for kind in ("nf4-nested", "int8", "gptq")]
)
def test_a_few_layers_stand_for_all(kind):
    prepared = prepare(llama(layers=8), adapter={"rank": 2}, dtype="bf16", quantization=kind)
    assert prepared.short
    assert analyze(prepared.model, (1, 8), short=True) == analyze(prepared.model, (1, 8))


def test_the_configurations_own(tmp_path):
    """What a checkpoint's file says, as transformers writes it; modules that it leaves out stay as they are."""
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "gate_proj", "up_proj"])
    llama(quantization_config=own).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["load_in_8bit"] is True
    plan = planned(tmp_path, dtype="bf16")
    kinds = {
        t.name.split(".")[-2]: t.dtype
        for b in plan.table.blocks
        for t in b.tensors
        if b.kind == "layer" and t.name.endswith("proj.weight")
    }
    assert {name for name, kind in kinds.items() if kind == "bfloat16"} == {"gate_proj", "up_proj"}
    assert {name for name, kind in kinds.items() if kind == "int8"} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "down_proj",
    }  # fmt: skip
    assert plan.table == planned(llama(), dtype="bf16", quantization=own).table
    assert plan.table == planned(llama(), dtype="bf16", quantization=own.to_dict()).table
    with pytest.raises(InputError, match="by its configuration"):
        planned(tmp_path, quantization="nf4")
    plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="cannot load yet"):
        memplan.load(tmp_path, tmp_path / "plan.json", adapter={"rank": 4})


def test_the_dtype_that_products_are_computed_in():
    """A name alone computes in the model's dtype; a configuration says itself, transformers' default being float32."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    low, high = (planned(llama(), dtype="bf16", quantization=given) for given in ("nf4", four))
    assert low.table.blocks == high.table.blocks
    assert low.prediction.peaks.vram_bytes < high.prediction.peaks.vram_bytes


@pytest.mark.parametrize("group", [16, -1])
def test_gptq(group):
    plan = planned(llama(), quantization={"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": True})

    def bytes_of(inputs, outputs):
        groups = 1 if group == -1 else inputs // group
        return inputs * outputs // 2 + groups * outputs // 2 + 2 * groups * outputs + 4 * inputs

    assert layers_bytes(plan) == linear_bytes(bytes_of)
    assert any(note.startswith("GPTQ's kernels were not traced") for note in plan.notes)


def test_gptq_of_some_modules():
    config = {
        "quant_method": "gptq",
        "bits": 8,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]],
    }
    model = prepare(llama(), quantization=config).model
    taken = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert taken == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}


def test_awq():
    plan = planned(llama(), quantization={"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"})
    assert layers_bytes(plan) == linear_bytes(lambda i, o: i * o // 2 + i // 16 * o // 2 + 2 * (i // 16) * o)
    assert any(note.startswith("AWQ's kernels were not traced") for note in plan.notes)


def test_packed_int4_of_torchao():
    from torchao.quantization import Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    plan = planned(llama(), dtype="bf16", quantization=TorchAoConfig(Int4WeightOnlyConfig(group_size=32)))

    def bytes_of(inputs, outputs):  # one whose inputs are no whole number of groups is left as it is
        return inputs * outputs // 2 + 4 * (inputs // 32) * outputs if inputs % 32 == 0 else 2 * inputs * outputs

    assert layers_bytes(plan) == linear_bytes(bytes_of)
    assert any(note.startswith("torchao's int4 kernels were not traced") for note in plan.notes)


def test_a_dequantized_weight_is_counted_and_not_kept():
    """The activations are those of the model unquantized; a layer's pass holds one weight of it more, for a while."""
    quantized, plain = (
        analyze(prepare(llama(), adapter={"rank": 2}, dtype="bf16", quantization=given).model, (1, 8))
        for given in ("gptq", None)
    )

    def kept(graph):
        return sum(life.size_bytes for life in graph.lifetimes if life.kind == "activations")

    assert kept(quantized) == kept(plain)
    layer = [index for index, access in enumerate(plain.accesses) if access.module == "model.layers.0"]
    more = [quantized.accesses[i].transient_bytes - plain.accesses[i].transient_bytes for i in layer]
    assert all(0 < extra <= 2 * HIDDEN * INNER for extra in more)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ("nf5", InputError, "nf5.*give one of nf4, "),
        (4, InputError, "a int: give one of"),
        ({"quant_method": "gptq", "bits": 5}, InputError, "bits"),
        ({"quant_method": "bitsandbytes"}, InputError, "cannot be used"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, InputError, "cannot be used"),
        ({"quant_method": "hqq"}, ModelError, "hqq"),
        ({"bits": 4}, ModelError, "no method"),
    ],
)
def test_what_cannot_be_used(given, error, said):
    with pytest.raises(error, match=said):
        planned(llama(), quantization=given)
    if isinstance(given, dict):
        with pytest.raises(error, match=said):
            planned(llama(quantization_config=given))


def test_what_cannot_be_planned():
    with pytest.raises(InputError, match="built already"):
        memplan.plan(quantized.make("int8"), (1, 8), vram="1GiB", quantization="int8", **BUDGETS)
    with pytest.raises(InputError, match="cannot be measured"):
        prepare(llama(), quantization="awq", buffers=True)
    experts = MixtralConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(ModelError, match="several layers in one"):
        planned(experts, quantization="gptq")


@pytest.mark.parametrize(("library", "kinds"), [("bitsandbytes", ["nf4", "int8"]), ("torchao", ["torchao-int8"])])
def test_without_the_library(library, kinds, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    for kind in kinds:
        with pytest.raises(InputError, match=rf"needs {library}.*memplan\[quant\]"):
            planned(llama(), quantization=kind)
    with pytest.raises(InputError, match=rf"needs {library}"):
        planned(llama(), quantization={"quant_method": library, "load_in_4bit": library == "bitsandbytes"})


def test_the_command(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    save(CPU, tmp_path / "cpu.json")
    command = ["plan", str(tmp_path), "--vram", "1GiB", "--ram", "1GiB", "--hardware", str(tmp_path / "cpu.json")]
    assert main([*command, "--quantization", "nf4", "--out", str(tmp_path / "plan.json"), "--json"]) == 0
    plan = memplan.Plan.load(tmp_path / "plan.json")
    # Half a byte a value, and a float32 a block of 64.
    assert layers_bytes(plan) == linear_bytes(lambda i, o: i * o // 2 + 4 * i * o // 64)
    assert json.loads(capsys.readouterr().out)["fits"] is True
    assert main([*command, "--quantization", "nf5"]) == 2
    assert "nf5" in capsys.readouterr().err


@pytest.mark.full
def test_seventy_billion_parameters():
    plan = memplan.plan(
        "llama-3.1-70b", (1, 512), vram="24GiB", ram="64GiB", adapter={"rank": 16}, dtype="bf16", hardware="rtx-4090",
        quantization="nf4-nested",
    )  # fmt: skip
    hidden, inner, vocabulary, layers = 8192, 28672, 128256, 80
    linear = layers * (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * inner)
    rest = 2 * (2 * vocabulary * hidden + (2 * layers + 1) * hidden)
    frozen = sum(block.size_bytes for block in plan.table.blocks)
    assert frozen == linear // 2 + linear // 64 + 4 * linear // 64 // 256 + rest


def test_nothing_of_the_process_is_left_on_meta():
    from bitsandbytes import functional

    default = torch.get_default_dtype()
    planned(llama(), dtype="bf16", quantization="nf4-nested")
    assert functional.name2qmap["dynamic"].device.type == "cpu"
    assert torch.get_default_dtype() is default
