"""TRL's trainers as their tutorials use them: ``python script_trl.py FOLDER DATA OUT KIND``. Prints losses to the last bit.

KIND: ``sft``, ``packed`` (SFT with packing), ``dpo`` or ``reward``. DATA: a folder with text.jsonl and pairs.jsonl.
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {"max_length": 32}),
    "packed": (SFTTrainer, SFTConfig, {"max_length": 32, "packing": True, "packing_strategy": "wrapped"}),
    "dpo": (DPOTrainer, DPOConfig, {"max_length": 32}),
    "reward": (RewardTrainer, RewardConfig, {"max_length": 32}),
}


def main() -> None:
    folder, data, out, name = sys.argv[1:]
    torch.set_num_threads(1)
    kind, config, more = TRAINERS[name]

    class Exact(kind):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            print("loss", loss.item().hex(), flush=True)
            return loss

    file = "text.jsonl" if name in ("sft", "packed") else "pairs.jsonl"
    rows = load_dataset("json", data_files=f"{data}/{file}", split="train", cache_dir=f"{data}/cache")
    args = config(
        output_dir=out, max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_strategy="no", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, seed=7, logging_steps=100, **more,
    )  # fmt: skip
    lora = LoraConfig(
        r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="SEQ_CLS" if name == "reward" else "CAUSAL_LM",
    )  # fmt: skip
    trainer = Exact(
        model=folder, args=args, train_dataset=rows, peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    main()
