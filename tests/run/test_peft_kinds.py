"""Every kind of adapter that PEFT has: gradients, what is saved, what is merged, all equal to a whole run's."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from memplan.errors import RunError
from memplan.run.attach import attach
from tests.run.test_parity import plan_for
from tests.support.training import VOCABULARY, assert_equal, batch_of, train

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
KINDS = {
    "lora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, lora_dropout=0.1),
    "rslora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_rslora=True),
    "dora": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "trained-tokens": lambda: LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, trainable_token_indices={"embed_tokens": [1, 5, 7]}
    ),
    "lora-parameter": lambda: LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], init_lora_weights=False
    ),
    "ia3": lambda: IA3Config(
        target_modules=TARGETS, feedforward_modules=["down_proj"], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
    "loha": lambda: LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    "lokr": lambda: LoKrConfig(r=4, target_modules=TARGETS, init_weights=False),
    "adalora": lambda: AdaLoraConfig(
        init_r=6, target_r=4, total_step=20, target_modules=TARGETS, task_type="CAUSAL_LM"
    ),
    "vera": lambda: VeraConfig(r=8, target_modules=SQUARE, init_weights=False),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
MERGED = [kind for kind in KINDS if kind not in ("prompt", "prefix", "lora-parameter")]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=VOCABULARY, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def make(kind):
    model = base()
    torch.manual_seed(1)
    adapted = get_peft_model(model, KINDS[kind]())
    with torch.no_grad():  # what begins at zero or one would hide what an adapter does
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and ("vera_lambda" in name or "lora_magnitude" in name):
                parameter.add_(0.1 * torch.rand(parameter.shape))
    return adapted.train()


def output(model):
    with torch.no_grad():
        return model(**batch_of("llama")).logits


@pytest.mark.quick("adalora")
@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_and_what_is_read(kind, tmp_path):
    whole, model = make(kind), make(kind)
    plan = plan_for(model, "llama", share=0.2)
    expected = train(whole, "llama", steps=2)
    handle = attach(model, plan, checked=True, cache=tmp_path)
    try:
        assert_equal(expected, train(model, "llama", steps=2))
        whole.eval(), model.eval()
        assert torch.equal(output(whole), output(model))
        if kind not in ("prompt", "prefix"):
            with whole.disable_adapter(), model.disable_adapter():
                assert torch.equal(output(whole), output(model))
        model.save_pretrained(tmp_path / "planned")
        whole.save_pretrained(tmp_path / "whole")
        one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("planned", "whole"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        reloaded = PeftModel.from_pretrained(base(), tmp_path / "planned", is_trainable=kind == "adalora").eval()
        assert torch.equal(output(reloaded), output(whole))
        if kind in MERGED:
            with pytest.raises(RunError, match="merge"):
                model.merge_and_unload()
            with pytest.raises(RunError, match="merge"):
                model.merge_adapter()
        assert torch.equal(output(whole), output(model))
    finally:
        handle.detach()
    assert torch.equal(output(whole), output(model))
    if kind in MERGED:
        merged, expected_merge = model.merge_and_unload(), whole.merge_and_unload()
        for (name, a), (_, b) in zip(merged.named_parameters(), expected_merge.named_parameters(), strict=True):
            assert torch.equal(a, b), name
