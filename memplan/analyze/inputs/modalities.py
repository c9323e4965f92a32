"""The images and sounds that a model reads: their shapes, as its configuration has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import nn

from memplan.errors import InputError

SOUNDS = ("input_features", "input_values")


def image(model: nn.Module, batch: int) -> torch.Tensor:
    """Return images of the size that a model is configured for, (batch, channels, height, width), in its dtype.

    Raises InputError where the configuration names none.
    """
    size = _setting(model, "image_size", "input_size", "img_size")
    sides = [size, size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    channels = _setting(model, "num_channels", "in_channels", "in_chans")
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in (*sides, channels)):
        raise InputError(
            f"the batch was given as a shape, but {type(model).__name__} takes images, and its configuration does "
            "not say of what size (image_size, num_channels): give a mapping of tensors, such as {'pixel_values': "
            "images}"
        )
    return torch.zeros(batch, channels, *sides, dtype=_dtype_of(model))


def sound(model: nn.Module, batch: int, length: int | None) -> tuple[str, torch.Tensor, bool]:
    """Return the name of a model's sound, the sound in its dtype, and whether its length was taken from ``length``.

    Samples, (batch, length), or features of a spectrum: of the configured length where there is one, else ``length``.
    Raises InputError where neither the configuration nor ``length`` says of what shape.
    """
    name = str(getattr(model, "main_input_name", ""))
    config: Any = model.config
    dtype = _dtype_of(model)
    bins = getattr(config, "num_mel_bins", None)
    positions = getattr(config, "max_source_positions", None)
    if name == "input_features" and _is_size(bins) and _is_size(positions) and _halved(model, bins):
        return name, torch.zeros(batch, bins, 2 * positions, dtype=dtype), False  # two frames a position
    frames = getattr(config, "max_length", None)
    if name == "input_values" and _is_size(bins) and _is_size(frames):
        return name, torch.zeros(batch, frames, bins, dtype=dtype), False
    samples = name == "input_values" and isinstance(getattr(config, "conv_stride", None), (list, tuple))
    width = _setting(model, "input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins")
    if not samples and not (name == "input_features" and _is_size(width)):
        raise InputError(
            f"the batch was given as a shape, but {type(model).__name__} takes sound ({name}), and its configuration "
            f"does not say of what shape: give a mapping of tensors, such as {{'{name}': sound}}"
        )
    if length is None:
        raise InputError(
            f"the batch was given as ({batch},), but {type(model).__name__} takes sound of any length: give (batch, "
            f"{'samples' if samples else 'frames'})"
        )
    shape = (batch, length) if samples else (batch, length, width)
    return name, torch.zeros(shape, dtype=dtype), True


def _halved(model: nn.Module, bins: int) -> bool:
    """Whether a sound's bins come before its frames, and the second convolution has a stride of two, as in Whisper."""
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv1d)][:2]
    return len(convolutions) == 2 and convolutions[0].in_channels == bins and convolutions[1].stride == (2,)


def _setting(model: nn.Module, *names: str) -> Any:
    """Return the first setting of one of these names in a model's configuration, or in what it holds of others."""
    config: Any = model.config
    for holder in (config, *_within(config)):
        for name in names:
            found = getattr(holder, name, None)
            if found is not None:
                return found
    return None


def _within(config: Any) -> Iterator[Any]:
    for value in list(getattr(config, "__dict__", {}).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield value


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _dtype_of(model: nn.Module) -> torch.dtype:
    floats = (parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
    return next(floats, torch.float32)
