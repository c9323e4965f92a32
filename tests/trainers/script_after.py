"""A script that knows nothing of memplan, and what it does with its model once it is trained: ``python script_after.py
FOLDER HOW``.

HOW: ``cast``, ``copied``, ``copied_part``, ``pickled``, ``merged``, ``merged_and_unmerged``, ``merged_layer``,
``unloaded``, ``compiled``, ``trained_on`` (trained, cast, and trained again).
"""

from __future__ import annotations

import copy
import hashlib
import io
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        row = (torch.arange(24) * (index + 3)) % 90 + 3
        return {"input_ids": row, "labels": row}


def told(model):
    """Print what a model holds, and what it makes of something."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[3, 4, 5]])).logits.double().sum().item()
    print("made", digest.hexdigest(), logits.hex())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def main():
    folder, how, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(6)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    args = TrainingArguments(
        output_dir=out, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, seed=7, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Rows())
    trainer.train()
    if how == "cast":
        model = model.bfloat16()
    elif how == "copied":
        told(copy.deepcopy(model))
    elif how == "copied_part":
        layers = model.get_base_model().model.layers
        layers[1] = copy.deepcopy(layers[2])
    elif how == "pickled":
        told(pickled(model))
    elif how == "merged":
        model = model.merge_and_unload()
    elif how == "merged_and_unmerged":
        model.merge_adapter()
        model.unmerge_adapter()
    elif how == "merged_layer":
        model.get_base_model().model.layers[2].mlp.up_proj.merge()
    elif how == "unloaded":
        model = model.unload()
    elif how == "compiled":
        model.compile(backend="eager")
    elif how == "trained_on":
        model.double()
        Trainer(model=model, args=args, train_dataset=Rows()).train()
    told(model)


if __name__ == "__main__":
    main()
