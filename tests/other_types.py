"""Model types that are no causal language models, small, from their configurations: encoders and decoders, images, sound,
images with text, and diffusion. Each with an adapter and a batch.

A kind is called ``group/type``: ``image/vit``, ``speech/whisper``, ``diffusion/FluxTransformer2DModel``.
"""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memplan.analyze.batch import batch_for
from tests import causal_types, diffusion_types

ROWS, LENGTH, LAYERS = 2, 12, 3
_GROUPS = {
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "ctc": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    "image-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
KINDS = (
    *(f"{group}/{kind}" for group, names in _GROUPS.items() for kind in sorted(names)),
    *(f"diffusion/{name}" for name in diffusion_types.NAMES),
)
_SETTINGS: dict[str, dict[str, object]] = json.loads(Path(__file__).with_suffix(".json").read_text())["settings"]
"""What a kind needs beside the shrinking that all get; ``a.b`` is setting b of the configuration a."""

_SMALL_LISTS = ("depths", "layers", "num_blocks", "encoder_depths")
_MORE = (
    (LAYERS, "num_hidden_layers num_layers encoder_layers decoder_layers depth num_blocks vision_num_hidden_layers"),
    (64, "encoder_hidden_size decoder_hidden_size vision_hidden_size projection_dim audio_embed_dim qformer_hidden_size"),
    (4, "num_attention_heads encoder_num_attention_heads decoder_num_attention_heads"),
)


def make(kind: str) -> tuple[nn.Module, dict[str, object]]:
    """Return a small model of a kind with an adapter, in training mode, and a micro-batch."""
    group, _, name = kind.partition("/")
    torch.manual_seed(0)
    if group == "diffusion":
        base, batch = diffusion_types.make(name)
    else:
        base = _build(group, name)
        batch = None
    total = sum(p.numel() for p in base.parameters())
    if total > 60_000_000:
        raise RuntimeError(f"still {total / 1e6:.0f} million parameters")
    with torch.no_grad():  # some are built with weights that are never set: they come with a checkpoint
        for tensor in (*base.parameters(), *base.buffers()):
            if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
                tensor.copy_(torch.randn(tensor.shape) * 0.02)
    if batch is None:
        batch = _batch(base, group)
    return adapted(base), batch


def loss_of(output) -> torch.Tensor:
    """The output's own loss, else a scalar of its first tensor."""
    loss = output.get("loss") if hasattr(output, "get") else None
    if loss is not None:
        return loss
    first = output[0] if isinstance(output, tuple) else next(v for v in output.values() if v is not None)
    while isinstance(first, (list, tuple)):
        first = first[0]
    return first.float().pow(2).mean()


def adapted(base: nn.Module) -> nn.Module:
    """Return the model with a LoRA adapter on its linear layers, else on its convolutions, else with some biases trained."""
    base.requires_grad_(False)
    for kinds in (("Linear", "Conv1D"), ("Conv2d",)):
        targets = [name for name, module in base.named_modules() if _adaptable(name, module, kinds)]
        if not targets:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
                return get_peft_model(base, lora).train()
        except (ValueError, TypeError, AttributeError, NotImplementedError):
            base.requires_grad_(False)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(parameter.dim() == 1 and "norm" in name.lower())
    return base.train()


def _adaptable(name: str, module: nn.Module, kinds: tuple[str, ...]) -> bool:
    left = ("head", "router", "gate", "score", "cls", "classifier", "conv1d", "out_proj")
    plain = type(module).__name__ in kinds and getattr(module, "groups", 1) == 1
    return plain and ".experts" not in name and not name.endswith(left)


# ---- configurations ----------------------------------------------------------------------------------------------------


def config_of(group: str, name: str):
    config = CONFIG_MAPPING[name]()
    shrink(config)
    for key, value in {**_SETTINGS.get(name, {}), **_SETTINGS.get(f"{group}/{name}", {})}.items():
        *path, last = key.split(".")
        holder = config
        for part in path:
            holder = getattr(holder, part)
        if isinstance(holder, dict):
            holder[last] = value
        else:
            setattr(holder, last, value)
    return config


def shrink(config) -> None:
    """Make a configuration small, and what it holds of others; no dropout, no layer left out."""
    causal_types.shrink(config, LAYERS)
    for value, names in _MORE:
        for name in names.split():
            if type(getattr(config, name, None)) is int:
                causal_types._put(config, name, min(value, getattr(config, name)))
    patch = getattr(config, "patch_size", None)
    patch = patch if isinstance(patch, int) else max(patch) if isinstance(patch, (list, tuple)) and patch else 0
    if isinstance(patch, int) and patch > 16:
        causal_types._put(config, "patch_size", patch := 16)
    for name in ("image_size", "img_size"):
        size = getattr(config, name, None)
        small = 4 * patch if patch else 64
        if isinstance(size, int):
            causal_types._put(config, name, small)
        elif isinstance(size, (list, tuple)):
            causal_types._put(config, name, [small] * len(size))
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, float) and ("drop" in name or name.startswith(("mask_time_prob", "mask_feature_prob"))):
            causal_types._put(config, name, 0.0)
        elif isinstance(value, (list, tuple)) and name in _SMALL_LISTS and all(isinstance(v, int) for v in value):
            causal_types._put(config, name, type(value)(min(v, 2) for v in value))
    for name, value in {"apply_spec_augment": False, "use_cache": False, "num_feat_extract_layers": len(getattr(config, "conv_dim", ()) or ())}.items():  # fmt: skip
        if hasattr(config, name):
            causal_types._put(config, name, value)


def _build(group: str, name: str) -> nn.Module:
    made = _GROUPS[group][name]
    cls = getattr(transformers, made if isinstance(made, str) else made[0])
    config = config_of(group, name)
    return cls._from_config(config, dtype=torch.float32)


# ---- batches -----------------------------------------------------------------------------------------------------------


def _batch(base: nn.Module, group: str) -> dict[str, object]:
    takes = inspect.signature(base.forward).parameters
    shape: tuple[int, ...] = (ROWS, LENGTH)
    if group == "image":
        shape = (ROWS,)
    elif group in ("ctc", "audio", "speech") and "input_values" in takes:
        shape = (ROWS, 4000)
    elif group in ("ctc", "audio", "speech"):
        shape = (ROWS, 64)
    call = batch_for(base, shape)
    generator = torch.Generator().manual_seed(3)
    vocabulary = min(
        (s for c in (base.config, *_within(base.config)) for s in (getattr(c, "vocab_size", None),) if type(s) is int),
        default=5,
    )

    def filled(name, tensor):
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=generator)
        if name == "attention_mask":
            return torch.ones_like(tensor)
        low = 4 if vocabulary > 8 else 0
        many = getattr(base.config, "num_labels", 2) if tensor.dim() == 1 else vocabulary
        return torch.randint(low if tensor.dim() > 1 else 0, many, tensor.shape, generator=generator)

    return {name: filled(name, tensor) for name, tensor in call.kwargs.items()}


def _within(config):
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield value
            yield from _within(value)
