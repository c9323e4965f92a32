"""Long stacks are traced short: the graph is the very one that a trace of all layers gives, or all are traced."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MT5Config,
    Qwen2MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import memplan
from memplan.analyze.inputs import prepare as adapters
from memplan.analyze.inputs.prepare import describe, prepare
from memplan.analyze.repeat.periodic import KEPT, find_runs, shortened
from memplan.analyze.trace import trace
from memplan.analyze.trace.trace import analyze
from tests.run.test_causal_types import NOT_BUILT
from tests.support import causal_types
from tests.support.training import CPU, Decoder, PlainLayer, batch_of, loss_of

DEPTH = 12
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(depth=DEPTH):
    config = LlamaConfig(**SMALL, num_hidden_layers=depth)
    return _adapted(AutoModelForCausalLM.from_config(config))


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=DEPTH, n_head=4, vocab_size=96, n_positions=64, **TOKENS)
    return _adapted(AutoModelForCausalLM.from_config(config), ["c_attn", "c_proj"])


def t5():
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=DEPTH, num_decoder_layers=DEPTH + 2, num_heads=4, vocab_size=96,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _adapted(T5ForConditionalGeneration(config), ["q", "v", "wi", "wo"])


def mixtral():
    config = MixtralConfig(**SMALL, num_hidden_layers=DEPTH, num_local_experts=4)
    return _adapted(AutoModelForCausalLM.from_config(config), ["q_proj", "v_proj"])


def two_kinds_in_turn():
    """Attention over a window in each layer but every third."""
    kinds = ["full_attention" if index % 3 == 2 else "sliding_attention" for index in range(30)]
    config = Gemma3TextConfig(
        **SMALL,
        num_hidden_layers=30,
        head_dim=8,
        layer_types=kinds,
        sliding_window=6,
        max_position_embeddings=64,
        **TOKENS,
    )
    return _adapted(AutoModelForCausalLM.from_config(config), ["q_proj", "v_proj"])


def another_kind_first():
    config = Qwen2MoeConfig(
        **SMALL, num_hidden_layers=DEPTH, mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    return _adapted(AutoModelForCausalLM.from_config(config), ["q_proj", "v_proj"])


def partly_trained():
    """The last two layers are trained in full, beside adapters before them."""
    model = llama()
    for layer in model.base_model.model.model.layers[-2:]:
        layer.requires_grad_(True)
    return model


def plain():
    return Decoder((PlainLayer(32, 0.0) for _ in range(DEPTH)), 32)


def checkpointed():
    model = llama()
    base = model.base_model.model
    getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


MODELS = (llama, gpt2, t5, mixtral, two_kinds_in_turn, another_kind_first, partly_trained, plain, checkpointed)


def _adapted(base, targets="all-linear"):
    return get_peft_model(base, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=targets == ["c_attn", "c_proj"]))


def kind_of(model):
    return "plain" if isinstance(model, Decoder) else "llama"


ALL = {"offload": True, "accumulation": 2, "autocast": "bf16"}


def _cases():
    for make in MODELS:
        for name, options in (("plain", {}), ("all", ALL)):
            slow = make is not mixtral or bool(options)
            yield pytest.param(make, options, id=f"{make.__name__}-{name}", marks=[pytest.mark.full] if slow else [])


@pytest.mark.quick("{}-targets1")
@pytest.mark.parametrize("targets", [pytest.param("all-linear", marks=pytest.mark.full), ["q_proj", "v_proj"]])
@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "optimizer": "adafactor"}], ids=str)
def test_layers_may_be_left_out_before_the_adapter_is_added(targets, options):
    given = {"adapter": {"rank": 4, "targets": targets}}
    config = LlamaConfig(**SMALL, **TOKENS, num_hidden_layers=DEPTH)
    short, whole = prepare(config, **given, short_for=(2, 16)), prepare(config, **given)
    assert len(short.model.get_base_model().model.layers) == KEPT + 1
    assert describe(short.model) == describe(whole.model)
    graph = analyze(short.model, (2, 16), runs=short.runs, device="cuda", **options)
    assert graph == analyze(whole.model, (2, 16), device="cuda", **options)
    assert graph.fragmentation_bytes
    assert len(graph.blocks) == DEPTH + 3


def test_layers_that_are_named_by_number_are_not_left_out():
    config = LlamaConfig(**SMALL, **TOKENS, num_hidden_layers=DEPTH)
    assert not prepare(config, adapter={"rank": 4, "targets": ["layers.3.self_attn.q_proj"]}, short_for=(2, 16)).runs
    assert not prepare(
        config, adapter=LoraConfig(layers_to_transform=[1], target_modules=["q_proj"]), short_for=(2, 16)
    ).runs


@pytest.mark.each_value
@pytest.mark.parametrize(("make", "options"), list(_cases()))
def test_the_same_graph(make, options, monkeypatch):
    model = make()
    before = [name for name, _ in model.named_modules()]
    traced = []
    of_short = trace.extended
    monkeypatch.setattr(trace, "extended", lambda graph, run: traced.append(run) or of_short(graph, run))
    graph = analyze(model, batch_of(kind_of(model)), loss=loss_of, short=True, device="cuda", **options)
    assert [name for name, _ in model.named_modules()] == before
    assert traced, "nothing was spared"
    assert graph == analyze(model, batch_of(kind_of(model)), loss=loss_of, device="cuda", **options)


class Odd(Decoder):
    """Its forward does something else at some layers, by a number that no setting shows."""

    def __init__(self, what: str) -> None:
        super().__init__((PlainLayer(32, 0.0) for _ in range(DEPTH)), 32)
        self.what = what
        self.deep_layers = [7]

    def forward(self, input_ids):
        x = self.embed(input_ids)
        kept = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if (self.what == "second" and index % 2) or (self.what == "third" and index % 3 == 0):
                kept.append(torch.exp(x))
            if self.what == "first three" and index < 3:
                x = torch.exp(x)
            if self.what == "listed" and index in self.deep_layers:
                kept.append(torch.exp(x))
            if self.what == "once more" and index == 2:
                x = layer(x)
            if self.what == "far" and index == 1:
                kept.append(x)
            if self.what == "far" and index == 3:
                x = x * torch.tanh(kept[0])
        return self.head(x + sum(kept) if self.what != "far" else x)


@pytest.mark.quick("second", "once more")
@pytest.mark.parametrize("what", ["second", "third", "first three", "listed", "once more", "far"])
def test_what_does_not_repeat_is_traced_whole(what):
    model = Odd(what)
    graph = analyze(model, batch_of("plain"), loss=loss_of, short=True)
    assert graph == analyze(model, batch_of("plain"), loss=loss_of)
    assert len(graph.blocks) == DEPTH + 2


class Late(PlainLayer):
    """From some layer on it does something else, by its own number."""

    def __init__(self, number):
        super().__init__(32, 0.0)
        self.layer_idx = number

    def forward(self, x):
        return super().forward(torch.exp(x) if self.layer_idx >= 8 else x)


def test_what_a_layer_does_by_its_own_number_is_seen():
    model = Decoder((Late(number) for number in range(DEPTH)), 32)
    assert find_runs(model)
    whole = analyze(model, batch_of("plain"), loss=loss_of)
    assert analyze(model, batch_of("plain"), loss=loss_of, short=True) == whole


def test_what_differs_is_no_run():
    def runs(change):
        model = plain()
        change(model)
        return [(run.first, run.period, run.count) for run in find_runs(model)]

    assert runs(lambda model: None) == [(1, 1, DEPTH - 1)]
    assert runs(lambda model: model.layers[DEPTH - 1].lora_a.requires_grad_(False)) == [(1, 1, DEPTH - 2)]
    assert runs(lambda model: model.layers[0].dropout.__init__(0.1)) == [(2, 1, DEPTH - 2)]
    assert runs(lambda model: model.layers[5].register_forward_hook(lambda *_: None)) == []

    assert runs(lambda model: model.layers[6].up.to(torch.float64)) == []
    assert runs(lambda model: model.layers[5].register_buffer("skip", torch.tensor(True))) == []
    assert runs(lambda model: setattr(model.layers[5], "add", lambda x, more=5: x + more)) == []
    for_each = [torch.tensor(index == 5) for index in range(DEPTH)]
    assert (
        runs(lambda model: [layer.register_buffer("skip", for_each[i]) for i, layer in enumerate(model.layers)]) == []
    )
    assert runs(lambda model: setattr(model, "layers", nn.ModuleList(list(model.layers)[:5]))) == []


def test_a_module_of_ones_own_is_traced_whole(monkeypatch):
    """Its forward may count: a setting or a list that shows it is not to be asked for."""
    monkeypatch.setattr(trace, "shortened", None)
    monkeypatch.setattr(adapters, "shorten", None)
    memplan.plan(plain(), batch_of("plain"), loss=loss_of, vram="1GiB", ram="1GiB", hardware=CPU)
    config = MixtralConfig(**SMALL, num_hidden_layers=DEPTH, num_local_experts=4, output_router_logits=True)
    given = {"adapter": {"rank": 2, "targets": ["q_proj"]}, "vram": "1GiB", "ram": "1GiB", "hardware": CPU}
    memplan.plan(config, (1, 8), **given)
    with pytest.raises(TypeError):
        memplan.plan(LlamaConfig(**SMALL, num_hidden_layers=DEPTH), (1, 8), **given)


QUICK = {"qwen3": 1, "qwen3_5_text": 4}
"""Types that are known to be traced short, each with the layers of a period."""


def of_type(kind, depth):
    """A model of a transformers' type, of so many layers."""
    if kind not in ("t5", "mt5"):
        return causal_types.make(kind, depth)
    config = {"t5": T5Config, "mt5": MT5Config}[kind](
        d_model=32, d_kv=8, d_ff=48, num_layers=depth, num_decoder_layers=depth, num_heads=4, vocab_size=96,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _adapted(AutoModelForSeq2SeqLM.from_config(config), ["q", "v", "wi_0", "wo"])


@pytest.mark.parametrize("kind", ["qwen3", pytest.param("qwen3_5_text", marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore")
def test_types_that_are_traced_short(kind, monkeypatch):
    model = of_type(kind, max(12, 6 * QUICK[kind]))
    traced = []
    of_short = trace.extended
    monkeypatch.setattr(trace, "extended", lambda graph, run: traced.append(run) or of_short(graph, run))
    graph = analyze(model, batch_of("llama"), short=True, device="cuda")
    assert [run.period for run in traced] == [QUICK[kind]]
    assert graph == analyze(model, batch_of("llama"), device="cuda")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["t5", "mt5", *(kind for kind in causal_types.TYPES if kind not in NOT_BUILT)])
@pytest.mark.filterwarnings("ignore")
def test_every_type_is_traced_short_or_whole(kind):
    """Nothing is known of a type but what its modules, its forward and the trace show."""
    model = of_type(kind, 24)
    options = {"offload": kind in QUICK, "device": "cuda"}
    assert analyze(model, batch_of("llama"), short=True, **options) == analyze(model, batch_of("llama"), **options)


@pytest.mark.full
@pytest.mark.parametrize("options", [{"offload": True}, {"offload": True, "accumulation": 2}], ids=str)
def test_layers_that_hold_a_cache_are_traced_short_with_offload(options, monkeypatch):
    """The cache has keys and values of every layer until the loss, offloaded or not."""
    given = {"adapter": {"rank": 4, "targets": "all-linear"}}
    config = LlamaConfig(**SMALL, **TOKENS, num_hidden_layers=DEPTH, use_cache=True)
    short, whole = prepare(config, **given, short_for=(2, 16)), prepare(config, **given)
    graph = analyze(short.model, (2, 16), runs=short.runs, **options)  # else it would raise NotPeriodicError
    assert graph == analyze(whole.model, (2, 16), **options)
    at_loss = next(access.index for access in graph.accesses if access.kind == "loss")
    held = [life for life in graph.lifetimes if life.policy == "offload" and life.last == at_loss]
    assert len(held) == DEPTH


@pytest.mark.full
def test_a_half_precision_model_with_a_wide_head_in_float32():
    """What layers do counts as often as there are layers, not as there are in the trace."""
    model = llama(24).to(torch.bfloat16)
    base = model.base_model.model
    base.config.vocab_size = base.vocab_size = 4000
    base.lm_head = nn.Linear(32, 4000, bias=False)
    base.lm_head.requires_grad_(False)
    base.lm_head.register_forward_pre_hook(lambda module, args: args[0].float())
    whole = analyze(model, batch_of("llama"))
    assert analyze(model, batch_of("llama"), short=True) == whole


def test_a_short_stack_is_left_whole_on_any_way_out():
    model = plain()
    elements = list(model.layers)

    def interrupted():
        with shortened(find_runs(model)):
            assert list(model.layers) == [*elements[:3], *elements[-2:]]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(model.layers) == elements


@pytest.mark.full
def test_the_work_does_not_grow_with_the_layers(monkeypatch):
    """Ten times the layers are traced as few."""
    seen = []
    look = trace._trace
    monkeypatch.setattr(
        trace, "_trace", lambda model, *a, **o: seen.append(len(list(model.modules()))) or look(model, *a, **o)
    )
    analyze(llama(12), (2, 16), short_for=(2, 16))
    few = seen.copy()
    seen.clear()
    graph = analyze(llama(120), (2, 16), short_for=(2, 16))
    assert seen == few
    assert sum(block.kind == "layer" for block in graph.blocks) == 120


class Normed(PlainLayer):
    """It changes its own state, so it may not be recomputed."""

    def __init__(self, width):
        super().__init__(width, 0.0)
        self.batch_norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return super().forward(self.batch_norm(x.flatten(0, 1)).view_as(x))


def test_layers_left_out_that_change_their_state_are_named_too():
    torch.manual_seed(0)
    model = Decoder((Normed(32) for _ in range(DEPTH)), 32)
    whole = analyze(model, batch_of("plain"), loss=loss_of)
    assert [layer.module for layer in whole.stateful] == [f"layers.{index}" for index in range(DEPTH)]
    assert whole.stateful[7].reason == "it writes to layers.7.batch_norm.num_batches_tracked (by add_)"
    assert analyze(model, batch_of("plain"), loss=loss_of, short=True) == whole
