"""Loops that own their steps: ``python script_loop.py FOLDER OUT KIND``. Prints losses to the last bit.

KIND: ``plain``; ``accelerate``: prepare, accumulate, clip, save the state, go on from it; ``autocast``: that in bf16.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def batches():
    for step in range(6):
        rows = (torch.arange(24) * (step + 3) + torch.arange(2)[:, None]) % 90 + 3
        yield {"input_ids": rows, "labels": rows}


def main() -> None:
    folder, out, kind = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(6)
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if kind == "plain":
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print("loss", loss.item().hex())
        model.save_pretrained(out)
        return
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16" if kind == "autocast" else "no"
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    for step, batch in enumerate(batches()):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        print("loss", loss.item().hex())
        if step == 3:
            accelerator.save_state(out + "/state")
    accelerator.load_state(out + "/state")
    with torch.no_grad():
        print("eval", model(**next(batches())).loss.item().hex())
    accelerator.unwrap_model(model).save_pretrained(out)


if __name__ == "__main__":
    main()
