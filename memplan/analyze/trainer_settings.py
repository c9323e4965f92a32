"""What trainers set on a model before its first step, for models that are planned from their configuration.

[Note: use_cache] transformers' Trainer sets ``model.config.use_cache`` to its argument of that name, False by default, and
on that one configuration alone: what a model holds as a configuration of its own (the text part of a multimodal model, the
copy of T5's decoder) keeps its value, and its key-value cache is kept in training. TRL's trainers call the model with
``use_cache=False`` besides, so theirs keep none. A module that is given is planned as it is.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NO_CACHE = (
    "Planned as transformers' Trainer trains it, without a key-value cache (it sets config.use_cache to False): a loop of "
    "your own must do the same, or needs more than is predicted."
)


def as_in_training(model: nn.Module) -> tuple[str, ...]:
    """Set what a Trainer sets on a model that is ours; return what is to be said of it."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):  # a model of diffusers: its configuration cannot be changed, and has no cache
        return ()
    before = getattr(config, "use_cache", None)
    config.use_cache = False
    parts = sorted({name for name, module in model.named_modules() if _has_own_cache(module, config)}, key=len)
    if parts:
        return (
            f"{parts[0]} has a configuration of its own with use_cache=True, which transformers' Trainer leaves as it is: "
            "where it keeps a key-value cache, that is counted. TRL's trainers keep none; with any other, set it to False in "
            "the configuration and plan again.",
        )
    return (NO_CACHE,) if before else ()


def _has_own_cache(module: nn.Module, outer: object) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "model_type") and config is not outer and bool(getattr(config, "use_cache", None))
