"""A loop that knows nothing of memplan and has two models: ``python script_two.py FOLDER OTHER OUT HOW``.

HOW: ``both`` trains an adapter of each, the second fed by the first; ``reference`` trains one beside a frozen
reference; ``one_after_the_other`` trains each with a Trainer of its own.
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

IDS = (torch.arange(48).view(2, 24) * 3) % 90 + 3


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def adapted(folder):
    torch.manual_seed(6)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))


def main():
    folder, other, out, how = sys.argv[1:]
    torch.set_num_threads(1)
    models = [adapted(folder)]
    if how == "reference":
        reference = AutoModelForCausalLM.from_pretrained(other).requires_grad_(False)
    else:
        models.append(adapted(other))
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    if how == "one_after_the_other":
        for model in models:
            args = TrainingArguments(
                output_dir=out, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
                report_to=[], disable_tqdm=True, seed=7, save_strategy="no",
            )  # fmt: skip
            Trainer(model=model, args=args, train_dataset=Rows()).train()
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for model in models:
            model.train()
        for _ in range(3):
            if how == "reference":
                with torch.no_grad():
                    wanted = reference(IDS).logits
                loss = (models[0](input_ids=IDS).logits - wanted).square().mean()
            else:
                hidden = models[0](input_ids=IDS, output_hidden_states=True).hidden_states[-1]
                loss = models[1](inputs_embeds=hidden, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_file({str(index): p.detach().clone() for index, p in enumerate(trained)}, f"{out}/trained.safetensors")


if __name__ == "__main__":
    main()
