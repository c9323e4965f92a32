"""Blocks and the order of accesses against a real run; the model is as it was; what is refused."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from memplan.analyze.inputs.prepare import _copy_on_meta as prepare_copy
from memplan.analyze.trace.operators import flops
from memplan.analyze.trace.trace import analyze
from memplan.errors import InputError, ModelError
from memplan.hooks.triggers import modules_by_name
from memplan.model.names import canonical
from memplan.units import align_up
from tests.analyze.steps import real_order
from tests.support import models
from tests.support.graphs import analyze_once

MAKERS = {name: getattr(models, name) for name in ("llama", "gpt2", "t5", "mixtral", "plain")}


@pytest.mark.quick("llama", "gpt2", "mixtral", "plain")
@pytest.mark.parametrize("name", MAKERS)
def test_the_order_is_that_of_a_real_step(name):
    model, batch = MAKERS[name]()
    graph = analyze_once(model, batch)
    names = {access.module for access in graph.accesses if access.module}
    modules = {module: modules_by_name(model)[module] for module in names}
    seen = [(a.kind, a.module) for a in graph.accesses if a.module]
    assert seen == real_order(model, batch, modules)
    assert [a.kind for a in graph.accesses if not a.module] == ["loss", "optimizer"]
    for access in graph.accesses:
        if access.kind == "backward":
            assert graph.accesses[access.forward].module == access.module
            assert graph.accesses[access.forward].kind == "forward"


@pytest.mark.parametrize("how", ["off", "reentrant", "other"])
def test_the_order_where_layers_are_checkpointed(how):
    model, batch = models.plain(checkpointing=how)
    graph = analyze_once(model, batch)
    names = {access.module for access in graph.accesses if access.module}
    seen = [(a.kind, a.module) for a in graph.accesses if a.module]
    assert seen == real_order(model, batch, {n: modules_by_name(model)[n] for n in names})


@pytest.mark.quick("llama", "gpt2", "mixtral", "plain")
@pytest.mark.parametrize("name", MAKERS)
def test_every_frozen_parameter_is_in_one_block(name):
    model, batch = MAKERS[name]()
    graph = analyze_once(model, batch)
    placed = [tensor.name for block in graph.blocks for tensor in block.tensors]
    assert len(placed) == len(set(placed))
    frozen = {canonical(full): p for full, p in model.named_parameters() if not p.requires_grad}
    assert set(placed) == set(frozen)
    for index, block in enumerate(graph.blocks):
        assert block.id == index
        end = 0
        for tensor in block.tensors:
            assert tensor.offset_bytes == end
            assert tensor.size_bytes == frozen[tensor.name].numel() * frozen[tensor.name].element_size()
            end = align_up(tensor.offset_bytes + tensor.size_bytes)
        assert block.size_bytes == end
        assert not block.pinned_because


def blocks_of(graph):
    return {block.name: block.kind for block in graph.blocks}


def test_blocks_of_a_llama():
    model, batch = models.llama()
    assert blocks_of(analyze_once(model, batch)) == {
        "model.embed_tokens": "embedding",
        "model.layers.0": "layer",
        "model.layers.1": "layer",
        "model.layers.2": "layer",
        "model.norm": "other",
        "lm_head": "head",
    }


def test_what_is_tied_is_one_block_that_all_its_readers_fetch():
    model, batch = models.t5()
    graph = analyze_once(model, batch)
    (shared,) = (block for block in graph.blocks if block.kind == "shared")
    readers = {access.module for access in graph.accesses if shared.id in access.blocks}
    assert readers == {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}


def test_a_head_with_an_adapter_is_announced_by_what_wraps_it():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    model = models.with_lora(LlamaForCausalLM(config), "CAUSAL_LM", targets=["q_proj", "lm_head"])
    graph = analyze(model, models.tokens())
    (head,) = (block for block in graph.blocks if block.kind == "head")
    assert [tensor.name for tensor in head.tensors] == ["lm_head.weight"]
    assert not head.pinned_because
    assert modules_by_name(model)["lm_head"] is model.base_model.model.lm_head


@pytest.mark.quick("llama")
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "plain"])
def test_on_meta_and_from_a_shape_it_is_the_same(name):
    model, batch = MAKERS[name]()
    whole = analyze(model, batch)
    copied = prepare_copy(model)
    on_meta = analyze(copied, {key: value.to("meta") for key, value in batch.items()})
    assert on_meta.blocks == whole.blocks
    assert on_meta.lifetimes == whole.lifetimes
    assert on_meta.accesses == whole.accesses
    if name in ("llama", "gpt2"):
        assert analyze(model, (models.BATCH, models.SEQUENCE)).accesses == whole.accesses


def test_a_padded_batch_makes_a_mask():
    model, batch = models.llama()
    whole = analyze_once(model, batch)
    batch["attention_mask"][0, :5] = 0
    assert analyze(model, batch).lifetimes != whole.lifetimes


def state_of(model):
    """Everything that an analysis might leave changed."""
    rows = []
    for name, module in model.named_modules():
        rows.append((name, module.training, {k: id(v) for k, v in module.__dict__.items()}))
        rows.append([(k, id(v)) for held in (module._parameters, module._buffers) for k, v in held.items()])
        rows.append([(k, len(v)) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None])
    rows += [(id(p), p.data_ptr(), p.requires_grad, p.grad, p._version) for p in model.parameters()]
    rows += [random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()]
    return rows


class Interrupted(BaseException):
    pass


@pytest.mark.each_value
@pytest.mark.parametrize("where", ["nowhere", "forward", "backward"])
@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_the_model_is_left_as_it_was(where, error):
    model, batch = models.llama(dropout=0.1)
    model.eval()
    model.base_model.model.model.layers[1].train()
    before = state_of(model)

    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            random.random(), torch.rand(3), numpy.random.rand(3)
            if where == "forward":
                raise error("on purpose")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if where == "backward":
                raise error("on purpose")
            return gradient

    def run():
        return analyze(model, batch, loss=lambda output: Fail.apply(output.logits).sum())

    del batch["labels"]
    if where == "nowhere":
        run()
    else:
        with pytest.raises(ModelError if error is RuntimeError else Interrupted):
            run()
    assert state_of(model) == before
    assert model(**batch).logits.isfinite().all()


class Reads(nn.Module):
    """Reads its head's weight beside the head's forward, or keeps layers in containers, or layers in a layer."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        if how == "containers":
            self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2))
        else:
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(8))
        self.requires_grad_(False)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x) + self.adapter(x)
        for layer in self.layers:
            x = layer["b"](layer["a"](x)) if self.how == "containers" else layer(x)
        if self.how == "nested":
            x = x * self.scale
        return nn.functional.linear(x, self.head.weight) if self.how == "beside" else self.head(x)


def test_a_weight_read_beside_its_module_stays_on_the_device():
    blocks = {block.name: block for block in analyze(Reads("beside"), torch.randn(3, 8)).blocks}
    assert "the forward of head is never called" in blocks["head"].pinned_because
    assert not blocks["layers.0"].pinned_because


def test_notes_of_a_head_that_a_loss_reads_itself_do_not_contradict_each_other():
    """As TRL's losses in chunks take it: it is read, and what nothing reads is another."""
    model = Reads("beside")
    model.scale.requires_grad_(True)
    notes = analyze(model, torch.randn(3, 8)).notes
    (stays,) = [note for note in notes if "must stay on the device" in note]
    assert (
        stays
        == "head must stay on the device, since its weights are read (by mm), but the forward of head is never called."
    )
    assert not any("never read" in note for note in notes)
    model.unused = nn.Linear(8, 8).requires_grad_(False)
    (unread,) = [note for note in analyze(model, torch.randn(3, 8)).notes if "never read" in note]
    assert unread.startswith("1.0 KiB of its weights (unused) are never read with this batch")


def test_a_module_that_calls_other_blocks_stays_on_the_device():
    blocks = {block.name: block for block in analyze(Reads("nested"), torch.randn(3, 8)).blocks}
    assert blocks["."].pinned_because.startswith(". calls first")
    assert not blocks["first"].pinned_because


def test_containers_are_taken_apart():
    graph = analyze(Reads("containers"), torch.randn(3, 8))
    names = [block.name for block in graph.blocks if block.kind == "layer"]
    assert names == ["layers.0.a", "layers.0.b", "layers.1.a", "layers.1.b"]
    assert set(graph.recomputable) == set(names)


class Asks(nn.Module):
    """Decides by values of the batch and of activations."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)).requires_grad_(False)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x, lengths):
        if x.isnan().any():
            raise ValueError("never")
        x = self.adapter(x[: lengths.max().item()])
        parts = []
        chosen = x.topk(1, dim=-1).indices[:, 0] % 4
        for index, layer in enumerate(self.layers):
            rows = (chosen == index).nonzero()[:, 0]
            parts.append(layer(x[rows]))
        return torch.cat(parts)


def test_values_of_the_batch_are_known_and_those_of_activations_even():
    graph = analyze(Asks(), (torch.randn(20, 8), torch.tensor([3, 16, 5])))
    flops = [access.flops for access in graph.accesses if access.kind == "forward"]
    adapter = 2 * 16 * 8 * 8  # comes before the first layer: the longest of the lengths is 16
    assert flops == [adapter + 2 * 4 * 8 * 8] + [2 * 4 * 8 * 8] * 3  # a quarter of the rows each
    assert any("even choice" in note for note in graph.notes)


# ---- refusals
# ----------------------------------------------------------------------------------------------------------


def test_nothing_frozen():
    with pytest.raises(ModelError, match="adapter"):
        analyze(nn.Linear(4, 4), torch.randn(2, 4))


def test_nothing_to_train():
    with pytest.raises(ModelError, match=r"nothing to train.*adapter"):
        analyze(nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 4))


def test_hooked_by_accelerate():
    model, batch = models.plain()
    model.layers[0]._hf_hook = object()
    with pytest.raises(ModelError, match=r"layers\.0 is hooked by accelerate"):
        analyze(model, batch)


def test_spread_by_a_device_map():
    model, batch = models.plain()
    model.hf_device_map = {"layers": 0, "head": "disk"}
    with pytest.raises(ModelError, match="0, disk"):
        analyze(model, batch)
    model.hf_device_map = {"layers": "cpu", "head": torch.device("cpu")}
    analyze(model, batch)


@pytest.mark.parametrize("batch", [None, 7, {}, (2, 0), ()])
def test_a_batch_that_is_none(batch):
    model, _ = models.llama()
    with pytest.raises(InputError, match="batch"):
        analyze(model, batch)


def test_a_shape_for_a_model_that_takes_no_tokens():
    with pytest.raises(InputError, match="input_ids"):
        analyze(Reads("off"), (2, 8))


def test_an_unknown_optimizer_is_answered_with_the_known_ones():
    model, batch = models.plain()
    with pytest.raises(InputError, match=r"muonic.*adamw.*sgd"):
        analyze(model, batch, optimizer="muonic")


def test_accumulation_below_one():
    model, batch = models.plain()
    with pytest.raises(InputError, match="accumulation"):
        analyze(model, batch, accumulation=0)


def test_a_loss_that_reaches_no_adapter():
    model, batch = models.plain()
    del batch["labels"]
    with pytest.raises(ModelError, match="could not be traced"):
        analyze(model, batch)
    with pytest.raises(ModelError, match="does not depend"):
        analyze(Reads("off"), torch.randn(3, 8), loss=lambda output: torch.zeros(()))


def test_attention_with_fewer_heads_of_keys_counts_as_with_all():
    """Which torch 2.11 refuses to count. Its own count of the heads repeated is the truth."""
    query, key = torch.empty(2, 8, 5, 16, device="meta"), torch.empty(2, 2, 7, 16, device="meta")
    value, repeated = torch.empty(2, 2, 7, 12, device="meta"), (2, 8, 7)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    gradient = torch.empty(2, 8, 5, 12, device="meta")
    shapes = query.shape, torch.Size((*repeated, 16)), torch.Size((*repeated, 12))
    assert flops(forward, (query, key, value), {}, None) == sdpa_flop_count(*shapes)
    counted = flops(backward, (gradient, query, key, value), {}, None)
    assert counted == sdpa_backward_flop_count(gradient.shape, *shapes)
