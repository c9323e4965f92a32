"""Small models with an adapter, each with a batch: float32, on the CPU, the same weights every time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

BATCH, SEQUENCE, VOCABULARY = 2, 24, 96


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT asks transformers by a name that is going away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def with_lora(model, task=None, dropout=0.0, targets="all-linear"):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type=task)
    with quiet():
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros would hide what the adapters do
            nn.init.normal_(parameter, std=0.02)
    return adapted


def tokens(sequence=SEQUENCE, batch=BATCH):
    ids = torch.randint(3, VOCABULARY, (batch, sequence), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def llama(dropout=0.0, layers=3, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    return with_lora(LlamaForCausalLM(config), "CAUSAL_LM", dropout), tokens()


def gpt2(dropout=0.0):
    """Its head and its embedding share their weights; its linears are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    targets = ["c_attn", "c_proj", "c_fc"]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT notices Conv1D
        return with_lora(GPT2LMHeadModel(config), "CAUSAL_LM", dropout, targets), tokens()


def t5(dropout=0.0):
    """Encoder and decoder, a position bias that is handed on, one embedding for three modules."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    batch = tokens() | {"labels": tokens(sequence=16)["labels"]}
    return with_lora(T5ForConditionalGeneration(config), "SEQ_2_SEQ_LM", dropout, ["q", "v", "wo"]), batch


def mixtral(dropout=0.0):
    """Experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return with_lora(MixtralForCausalLM(config), "CAUSAL_LM", dropout, ["q_proj", "v_proj"]), tokens()


class Layer(nn.Module):
    """A frozen and a trained path."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.adapter = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        return x + self.dropout(self.down(torch.relu(self.up(normed)))) + self.adapter(normed)


class Plain(nn.Module):
    """No library's model: a stack in a ModuleList, and a choice of checkpoints around its layers."""

    def __init__(self, width: int = 32, layers: int = 3, dropout: float = 0.0, checkpointing: str = "off") -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)
        self.checkpointing = checkpointing
        self.requires_grad_(False)
        for layer in self.layers:
            layer.adapter.requires_grad_(True)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embedding(input_ids)
        if self.checkpointing == "reentrant":
            x = x.requires_grad_()
        for layer in self.layers:
            if self.checkpointing == "off":
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def plain(dropout=0.0, checkpointing="off"):
    torch.manual_seed(0)
    batch = tokens()
    del batch["attention_mask"]
    return Plain(dropout=dropout, checkpointing=checkpointing), batch
