"""A model by its name on a hub: ``python script_hub.py OUT CACHE``."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    torch.set_num_threads(1)
    out, cache = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained("someone/small", cache_dir=cache)
    torch.manual_seed(6)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = torch.arange(48).view(2, 24) % 90 + 3
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
