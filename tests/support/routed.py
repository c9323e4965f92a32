"""Small models whose routers choose among experts in modules of their own, as models with remote code have them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from tests.support.training import VOCABULARY, Decoder, checkpoint_layer

WIDTH, EXPERTS, DEPTH = 48, 6, 2
KINDS = ("routed", "nllb", "switch")


class Adapted(nn.Module):
    """A frozen linear layer and a LoRA adapter on it."""

    def __init__(self, inner: int, outer: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer, bias=False)
        self.lora_a = nn.Linear(inner, 4, bias=False)
        self.lora_b = nn.Linear(4, outer, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_b(self.lora_a(self.dropout(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = Adapted(WIDTH, WIDTH, dropout=0.1), Adapted(WIDTH, WIDTH, dropout=0.1)
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), is_causal=True))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Adapted(WIDTH, 3 * WIDTH), Adapted(3 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class Experts(nn.Module):
    """Top two of ``EXPERTS``, and one that all tokens share."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.shared = Expert()
        self.way = "in-order"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, WIDTH)
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        if self.way != "none":
            hit = chosen.unique().tolist()
            for expert in hit[::-1] if self.way == "reversed" else hit:
                row, slot = (chosen == expert).nonzero(as_tuple=True)
                for part in (slice(0, 1), slice(1, None)) if self.way == "twice" else (slice(None),):
                    if len(row[part]):
                        made = self.experts[expert](rows[row[part]]) * weights[row[part], slot[part], None]
                        out.index_add_(0, row[part], made)
        return (out + self.shared(rows)).reshape(x.shape)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.between, self.mlp = nn.LayerNorm(WIDTH), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class Routed(Decoder):
    """A decoder of such layers."""

    def __init__(self) -> None:
        super().__init__((Layer() for _ in range(DEPTH)), WIDTH)


def make(kind: str = "routed", *, checkpointing: str = "off", way: str = "in-order", never: tuple[int, ...] = ()):
    """Return a model in training mode. ``checkpointing``: as in tests/support/training.py. Of a "routed": ``way``: how
    its experts are visited; ``never``: experts that no token is sent to.
    """
    torch.manual_seed(0)
    if kind == "routed":
        model = Routed()
        stacks, embeddings = [model.layers], [model.embed]
        for layer in model.layers:
            layer.mlp.way = way
            layer.mlp.router.bias.data[list(never)] = -100.0
    else:
        base = _nllb() if kind == "nllb" else _switch()
        lora = LoraConfig(
            r=4,
            lora_dropout=0.1 if kind == "nllb" else 0.0,
            init_lora_weights=False,
            target_modules=["q_proj", "v_proj"] if kind == "nllb" else ["q", "v", "wi", "wo"],
        )
        model = get_peft_model(base, lora)
        halves = (base.model.encoder, base.model.decoder) if kind == "nllb" else (base.encoder, base.decoder)
        stacks = [half.layers if kind == "nllb" else half.block for half in halves]
        embeddings = [half.embed_tokens for half in halves]
    if checkpointing != "off":
        # A reentrant checkpoint gives gradients only where an input asks for one.
        for embedding in embeddings:
            embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
        for stack in stacks:
            for layer in stack:
                checkpoint_layer(layer, checkpointing)
    return model.train()


def batch_of(kind: str, seed: int = 3, shape: tuple[int, int] = (1, 4)) -> dict[str, torch.Tensor]:
    """Return a micro-batch, by default of so few tokens that not every expert gets one."""
    tokens = torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
    if kind == "routed":
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.flip(-1)}


def _nllb() -> nn.Module:
    config = NllbMoeConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, num_experts=4, encoder_sparse_step=2,
        decoder_sparse_step=2, expert_capacity=8, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        moe_token_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0, max_position_embeddings=32,
        use_cache=False, dtype="float32",
    )  # fmt: skip
    return NllbMoeForConditionalGeneration(config)


def _switch() -> nn.Module:
    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=12, d_ff=96, num_layers=2, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=1, num_heads=4, num_experts=4, expert_capacity=8,
        dropout_rate=0.0, decoder_start_token_id=0, use_cache=False, dtype="float32", router_jitter_noise=0.0,
    )  # fmt: skip
    return SwitchTransformersForConditionalGeneration(config)
