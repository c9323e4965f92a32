"""LitGPT's own model, as its fine-tuning script makes it, for rows measured with it: ``pip install litgpt``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PAD = 512
"""LitGPT pads its vocabulary to a multiple of this."""


def model(name: str, *, rank: int, targets: list[str], dropout: float, quantization: str) -> Any:
    """Return a model by LitGPT's name for it, on ``meta``, with its loss; call it with ids and labels.

    Raises ImportError where LitGPT is not installed.
    """
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

    where = {f"lora_{target}": True for target in targets}
    off = {f"lora_{target}": False for target in ("query", "key", "value", "projection", "mlp", "head")}
    config = Config.from_name(name, lora_r=rank, lora_alpha=16, lora_dropout=dropout, **{**off, **where})
    if "Gemma" not in name:  # Mistral's window is wider than any batch here, and its masks take minutes to trace
        config.sliding_window_size = None
    dtype, before = torch.bfloat16, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made = GPT(config)
    finally:
        torch.set_default_dtype(before)
    mark_only_lora_as_trainable(made)
    if quantization:
        _quantized(made, dtype)
    return _WithLoss(made.train())


class _WithLoss(nn.Module):
    """As ``litgpt.finetune.lora.fit`` computes it: the head for 128 tokens at a time, whose logits are all kept."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.model = inner

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        from litgpt.utils import chunked_cross_entropy

        self.model.max_seq_length = input_ids.shape[1]
        logits = self.model(input_ids, lm_head_chunk_size=128)
        logits = [chunk.float() for chunk in logits]  # what Fabric's convert_output does, to torch's default dtype
        logits[-1] = logits[-1][..., :-1, :]
        return {"loss": chunked_cross_entropy(logits, labels[..., 1:])}


def _quantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer, the head and those inside LoRA's too, as Lightning's plugin does."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, inner in list(module._modules.items()):
            if type(inner) is nn.Linear:
                with torch.device("meta"):
                    made = bnb.nn.Linear4bit(
                        inner.in_features,
                        inner.out_features,
                        bias=inner.bias is not None,
                        compute_dtype=dtype,
                        compress_statistics=False,
                        quant_type="nf4",
                    )
                made.to(dtype).requires_grad_(False)
                made.weight.data = made.weight.data.half()  # Lightning's plugin quantizes from that, whatever it was
                module._modules[name] = made
    from memplan.model.quantization import _with_bitsandbytes

    _with_bitsandbytes(model)
