"""Kinds of adapters on a causal model, each trained by one plain loop and saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
from common import adamw, adapted, batches, keep_trained, llama, log, lora, main

QV = ["q_proj", "v_proj"]
CAUSAL = "CAUSAL_LM"


def _kinds() -> dict[str, Callable[[], Any]]:
    return {
        "dora": lambda: lora(use_dora=True),
        "rslora": lambda: lora(use_rslora=True, init_lora_weights="gaussian"),
        "pissa": lambda: lora(init_lora_weights="pissa", lora_dropout=0.0),
        "olora": lambda: lora(init_lora_weights="olora"),
        "trainable_tokens": lambda: lora(trainable_token_indices=[6, 7, 8]),
        "saved_head": lambda: lora(target_modules=QV, modules_to_save=["lm_head"]),
        "saved_norms": lambda: lora(target_modules=QV, modules_to_save=["input_layernorm"]),
        "ia3": lambda: peft.IA3Config(
            task_type=CAUSAL, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "loha": lambda: peft.LoHaConfig(task_type=CAUSAL, r=4, target_modules=QV),
        "lokr": lambda: peft.LoKrConfig(task_type=CAUSAL, r=4, target_modules=QV),
        "adalora": lambda: peft.AdaLoraConfig(task_type=CAUSAL, target_modules=QV, init_r=6, target_r=3, total_step=8),
        "oft": lambda: peft.OFTConfig(task_type=CAUSAL, target_modules=QV, oft_block_size=8),
        "boft": lambda: peft.BOFTConfig(task_type=CAUSAL, target_modules=["o_proj"], boft_block_size=8),
        "vera": lambda: peft.VeraConfig(task_type=CAUSAL, target_modules=["q_proj"], r=8),
        "fourier": lambda: peft.FourierFTConfig(task_type=CAUSAL, target_modules=QV, n_frequency=30),
        "hra": lambda: peft.HRAConfig(task_type=CAUSAL, target_modules=QV, r=4),
        "layer_norm": lambda: peft.LNTuningConfig(task_type=CAUSAL),
        "prompt": lambda: peft.PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=4),
        "p_tuning": lambda: peft.PromptEncoderConfig(
            task_type=CAUSAL, num_virtual_tokens=4, encoder_hidden_size=16
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4),
        "adaption_prompt": lambda: peft.AdaptionPromptConfig(task_type=CAUSAL, adapter_len=4, adapter_layers=4),
    }  # fmt: skip


def _shape(make: Callable[[], Any]) -> Callable[[Path], None]:
    def train(out: Path) -> None:
        model = adapted(llama(), make()).train()
        optimizer = adamw(model)
        for step, batch in enumerate(batches()):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            if hasattr(model.base_model, "update_and_allocate"):
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            log(loss)
        keep_trained(model)
        model.save_pretrained(out / "adapter")

    return train


SHAPES = {name: _shape(make) for name, make in _kinds().items()}

if __name__ == "__main__":
    main(SHAPES)
