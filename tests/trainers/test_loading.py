"""``memplan.load``: the model that ``from_pretrained`` and PEFT would give, with each weight straight in its home."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    T5Config,
)

import memplan
from memplan.errors import CheckpointError, InputError, ModelError, PlanMismatchError, TransferError
from memplan.run.memory.disk import DiskReader
from tests.support.leftovers import started_since, threads
from tests.support.training import CPU, assert_equal, batch_of, train

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "vocab_size": 96, "max_position_embeddings": 64, "use_cache": False}
CONFIGS = {
    "llama": LlamaConfig(intermediate_size=64, vocab_size=96, use_cache=False, tie_word_embeddings=False, **SMALL),
    "tied": LlamaConfig(intermediate_size=64, vocab_size=96, use_cache=False, tie_word_embeddings=True, **SMALL),
    "gpt2": GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=96,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "t5": T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=96,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        use_cache=False,
    ),
    "mixtral": MixtralConfig(intermediate_size=48, num_local_experts=4, **SMALL, **EXPERTS),
    "qwen2-moe": Qwen2MoeConfig(
        intermediate_size=64,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_experts=4,
        **SMALL,
        **EXPERTS,
    ),
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}


def class_of(kind):
    return AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM


def lora(kind, **more):
    targets = TARGETS.get(kind, ["q_proj", "v_proj"])
    return LoraConfig(**{"r": 4, "target_modules": targets, "fan_in_fan_out": kind == "gpt2", **more})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints as transformers writes them, sharded: MoE models' experts one by one under their old names."""
    made = {}

    def of(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            torch.manual_seed(5)
            model = class_of(kind).from_config(CONFIGS[kind]).to(dtype)
            folder = made[kind, dtype] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder, max_shard_size="40KB")
            assert len(list(folder.glob("*.safetensors"))) > 1
        return made[kind, dtype]

    return of


def whole(kind, folder, dtype=torch.float32, **more):
    torch.manual_seed(1)
    model = class_of(kind).from_pretrained(folder, dtype=dtype)
    for parameter in model.parameters():  # torch aligns its own allocations, safetensors' views may lie anywhere
        parameter.data = parameter.data.clone()
    model = get_peft_model(model, lora(kind, **more))
    return model.train()


def plan_of(kind, folder, share=0.3, dtype=None, disk=None, adapter=None, ram="1GiB", pins=None):
    given = {"adapter": adapter or lora(kind), "hardware": CPU, "ram": ram, "disk": disk, "dtype": dtype, "pins": pins}
    shape = batch_of(kind)
    with pytest.raises(memplan.DoesNotFitError) as refused:
        memplan.plan(folder, shape, vram=1, **given)
    least = refused.value.least_vram_bytes
    most = memplan.plan(folder, shape, vram="1GiB", **given).prediction.peaks.vram_bytes
    return memplan.plan(folder, shape, vram=int(least + share * (most - least)), **given)


def loaded(kind, folder, plan, **more):
    torch.manual_seed(1)
    adapter = more.pop("adapter", None) or lora(kind)
    return memplan.load(folder, plan, adapter=adapter, checked=True, **more).train()


@pytest.mark.parametrize(
    "kind", [kind if kind == "llama" else pytest.param(kind, marks=pytest.mark.full) for kind in CONFIGS]
)
def test_trains_as_from_pretrained(kind, checkpoints, tmp_path):
    folder = checkpoints(kind)
    plan = plan_of(kind, folder, disk="1GiB")
    assert {item.home for item in plan.items} >= {"device", "host"}
    model = loaded(kind, folder, plan, cache=tmp_path)
    assert_equal(train(whole(kind, folder), kind), train(model, kind))
    handle = memplan.handle_of(model)
    assert handle.record.loads > 0
    assert handle.record.misses == 0
    with memplan.materialise(model):  # every weight is from_pretrained's
        expected = dict(whole(kind, folder).named_parameters())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert torch.equal(parameter, expected[name]), name


@pytest.mark.quick("dtype0-llama")
@pytest.mark.parametrize(
    "kind", ["llama", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("tied", "mixtral"))]
)
@pytest.mark.parametrize("dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_casts(kind, dtype, checkpoints, tmp_path):
    """Blocks on the disk are packed then, since no file holds them as the model has them."""
    stored, wanted = dtype
    folder = checkpoints(kind, stored)
    plan = plan_of(kind, folder, dtype=wanted, disk="1GiB", pins={"layers.1": "disk"})
    assert {item.home for item in plan.items} >= {"device", "disk"}
    model = loaded(kind, folder, plan, cache=tmp_path)
    assert list((tmp_path / "blocks").glob("*.block"))
    assert_equal(train(whole(kind, folder, wanted), kind), train(model, kind))


def test_blocks_on_the_disk_are_the_checkpoints_own_files(checkpoints, tmp_path):
    folder = checkpoints("llama")
    plan = plan_of("llama", folder, pins={"layers.1": "disk", "layers.2": "disk"})
    model = loaded("llama", folder, plan, cache=tmp_path)
    assert not list(tmp_path.rglob("*.block"))
    assert_equal(train(whole("llama", folder), "llama"), train(model, "llama"))


def test_a_read_that_fails_in_a_load(checkpoints, monkeypatch):
    """The disk's error is heard, whichever block was on its way, and no thread is left."""
    folder = checkpoints("llama")
    plan, piece = plan_of("llama", folder), DiskReader._piece
    reads = sum(len(block.tensors) for block in plan.table.blocks if plan.home_of(block.id) != "disk")
    for at in range(0, reads, 3):
        calls, before = itertools.count(), threads()

        def failing(self, *given, at=at, calls=calls):
            if next(calls) == at:
                raise OSError(5, "Input/output error")
            piece(self, *given)

        with monkeypatch.context() as patch:
            patch.setattr(DiskReader, "_piece", failing)
            with pytest.raises(TransferError, match=r"the block .* could not be read: .*Input/output error"):
                loaded("llama", folder, plan)
        assert not started_since(before)


@pytest.mark.parametrize(
    "more", [pytest.param({"use_dora": True}, marks=pytest.mark.full), {"init_lora_weights": "pissa"}], ids=str
)
def test_adapters_that_begin_with_the_models_weights(more, checkpoints, tmp_path):
    folder = checkpoints("llama")
    adapter = lora("llama", **more)
    if "use_dora" not in more:  # it changes the base's weights, which are only ever read
        with pytest.raises(ModelError, match=r"has changed the weight model\.layers\.0\.self_attn\.q_proj\.weight"):
            loaded("llama", folder, plan_of("llama", folder), adapter=adapter)
        return
    plan = plan_of("llama", folder, adapter=adapter)
    assert_equal(
        train(whole("llama", folder, **more), "llama"), train(loaded("llama", folder, plan, adapter=adapter), "llama")
    )
    other = checkpoints("llama", torch.bfloat16)
    plan = plan_of("llama", other, adapter=adapter, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"lora_magnitude_vector.* was made of weights that were not there yet"):
        loaded("llama", other, plan, adapter=adapter)


@pytest.mark.quick("cast")
@pytest.mark.parametrize("how", ["cast", "copied", "replaced", "added"])
def test_nothing_is_made_of_a_placeholder(how, checkpoints, monkeypatch):
    """Whatever has become of it, it is not taken for weights: in a frozen weight or a buffer it would be NaN unseen."""
    folder = checkpoints("llama")
    plan = plan_of("llama", folder, dtype=torch.bfloat16)  # cast as it loads: not mapped while the adapter is added
    inject = LoraModel.inject_adapter

    def changing(self, model, *args, **more):
        inject(self, model, *args, **more)
        weight = model.model.layers[1].mlp.up_proj.weight
        if how == "cast":
            model.to(torch.float32).to(torch.bfloat16)
        elif how == "copied":
            weight.data = weight.data.clone()
        elif how == "replaced":
            weight.data = weight.data - 1
        else:
            model.register_buffer("total", weight.sum())

    monkeypatch.setattr(LoraModel, "inject_adapter", changing)
    made = (
        "total was made of weights" if how == "added" else r"was replaced, cast or copied before its weights were there"
    )
    with pytest.raises(ModelError, match=made):
        loaded("llama", folder, plan)


def test_a_saved_adapter_goes_on(checkpoints, tmp_path):
    folder = checkpoints("llama")
    plan = plan_of("llama", folder)
    one = whole("llama", folder)
    train(one, "llama")
    one.save_pretrained(tmp_path)
    model = memplan.load(folder, plan, adapter=tmp_path).train()
    expected = {name: p for name, p in one.named_parameters() if p.requires_grad}
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert_equal(train(one, "llama"), train(model, "llama"))
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        memplan.load(folder, plan, adapter=tmp_path / "nothing")


def test_what_is_saved_and_trained_besides(checkpoints):
    folder = checkpoints("llama")
    adapter = lora("llama", modules_to_save=["lm_head"])
    plan = plan_of("llama", folder, adapter=adapter)
    one, other = whole("llama", folder, modules_to_save=["lm_head"]), loaded("llama", folder, plan, adapter=adapter)
    assert_equal(train(one, "llama"), train(other, "llama"))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("mixtral", torch.float32), pytest.param("llama", torch.bfloat16, marks=pytest.mark.full)]
)
def test_detached_it_is_whole_and_nothing_stays(kind, dtype, checkpoints, tmp_path, monkeypatch):
    """Mapped from the files, or from one without a name where it is converted or cast."""
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    folder = checkpoints(kind)
    model = loaded(kind, folder, plan_of(kind, folder, dtype=dtype))
    memplan.handle_of(model).detach()
    expected = dict(whole(kind, folder, dtype).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    assert not list(tmp_path.rglob("*"))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, whole(kind, folder, dtype).eval()(ids).logits)
    gone = weakref.ref(model)
    del model, parameter
    gc.collect()
    assert gone() is None


@pytest.mark.full
def test_the_bar_says_how_far_it_is(checkpoints, capsys):
    folder = checkpoints("llama")
    memplan.load(folder, plan_of("llama", folder), adapter=lora("llama"), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading" in err
    memplan.load(folder, plan_of("llama", folder), adapter=lora("llama"))
    assert capsys.readouterr() == ("", "")


def test_what_is_refused(checkpoints, tmp_path):
    folder = checkpoints("llama")
    plan = plan_of("llama", folder)
    with pytest.raises(InputError, match="was made with LoRA r=4 on q_proj, v_proj, and no adapter was given"):
        memplan.load(folder, plan)
    with pytest.raises(PlanMismatchError):
        memplan.load(folder, plan, adapter=lora("llama", r=8))
    with pytest.raises(PlanMismatchError):
        memplan.load(checkpoints("mixtral"), plan, adapter=lora("llama"))
    shutil.copytree(folder, tmp_path / "short")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = tmp_path / "short" / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight with shape \(63, 32\), its config\.json says \(64, 32\)"
    ):
        memplan.load(tmp_path / "short", plan, adapter=lora("llama"))
    del tensors[name]
    save_file(tensors or {"other": torch.ones(1)}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"promises the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        memplan.load(tmp_path / "short", plan, adapter=lora("llama"))


@pytest.mark.full
def test_experts_that_do_not_fit_together(checkpoints, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(checkpoints("mixtral"), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name in index["weight_map"] if "experts.2.w1" in name)
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformers cannot make .*experts.gate_up_proj"):
        memplan.load(folder, plan_of("mixtral", checkpoints("mixtral")), adapter=lora("mixtral"))
