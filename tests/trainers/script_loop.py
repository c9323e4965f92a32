"""A loop that knows nothing of memplan, and calls its model in one of many ways.

``python script_loop.py FOLDER OUT WAY``. Each way is a function of this module: from a model with its adapter and a
batch to a loss.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BatchEncoding


def batches(count=3):
    for step in range(count):
        ids = (torch.arange(48).view(2, 24) * (step + 3)) % 90 + 3
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def mixed(model, batch):
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss


def positions(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"], return_dict=False)[0]
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def evaluating(model, batch):
    """It never says ``train()``: as ``from_pretrained`` leaves it, dropout does nothing."""
    return model.eval()(**BatchEncoding(batch)).loss


def main():
    folder, out, way = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(6)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for batch in batches():
        loss = globals()[way](model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: parameter.detach().clone() for name, parameter in trained.items()}, f"{out}/trained.safetensors")


if __name__ == "__main__":
    main()
