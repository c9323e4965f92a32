"""The adapter that a model gets: PEFT's, by a configuration of its own or by rank and targets."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from memplan.errors import InputError, first_line
from memplan.model.arguments import ALL_LINEAR, DEFAULT_TARGETS

_ADAPTER_KEYS = ("rank", "targets", "alpha", "dropout")


def with_adapter(model: nn.Module, adapter: Any, *, real: bool = False) -> nn.Module:
    """Return the model, which is ours, with a PEFT adapter.

    ``adapter``: a PEFT configuration, or ``{"rank": 16, "targets": "all-linear", "alpha": 32}``. ``real``: the adapter
    holds its values; else it is on ``meta``. Raises InputError for what does not fit.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "an adapter is added with peft, which is not installed: pip install peft, or give a model that "
            "has its adapter"
        ) from error
    if getattr(model, "peft_config", None):
        raise InputError("the model has an adapter already: leave adapter= out")
    config: Any
    if isinstance(adapter, Mapping):
        config = _lora(peft, model, adapter)
    elif isinstance(adapter, peft.PeftConfig):
        config = copy.deepcopy(adapter)
        if getattr(config, "target_modules", None) == ALL_LINEAR and not hasattr(model, "get_output_embeddings"):
            config.target_modules = _linear_names(model)
    else:
        raise InputError(
            f"the adapter is a {type(adapter).__name__}: give a PEFT configuration or "
            '{"rank": 16, "targets": "all-linear"}'
        )
    try:
        with nullcontext() if real else torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
            warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)  # it sets it right itself
            adapted: nn.Module = peft.get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"the adapter does not fit {type(model).__name__}: {first_line(error)}") from error
    return adapted


def _lora(peft: Any, model: nn.Module, given: Mapping[str, Any]) -> Any:
    unknown = [key for key in given if key not in _ADAPTER_KEYS]
    if unknown:
        raise InputError(f"the adapter has {unknown[0]!r}: it may have {', '.join(_ADAPTER_KEYS)}")
    rank = given.get("rank", 16)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"the adapter's rank was given as {rank!r}: give a whole number, at least 1")
    targets = given.get("targets", ALL_LINEAR)
    if targets == DEFAULT_TARGETS:
        targets = _default_targets(peft, model)
    if targets == ALL_LINEAR and not hasattr(model, "get_output_embeddings"):
        targets = _linear_names(model)
    left_out = _unfit_for_lora(peft, model) if targets == ALL_LINEAR else []
    return peft.LoraConfig(
        r=rank,
        exclude_modules=left_out or None,
        lora_alpha=given.get("alpha", 2 * rank),
        lora_dropout=given.get("dropout", 0.0),
        target_modules=targets if isinstance(targets, str) else list(targets),
    )


def _default_targets(peft: Any, model: nn.Module) -> str | list[str]:
    """Return where an adapter goes whose targets are not given: on all linear layers; of a model with experts, whose
    adapters would be far more than all others, where PEFT's own default for its type is, else on attention.
    """
    if not any(name.rsplit(".", 1)[-1] == "experts" for name, _ in model.named_modules()):
        return ALL_LINEAR
    kinds = [getattr(getattr(inner, "config", None), "model_type", None) for inner in model.modules()]
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found = next((known[kind] for kind in kinds if kind in known), None)
    if found:
        return list(found)
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"attn|attention", name) and not _is_router(module)
    }
    return sorted(names) or ALL_LINEAR


def _unfit_for_lora(peft: Any, model: nn.Module) -> list[str]:
    """Return the last parts of the names of linear layers that ``all-linear`` would name, and PEFT cannot adapt.

    Routers whose forward gives more than a tensor, and what the kernels of its type read for themselves.
    """
    refused = getattr(peft.tuners.tuners_utils, "_check_lora_target_modules_mamba", None)
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        own = name.rsplit(".", 1)[-1]
        if not isinstance(module, nn.Linear) or own in found:
            continue
        try:
            if refused is not None:
                refused(peft.LoraConfig(), model, own)
        except ValueError:
            found[own] = None
        if _is_router(module):
            found[own] = None
    return list(found)


def _is_router(module: nn.Module) -> bool:
    """Whether a linear layer is one that its library gave a forward of its own."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith(("transformers.", "diffusers."))


def _linear_names(model: nn.Module) -> list[str]:
    """PEFT knows ``all-linear`` for transformers' models only; for others, name them."""
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layer within it for an adapter: name the targets")
    return names
