"""Direct preference optimisation with TRL on lines of {"prompt", "chosen", "rejected"}: python trl_dpo.py MODEL
DATA.jsonl OUT [--vram 10GiB --ram 24GiB]

Three lines differ from a script without memplan: the import, the ``with`` and the report. ``memplan run`` needs none of
them.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import memplan


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        given.add_argument(name, nargs="?")
    given.add_argument("--vram", help="budget of the device, as 10GiB; without it memplan is not used")
    given.add_argument("--ram", help="budget of RAM")
    given.add_argument("--steps", type=int, default=20)
    args = given.parse_args()
    if args.model is None:
        from small import small  # random weights and some rows

        args.model, args.data, args.out, args.vram = small("llama", "prompt", "chosen", "rejected")

    rows = load_dataset("json", data_files=args.data, split="train")
    config = DPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_length=32,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to=[],
        save_strategy="no",
        logging_steps=5,
    )
    lora = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    with memplan.placing(vram=args.vram, ram=args.ram) if args.vram else nullcontext():
        trainer = DPOTrainer(
            model=args.model,
            args=config,
            train_dataset=rows,
            peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(args.model),
        )
    trainer.train()
    trainer.save_model(args.out)
    if args.vram:
        memplan.report(trainer.memplan.plan, trainer.memplan.record)


if __name__ == "__main__":
    main()
