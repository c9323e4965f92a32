"""What the shapes share: small models on disk, data, and what a run leaves behind. Knows nothing of memplan.

A file of shapes is called as ``python loops.py SHAPE OUT``; models lie in the folder ``SHAPES_MODELS``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

VOCABULARY = 256
HIDDEN = 64
LAYERS = 6
LENGTH = 24

_losses: list[str] = []
_facts: dict[str, str] = {}


def main(shapes: Mapping[str, Any]) -> None:
    """Run the shape of these (a module's names) that the command line names; write ``result.json`` of what it left
    behind.
    """
    name, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes[name](out)
    files = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
    }
    text = json.dumps({"losses": _losses, "facts": _facts, "files": files}, indent=1)
    (out / "result.json").write_text(text)


def log(loss: torch.Tensor | float) -> None:
    """Keep a loss to its last bit."""
    _losses.append(f"{struct.pack('<d', float(loss)).hex()} {float(loss):.6f}")


def take_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Go backward, and forward with the optimizer."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    log(loss)


def fact(name: str, value: object) -> None:
    _facts[name] = str(value)


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a hash of names, types and bytes."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        found = tensor.detach().cpu().contiguous().reshape(-1)
        hashed.update(f"{name} {found.dtype}".encode())
        hashed.update(found.view(torch.uint8).numpy().tobytes() if found.numel() else b"")
    return hashed.hexdigest()


def keep_trained(*modules: nn.Module) -> None:
    """Keep what is trained, and the last gradients of it."""
    for number, module in enumerate(modules):
        trained = [(name, value) for name, value in module.named_parameters() if value.requires_grad]
        fact(f"trained {number}", digest(trained))
        fact(f"gradients {number}", digest((name, value.grad) for name, value in trained if value.grad is not None))


def keep_history(trainer: Any) -> None:
    """Keep what a transformers Trainer logged."""
    for row in trainer.state.log_history:
        _losses.extend(
            f"{key} {row[key]!r}" for key in ("loss", "eval_loss", "grad_norm", "kl", "reward") if key in row
        )


def saved(name: str, make: Callable[[], Any]) -> str:
    """Return the folder of a model, made once."""
    folder = Path(os.environ["SHAPES_MODELS"]) / name
    if not (folder / "done").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            make().save_pretrained(folder)
        (folder / "done").touch()
    return str(folder)


def llama(name: str = "llama", **more: Any) -> str:
    """Return the folder of a small Llama with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder = saved(name, lambda: LlamaForCausalLM(LlamaConfig(**{**config, **more})))
    tokenizer(folder)
    return folder


def tokenizer(folder: str) -> Any:
    """Return a tokenizer of words ``w0``, ``w1``, … with a chat template; saved in ``folder``."""
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer.json").exists():
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|end|>"]
        names = special + [f"w{number}" for number in range(VOCABULARY - len(special))]
        words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made = PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        made.chat_template = (
            "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
            "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
        )
        made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start * 7 + number * (start % 5 + 2)) % (VOCABULARY - 6)}" for number in range(count))


def row(number: int, length: int = LENGTH) -> torch.Tensor:
    """Return token ids [``length``]."""
    return (torch.arange(length) * (number + 3)) % (VOCABULARY - 6) + 6


def batches(count: int = 4, size: int = 2, length: int = LENGTH) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches [``size``, ``length``] for a causal model."""
    for batch in range(count):
        ids = torch.stack([row(batch * size + number, length) for number in range(size)])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows for a Trainer."""

    def __init__(self, count: int = 12, length: int = LENGTH) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.count:
            raise IndexError(index)
        ids = row(index, self.length)
        return {"input_ids": ids, "labels": ids.clone()}


def arguments(out: Path, kind: Any = None, **more: Any) -> Any:
    """Return a Trainer's arguments: four steps, nothing reported."""
    from transformers import TrainingArguments

    given = {
        "output_dir": str(out / "steps"), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 0,
    }  # fmt: skip
    return (kind or TrainingArguments)(**{**given, **more})


def lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})


def adapted(folder: str, config: Any = None, **load: Any) -> Any:
    """Return the causal model of ``folder`` under PEFT."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder, **load), config or lora())


def adamw(*modules: nn.Module, lr: float = 1e-2) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for module in modules for p in module.parameters() if p.requires_grad], lr=lr)
