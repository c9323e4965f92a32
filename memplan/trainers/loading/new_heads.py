"""Heads that a checkpoint holds nothing for (a reward, a classification): begun as transformers begins them."""

from __future__ import annotations

from typing import Any

from torch import nn


def may_be_new(model: nn.Module, names: list[str]) -> bool:
    """Whether a parameter that the checkpoint does not hold is a head's: what lies outside of transformers' base model.

    Within it the checkpoint's names were not understood, or it is not this model's.
    """
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return isinstance(base, nn.Module) and base is not model and not any(n.startswith(f"{prefix}.") for n in names)


def begin(model: Any, new: list[nn.Parameter]) -> None:
    """Give values to what is new, and to nothing else, drawing the random numbers that ``from_pretrained`` would."""
    from transformers.utils import logging

    theirs = {id(parameter) for parameter in new}
    own = [name for name, parameter in model.named_parameters() if id(parameter) in theirs]
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = id(tensor) not in theirs
    for module in model.modules():
        module._is_hf_initialized = False  # as after loading: each is asked, and draws for what is new alone
    model.initialize_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        del tensor._is_hf_initialized
    logging.get_logger("transformers.modeling_utils").warning(
        "%s: the checkpoint holds no %s: newly initialized, to be trained.", type(model).__name__, ", ".join(own)
    )
