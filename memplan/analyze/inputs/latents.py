"""What a pipeline of diffusers calls its transformer or U-Net with, for images or videos of a size in pixels.

Shapes follow from the model's configuration and from the names of what its forward takes; how much smaller than a video
its latents are is the autoencoder's to say, where that lies beside it (``vae``), else it is what its kind is used with.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import InputError

SIZES = ("batch", "height", "width", "frames", "seq")
"""What a shape of images or videos may say: pixels, frames, and tokens of the text."""

_FACTORS = {
    "Sana": (32, 1), "SanaVideo": (8, 4), "HunyuanImage": (32, 1), "LTXVideo": (32, 8), "Mochi": (8, 6),
    "Flux2": (8, 1), "Flux3": (8, 1),
}  # fmt: skip
"""Pixels of a latent across and frames of one, by the beginning of a class's name."""
_USUAL_FACTORS = (8, 4)
_PIXELS = {"image": (1024, 1024, 1), "video": (480, 832, 81)}
_TEXT = {"UNet2DConditionModel": 77, "ControlNetModel": 77, "SD3Transformer2DModel": 333}
_USUAL_TEXT = 512
_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask")
_TEXT_WIDTHS = (
    "caption_channels", "cap_feat_dim", "joint_attention_dim", "text_dim", "text_embed_dim", "in_text_dim",
    "cross_attention_dim", "context_in_dim",
)  # fmt: skip
_TEXT_LENGTHS = ("max_text_seq_length", "text_len", "max_sequence_length")
_PACKED = ("img_ids", "img_shapes", "num_frames")
"""A forward that takes one of these has its latents as a sequence of patches."""


def is_of_diffusers(model: nn.Module) -> bool:
    """Whether a model is one of diffusers', whose configuration is not transformers'."""
    return callable(getattr(model, "register_to_config", None)) and not hasattr(model.config, "model_type")


def call_for(model: nn.Module, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the keywords that a pipeline would call a model of diffusers with. ``sizes``: see :data:`SIZES`.

    Raises InputError for sizes that the model cannot take, or a forward that takes more than is known here.
    """
    return _Call(model, sizes).keywords()


class _Call:
    def __init__(self, model: nn.Module, sizes: Mapping[str, int]) -> None:
        held: Any = model
        self.name, self.config = type(model).__name__, held.config
        self.takes = inspect.signature(held.forward).parameters
        self.dtype = _main_dtype(model)
        self.rows = sizes["batch"]
        patches = self.config.get("patch_size")
        self.is_video = "3D" in self.name or "Video" in self.name
        self.is_packed = any(name in self.takes for name in _PACKED)
        across, deep = self._factors()
        patch = patches if isinstance(patches, (list, tuple)) else (self.config.get("patch_size_t") or 1, patches or 1)
        step = across * (2 if self._is_folded() else patch[-1] if not self.is_packed else 1)
        if "UNet" in self.name:
            step = across * 2 ** (len(self.config["block_out_channels"]) - 1)
        usual = _PIXELS["video" if self.is_video else "image"]
        side = self.config.get("sample_size")
        if isinstance(side, int) and not self.is_video:
            usual = (side * across, side * across, 1)
        height, width, frames = (sizes.get(n) or at for n, at in zip(SIZES[1:4], usual, strict=True))
        if not self.is_video and frames != 1:
            raise InputError(f"{frames} frames were given, but {self.name} makes images: leave the frames out")
        for what, size in (("height", height), ("width", width)):
            if size % step:
                raise InputError(
                    f"the {what} was given as {size} pixels, but {self.name} takes multiples of {step}: give "
                    f"{size // step * step or step} or {(size // step + 1) * step}"
                )
        self._shown = 2 ** (len(self.config.get("conditioning_embedding_out_channels") or (0,) * 4) - 1)
        """Pixels of what steers a ControlNet to a latent across."""
        self.height, self.width, self.frames = height // across, width // across, (frames - 1) // deep + 1
        self.text = sizes.get("seq") or next(
            (self.config[n] for n in _TEXT_LENGTHS if isinstance(self.config.get(n), int)),
            _TEXT.get(self.name, _USUAL_TEXT),
        )

    def keywords(self) -> dict[str, Any]:
        known = self._known()
        needed = {
            name
            for name, parameter in self.takes.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        }
        self._refuse(name for name in self.takes if name in needed - known.keys())
        made = {name: known[name]() for name in self.takes if name in known}
        self._refuse(name for name, tensor in made.items() if tensor is None and name in needed)
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def _refuse(self, names: Iterable[str]) -> None:
        if missing := ", ".join(names):
            raise InputError(
                f"the batch was given as a shape, but {self.name} takes {missing} besides, which follows from no size "
                "in pixels: give a mapping of all its tensors"
            )

    def _known(self) -> dict[str, Callable[[], Any]]:
        tokens = self._tokens()
        known: dict[str, Callable[[], Any]] = {
            "hidden_states": self._latents,
            "sample": self._latents,
            "x": lambda: list(self._floats(self._channels(), self.frames, self.height, self.width)),
            "cap_feats": lambda: list(self._floats(self.text, self._text_width())),
            "timestep": lambda: torch.zeros(self.rows, dtype=self.dtype),
            "t": lambda: torch.zeros(self.rows, dtype=self.dtype),
            "encoder_hidden_states": self._embedded_text,
            "encoder_hidden_states_t5": lambda: self._floats(self.text, self.config["cross_attention_dim_t5"]),
            "encoder_hidden_states_image": self._embedded_image,
            "text_embedding_mask_t5": lambda: self._ones(self.text),
            "pooled_projections": self._pooled,
            "guidance": self._guidance,
            "img_ids": lambda: torch.zeros(tokens, self._axes()),
            "txt_ids": lambda: torch.zeros(self.text, self._axes()),
            "img_shapes": lambda: [[(self.frames, self.height // 2, self.width // 2)]] * self.rows,
            "num_frames": lambda: self.frames,
            "height": lambda: self.height,
            "width": lambda: self.width,
            "class_labels": self._classes,
            "added_cond_kwargs": self._conditions,
            "controlnet_cond": lambda: self._floats(3, self._shown * self.height, self._shown * self.width),
            "image_rotary_emb": lambda: self._rotary(tokens),
        }
        if "sample" not in self.takes:  # U-Nets are called without
            known |= dict.fromkeys(_MASKS, lambda: self._ones(self.text))
        known |= dict.fromkeys(("original_size", "target_size", "crop_coords"), lambda: self._floats(2))
        return known

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _factors(self) -> tuple[int, int]:
        """Return the pixels of a latent across, and the frames of one but for the first."""
        kind = max((known for known in _FACTORS if self.name.startswith(known)), key=len, default="")
        across, deep = _FACTORS.get(kind, _USUAL_FACTORS)
        beside = Path(str(getattr(self.config, "_name_or_path", "") or self.config.get("_name_or_path") or "")).parent
        with suppress(OSError, ValueError):
            vae = json.loads((beside / "vae" / "config.json").read_text())
            if isinstance(blocks := vae.get("block_out_channels"), list):
                across = 2 ** (len(blocks) - 1)
            across = vae.get("spatial_compression_ratio") or vae.get("scale_factor_spatial") or across
            deep = vae.get("temporal_compression_ratio") or vae.get("scale_factor_temporal") or deep
        return (across, deep) if self.is_video else (across, 1)

    def _is_folded(self) -> bool:
        """Whether a pipeline folds two by two latents into one token before it calls the model, as FLUX's does."""
        return self.is_packed and "num_frames" not in self.takes

    def _tokens(self) -> int:
        if self.is_packed:
            return self.frames * self.height * self.width // (4 if self._is_folded() else 1)
        patch = self.config.get("patch_size") or 1
        deep = self.config.get("patch_size_t") or 1
        sides: tuple[int, ...] = tuple(patch) if isinstance(patch, (list, tuple)) else (deep, patch, patch)
        return int(self.frames * self.height * self.width // prod(sides))

    def _channels(self) -> int:
        if not isinstance(self.config.get("in_channels"), int):
            raise InputError(
                f"the batch was given as a shape, but the configuration of {self.name} does not say how many channels "
                "its latents have: give a mapping of tensors"
            )
        return int(self.config["in_channels"])

    def _axes(self) -> int:
        return len(self.config.get("axes_dims_rope") or (0, 0, 0))

    def _text_width(self) -> int:
        width = next((self.config[n] for n in _TEXT_WIDTHS if isinstance(self.config.get(n), int)), None)
        if width is None:
            raise InputError(
                f"the batch was given as a shape, but the configuration of {self.name} does not say how wide its text "
                "is: give a mapping of tensors"
            )
        return int(width)

    # ---- tensors -----------------------------------------------------------------------------------------------------

    def _floats(self, *shape: int) -> torch.Tensor:
        return torch.zeros(self.rows, *shape, dtype=self.dtype)

    def _ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(self.rows, *shape, dtype=torch.long)

    def _latents(self) -> torch.Tensor:
        if self.is_packed:
            return self._floats(self._tokens(), self._channels())
        if not self.is_video:
            return self._floats(self._channels(), self.height, self.width)
        if self.name.startswith("CogVideoX"):
            return self._floats(self.frames, self._channels(), self.height, self.width)
        return self._floats(self._channels(), self.frames, self.height, self.width)

    def _embedded_text(self) -> torch.Tensor | None:
        if not any(isinstance(self.config.get(name), int) for name in _TEXT_WIDTHS) and "UNet2DModel" in self.name:
            return None
        return self._floats(self.text, self._text_width())

    def _embedded_image(self) -> torch.Tensor | None:
        width = self.config.get("image_dim")
        return None if not width else self._floats(257, width)

    def _pooled(self) -> torch.Tensor | None:
        width = self.config.get("pooled_projection_dim")
        return None if not width else self._floats(width)

    def _guidance(self) -> torch.Tensor | None:
        wanted = self.config.get("guidance_embeds", False)
        return torch.zeros(self.rows, dtype=self.dtype) if wanted else None

    def _classes(self) -> torch.Tensor | None:
        wanted = self.config.get("num_class_embeds") or self.config.get("num_embeds_ada_norm")
        return torch.zeros(self.rows, dtype=torch.long) if wanted else None

    def _conditions(self) -> dict[str, torch.Tensor | None] | None:
        """Return what a U-Net or PixArt is told of sizes; else None."""
        if self.config.get("addition_embed_type") == "text_time":
            pooled = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
            return {"text_embeds": self._floats(pooled), "time_ids": self._floats(6)}
        if "PixArt" not in self.name:
            return None
        conditions = self.config.get("use_additional_conditions")
        if conditions is None:
            conditions = self.config.get("sample_size") == 128  # as diffusers has it
        if conditions:
            return {"resolution": self._floats(2), "aspect_ratio": self._floats(1)}
        return {"resolution": None, "aspect_ratio": None}

    def _rotary(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.name.startswith("CogView") or self.config.get("use_rotary_positional_embeddings") is False:
            return None
        if not self.name.startswith(("HunyuanDiT", "CogVideoX")):
            return None
        width = self.config["attention_head_dim"]
        return torch.zeros(tokens, width), torch.zeros(tokens, width)


def _main_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating-point dtype of most of a model's weights: a few are kept in float32."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.dtype.is_floating_point:
            counts[parameter.dtype] += parameter.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
