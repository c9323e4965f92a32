"""A plain PyTorch loop on lines of {"text": ...}: python peft_loop.py MODEL DATA.jsonl OUT [--vram 10GiB --ram 24GiB]

``memplan run`` needs no line of memplan here.
"""

from __future__ import annotations

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

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

        args.model, args.data, args.out, args.vram = small("llama", "text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = load_dataset("json", data_files=args.data, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=32), remove_columns=["text"])
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))
    model.train()
    if args.vram:
        longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[:2]
        plan = memplan.plan(model, dict(collate(longest)), vram=args.vram, ram=args.ram)
        handle = memplan.attach(model, plan)
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    step = 0
    while step < args.steps:
        for batch in loader:
            loss = model(**batch.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == args.steps:
                break
    model.save_pretrained(args.out)
    if args.vram:
        memplan.report(plan, handle.record)


if __name__ == "__main__":
    main()
