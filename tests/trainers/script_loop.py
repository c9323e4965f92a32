"""A loop that knows nothing of memplan, and calls its model in one of many ways: ``python script_loop.py FOLDER OUT
WAY``.

Each way is a function of this module that makes a model and returns what is trained, and what makes a loss of a batch.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.utils.parametrize
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BatchEncoding

LORA = {"r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}


def batches(count=3):
    for step in range(count):
        ids = (torch.arange(48).view(2, 24) * (step + 3)) % 90 + 3
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def named(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted(folder, **lora):
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA | lora)).train()


def frozen(folder):
    return AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)


def cross_entropy(logits, labels):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def mixed(folder):
    model = adapted(folder)
    return named(model), lambda b: model(b["input_ids"], attention_mask=b["attention_mask"], labels=b["labels"]).loss


def positions(folder):
    model = adapted(folder)
    return named(model), lambda b: cross_entropy(
        model(b["input_ids"], b["attention_mask"], return_dict=False)[0], b["labels"]
    )


def evaluating(folder):
    """It never says ``train()``: as ``from_pretrained`` leaves it, dropout does nothing."""
    model = adapted(folder).eval()
    return named(model), lambda b: model(**BatchEncoding(b)).loss


class Side(nn.Module):
    """As kohya's: trained beside a layer whose forward it takes over."""

    def __init__(self, layer):
        super().__init__()
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        self.before = [layer.forward]
        layer.forward = self.forward

    def forward(self, x):
        return self.before[0](x) + self.up(self.down(x))


def beside(folder):
    """Of a model that is wholly frozen, layers' forwards are taken over by a network of its own."""
    model = frozen(folder)
    layers = [module for name, module in model.named_modules() if name.endswith(("q_proj", "down_proj"))]
    network = nn.ModuleList(map(Side, layers))
    return named(network), lambda b: model(**b).loss


def prompt(folder):
    """A prompt is trained, and goes through a model that is wholly frozen."""
    model = frozen(folder)
    soft = nn.Parameter(torch.randn(1, 5, model.config.hidden_size) * 0.02)

    def loss(b):
        embeds = torch.cat([soft.expand(2, -1, -1), model.get_input_embeddings()(b["input_ids"])], 1)
        labels = torch.cat([torch.full((2, 5), -100), b["labels"]], 1)
        return model(inputs_embeds=embeds, labels=labels).loss

    return {"soft": soft}, loss


def within(folder):
    """The backbone alone, and a loss in chunks that reads the head's weight itself."""
    model = adapted(folder, target_modules=["q_proj", "v_proj"])
    inner = model.get_base_model()

    def loss(b):
        hidden = inner.model(input_ids=b["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
        labels = b["labels"][:, 1:].flatten()
        parts = zip(hidden.chunk(3), labels.chunk(3), strict=True)
        return sum(nn.functional.cross_entropy(h @ inner.lm_head.weight.T, y, reduction="sum") for h, y in parts) / len(
            labels
        )

    return named(model), loss


def checkpointed(folder):
    """The backbone within a checkpoint of the script's own, which counts what autograd saves there."""
    model = adapted(folder)
    inner = model.get_base_model()

    def loss(b):
        hidden = checkpoint(lambda ids: inner.model(ids).last_hidden_state, b["input_ids"], use_reentrant=False)
        return cross_entropy(inner.lm_head(hidden), b["labels"])

    return named(model), loss


def forward(folder):
    """``forward`` itself, which no hook of the model sees."""
    model = adapted(folder)
    return named(model), lambda b: model.get_base_model().forward(**b).loss


def twice(folder):
    """Two calls a step, of different lengths."""
    model = adapted(folder)

    def loss(b):
        one = model(**b).logits
        other = model(input_ids=b["input_ids"][:, :9]).logits
        return (one.mean(1) - other.mean(1)).square().mean()

    return named(model), loss


def looked_at(folder):
    """Called once in evaluation mode with gradients, which nobody wants, and then trained."""
    model = adapted(folder).eval()
    print("made", model(**next(batches())).loss.item().hex())
    model.train()
    return named(model), lambda b: model(**b).loss


class Low(nn.Module):
    """A parametrization: a weight and a small product."""

    def __init__(self, weight):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, weight.shape[1]) * 0.05)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], 4))

    def forward(self, weight):
        return weight + self.b @ self.a


class Own(nn.Module):
    """No library's, its head tied by hand."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU()) for _ in range(8))
        self.down = nn.ModuleList(nn.Linear(256, 64) for _ in range(8))

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for up, down in zip(self.layers, self.down, strict=True):
            x = x + down(up(x))
        logits = x @ self.embed.weight.T
        return logits, None if labels is None else cross_entropy(logits, labels)


def own(folder):
    """A module of the script's own, filled from a file of ``torch.save``."""
    torch.manual_seed(5)
    held = io.BytesIO()
    torch.save(Own().state_dict(), held)
    held.seek(0)
    model = Own()
    model.load_state_dict(torch.load(held))
    model.requires_grad_(False)
    for layer in model.down:
        nn.utils.parametrize.register_parametrization(layer, "weight", Low(layer.weight))
    return named(model), lambda b: model(b["input_ids"], labels=b["labels"])[1]


def filled(folder):
    """Built from its configuration, and then filled."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for shard in Path(folder).glob("*.safetensors"):
        model.load_state_dict(load_file(shard), strict=False)
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    return named(model), lambda b: model(**b).loss


def custom(folder):
    """Code of its own that comes with the checkpoint."""
    here = Path(sys.argv[2]) / "custom"
    shutil.copytree(folder, here)
    config = json.loads((here / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (here / "config.json").write_text(json.dumps(config))
    (here / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    )
    model = AutoModelForCausalLM.from_pretrained(here, trust_remote_code=True)
    model = get_peft_model(model, LoraConfig(**LORA)).train()
    return named(model), lambda b: model(**b).loss


def main():
    folder, out, way = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(6)
    trained, loss = globals()[way](folder)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for batch in batches():
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: parameter.detach().clone() for name, parameter in trained.items()}, f"{out}/trained.safetensors")


if __name__ == "__main__":
    main()
