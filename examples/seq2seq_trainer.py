"""LoRA with transformers' Seq2SeqTrainer on lines of {"prompt", "chosen"}: python seq2seq_trainer.py MODEL DATA.jsonl
OUT

It evaluates by generating. With ``--vram 10GiB`` under a budget; ``memplan run`` needs no line of memplan here.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

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

        args.model, args.data, args.out, args.vram = small("t5", "prompt", "chosen")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(
        lambda row: tokenizer(row["prompt"], text_target=row["chosen"], truncation=True, max_length=32),
        remove_columns=rows.column_names,
    )
    config = Seq2SeqTrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-3,
        predict_with_generate=True,
        generation_max_length=8,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        report_to=[],
        save_strategy="no",
        logging_steps=5,
    )
    torch.manual_seed(0)
    with memplan.placing(vram=args.vram, ram=args.ram) if args.vram else nullcontext():
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model)
        lora = LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        model = get_peft_model(model, lora)
        trainer = Seq2SeqTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            processing_class=tokenizer,
        )
    trainer.train()
    print("generated", trainer.predict(rows.select(range(4))).predictions.tolist())
    model.save_pretrained(args.out)
    if args.vram:
        memplan.report(trainer.memplan.plan, trainer.memplan.record)


if __name__ == "__main__":
    main()
