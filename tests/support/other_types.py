"""Model types that are no causal language models, small, from their configurations: encoders and decoders, images,
sound, images with text, and diffusion. Each with an adapter and a batch.

A kind is called ``group/type``: ``image/vit``, ``speech/whisper``, ``diffusion/FluxTransformer2DModel``.
"""

from __future__ import annotations

import inspect
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from memplan.analyze.inputs.batch import batch_for
from tests.support import causal_types, diffusion_types

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
_FILE = json.loads(Path(__file__).with_suffix(".json").read_text())
_SETTINGS: dict[str, dict[str, object]] = _FILE["settings"]
"""What a kind needs beside the shrinking that all get; ``a.b`` is setting b of the configuration a."""
NOT_BUILT: dict[str, str] = _FILE["not built"]
"""Kinds that need more of their configuration or batch than a test of all at once can know, or a package that is
not here.
"""
LEAST = 150

_SMALL_LISTS = ("depths", "layers", "num_blocks", "encoder_depths")
_MORE = (
    (LAYERS, "num_hidden_layers num_layers encoder_layers decoder_layers depth num_blocks vision_num_hidden_layers"),
    (
        64,
        "encoder_hidden_size decoder_hidden_size vision_hidden_size projection_dim audio_embed_dim qformer_hidden_size",
    ),
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
    """The output's own loss, else a scalar of its first tensor that a gradient reaches."""
    loss = output.get("loss") if hasattr(output, "get") else None
    if loss is not None:
        return loss
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    first = next((leaf for leaf in leaves if leaf.requires_grad), leaves[0])
    return first.float().pow(2).mean()


def adapted(base: nn.Module) -> nn.Module:
    """Return the model with a LoRA adapter on its linear layers, else on its convolutions, else with some biases
    trained.
    """
    base.requires_grad_(False)
    without = type(base).__name__.startswith("MobileNet")  # it reads its convolutions' own settings
    for kinds in () if without else (("Linear", "Conv1D"), ("Conv2d",)):
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


# ---- configurations
# ----------------------------------------------------------------------------------------------------


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
    deep = getattr(config, "num_hidden_layers", None)
    for value, names in (*causal_types._FIELDS, *_MORE):
        for name in names.split():
            old = getattr(config, name, None)
            if type(old) is int:
                small = LAYERS if value == causal_types.LAYERS and name.endswith(("layers", "layer")) else value
                causal_types._put(config, name, min(small, old) if old else old)
    patch = getattr(config, "patch_size", None)
    patch = patch if type(patch) is int else patch[-1] if isinstance(patch, (list, tuple)) and patch else 0
    patch = patch if type(patch) is int else 0
    if patch > 16:
        causal_types._put(config, "patch_size", patch := 16)
    for name in ("image_size", "img_size"):
        size = getattr(config, name, None)
        small = 4 * patch if patch > 4 else 64
        if type(size) is int:
            causal_types._put(config, name, small)
        elif isinstance(size, (list, tuple)):
            causal_types._put(config, name, [small] * len(size))
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif name in causal_types._SPECIAL and value is not None:
            causal_types._put(config, name, causal_types._SPECIAL.index(name) % 3)
        elif type(value) is int and name.endswith(("token_id", "token_index")) and value >= 10:
            causal_types._put(config, name, _token(name))
        elif isinstance(value, float) and ("drop" in name or name.startswith(("mask_time_prob", "mask_feature_prob"))):
            causal_types._put(config, name, 0.0)
        elif isinstance(value, (list, tuple)) and name in _SMALL_LISTS and all(isinstance(v, int) for v in value):
            causal_types._put(config, name, type(value)(min(v, 2) for v in value))
        elif isinstance(value, (list, tuple)) and deep and len(value) == deep and deep > LAYERS:
            causal_types._put(config, name, causal_types._spread(value, LAYERS))
    head = getattr(config, "head_dim", None) or 16
    for rope in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        wants = config.model_type.startswith(("qwen2_vl", "qwen2_5", "glm", "paddleocr"))  # and it is not always said
        if isinstance(rope, dict) and ("mrope_section" in rope or wants):
            rope["mrope_section"] = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    for name in ("apply_spec_augment", "use_cache"):
        if hasattr(config, name):
            causal_types._put(config, name, False)


def _token(name: str) -> int:
    """Return a number for a special token, from 6 on: that of an image's or a sound's place is 5."""
    place = name.startswith(("image_token", "audio_token", "media_", "boi_")) and not name.startswith("boi_")
    return 5 if place else 6 + sum(map(ord, name)) % 60


def _build(group: str, name: str) -> nn.Module:
    made = _GROUPS[group][name]
    cls = getattr(transformers, made if isinstance(made, str) else made[0])
    config = config_of(group, name)
    for names in ("decoder_start_token_id", "pad_token_id", "vision_start_token_id"):
        if getattr(config, names, None) is None:
            causal_types._put(config, names, 0)
    if hasattr(config, "vocab_size") and group == "ctc" and config.vocab_size is None:
        config.vocab_size = 32
    return cls._from_config(config, dtype=torch.float32)


# ---- batches
# -----------------------------------------------------------------------------------------------------------


def _batch(base: nn.Module, group: str) -> dict[str, object]:
    """Return a batch of the shapes that memplan makes of a shape, of random values, with images or sound where it
    takes them.
    """
    takes = inspect.signature(base.forward).parameters
    shapes = {"image": (ROWS,), "ctc": (ROWS, 4000 if "input_values" in takes else 64)}
    shape = shapes.get("ctc" if group in ("audio", "speech") and "input_ids" not in takes else group, (ROWS, LENGTH))
    if group == "image" and not hasattr(base.config, "image_size"):
        batch = {"pixel_values": torch.zeros(ROWS, getattr(base.config, "num_channels", 3), 64, 64)}
        batch["labels"] = torch.zeros(ROWS, dtype=torch.long)
    else:
        batch = batch_for(base, shape).calls[0].kwargs
    vocabulary = _setting(base.config, "vocab_size") or 5
    generator = torch.Generator().manual_seed(3)

    def filled(name, tensor):
        if tensor.dtype.is_floating_point:
            return torch.randn(tensor.shape, generator=generator)
        if name == "attention_mask":
            return torch.ones_like(tensor)
        if tensor.dim() == 1:
            return torch.randint(0, getattr(base.config, "num_labels", 2), tensor.shape, generator=generator)
        return torch.randint(min(70, vocabulary // 2), vocabulary, tensor.shape, generator=generator)

    batch = {name: filled(name, tensor) for name, tensor in batch.items()}
    if group in ("image-text", "seq2seq", "speech") and "input_ids" in batch:
        batch = next((found for more in _more(base, takes) if (found := _runs(base, batch, more))), batch)
    return batch


def _more(base: nn.Module, takes) -> Iterator[dict[str, torch.Tensor]]:
    """Yield images and sounds in the forms that processors give them."""
    config = base.config
    vision = getattr(config, "vision_config", config)
    side = _setting(vision, "image_size") or 64
    side = side[0] if isinstance(side, (list, tuple)) else side
    channels = _setting(vision, "num_channels", "in_channels", "in_chans") or 3
    patch = _setting(vision, "patch_size") or 16
    if "pixel_values" in takes:
        image = torch.randn(ROWS, channels, side, side)
        sizes = torch.tensor([[side, side]] * ROWS)
        if "image_grid_thw" in takes and type(patch) is int:
            values = channels * patch**2 * (_setting(vision, "temporal_patch_size") or 1)
            yield {"pixel_values": torch.randn(ROWS * 16, values), "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS)}
            yield {
                "pixel_values": torch.randn(ROWS * 16, channels, patch, patch),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
            }
        if "image_sizes" in takes:
            yield {"pixel_values": image, "image_sizes": sizes}
            yield {"pixel_values": image[:, None].expand(-1, 3, -1, -1, -1).clone(), "image_sizes": sizes}
        yield {"pixel_values": image}
        yield {"pixel_values": image[:, None]}
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel", "input_dim", "feature_size") or 80
    frames = 2 * (_setting(config, "max_source_positions") or 32)
    for name in ("input_features", "input_values"):
        for mask in ("feature_attention_mask", "input_features_mask", None):
            if name in takes and (mask is None or mask in takes):
                for shape in ((ROWS, bins, frames), (ROWS, frames, bins)):
                    ones = {} if mask is None else {mask: torch.ones(ROWS, frames, dtype=torch.long)}
                    yield {name: torch.randn(shape), **ones}
    if "input_values" in takes:
        yield {"input_values": torch.randn(ROWS, 1, 4000)}


def _runs(base: nn.Module, batch: dict[str, object], more: dict[str, object]) -> dict[str, object] | None:
    """Return the batch with ``more`` and as many places for it among the tokens as the model asks for, or None."""
    for places in (0, 1):
        for _ in range(2):
            found = dict(batch)
            if places:
                ids = torch.cat([torch.full((ROWS, places), 5), batch["input_ids"]], dim=1)
                found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            if "mm_token_type_ids" in inspect.signature(base.forward).parameters:
                found["mm_token_type_ids"] = (found["input_ids"] == 5).long()
            try:
                with torch.no_grad(), warnings.catch_warnings(action="ignore"):
                    loss_of(base.train()(**found, **more))
                return {**found, **more}
            except Exception as error:
                asked = re.search(r"features:? (\d+)", str(error))
                if not places or asked is None or int(asked[1]) % ROWS:
                    break
                places = int(asked[1]) // ROWS
    return None


def _setting(config, *names: str):
    """Return the first such setting of a configuration, or of those within it."""
    for holder in (config, *_within(config)):
        for name in names:
            if getattr(holder, name, None) is not None:
                return getattr(holder, name)
    return None


def _within(config):
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield value
            yield from _within(value)
