"""What trainers and PEFT set on a model before its first step, for models that are planned from their configuration.

[Note: use_cache] transformers' Trainer sets ``model.config.use_cache`` to its argument of that name, False by default,
and on that one configuration alone: what a model holds as a configuration of its own (the text part of a multimodal
model, the copy of T5's decoder) keeps its value, and its key-value cache is kept in training. TRL's trainers call the
model with ``use_cache=False`` besides, so theirs keep none. A module that is given is planned as it is.

[Note: k-bit preparation] It is PEFT's own function that prepares the model, on ``meta``: what it casts and what it
leaves (GPTQ's, torchao's) is its own to say.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from memplan.analyze.inputs.batch import base_of, batch_for, is_shape
from memplan.errors import InputError, ModelError, first_line
from memplan.hooks.tiled_heads import fused_head, head_of_outputs
from memplan.model.calls import Call

NO_CACHE = (
    "Planned as transformers' Trainer trains it, without a key-value cache (it sets config.use_cache to False): a "
    "loop of your own must do the same, or needs more than is predicted."
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
            f"{parts[0]} has a configuration of its own with use_cache=True, which transformers' Trainer leaves as "
            "it is: where it keeps a key-value cache, that is counted. TRL's trainers keep none: for those, set it "
            "to False in the configuration and plan again.",
        )
    return (NO_CACHE,) if before else ()


def _has_own_cache(module: nn.Module, outer: object) -> bool:
    config = getattr(module, "config", None)
    return hasattr(config, "model_type") and config is not outer and bool(getattr(config, "use_cache", None))


def called_by(trainer: str, model: nn.Module, batch: Any) -> Any:
    """Return what a trainer's loss calls a model of ours with, for a (batch, sequence) shape, in which a pair of DPO
    counts as one sequence; the model then has what the trainer adds to it. ``batch`` where that is nothing.

    Raises InputError where TRL is not installed, or the model has no head that it could give its tiles.
    """
    if not trainer.startswith("trl-"):
        return batch
    try:
        add = fused_head()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the trainer was given as {trainer}, but the TRL that is installed has none of its fused heads "
            f"({first_line(error)}): install trl 1.16 or later, or leave trainer out"
        ) from error
    if not isinstance(batch, (tuple, list)) or not is_shape(batch):
        raise InputError(f"the trainer {trainer} is planned for texts: give the batch as (batch, sequence)")
    base = base_of(model)
    head = head_of_outputs(base)
    if head is None:
        raise InputError(f"{type(base).__name__} has no linear head over a vocabulary, which {trainer} trains with")
    outputs = ("log_probs", "entropy", "is_top1") if trainer == "trl-sft" else ("log_probs",)
    rows = batch[0] if trainer == "trl-sft" else 2 * batch[0]  # the chosen ones and the rejected
    call = batch_for(model, (rows, *batch[1:])).calls[0]
    add(base, outputs=outputs)
    return Call(**call.kwargs, fused_lm_head=True)


def with_checkpointing(model: nn.Module, *, kbit: bool, wanted: bool | None) -> None:
    """Prepare a model that is ours for k-bit training as PEFT does, and turn gradient checkpointing on.

    ``wanted``: whether to do the latter; None: as PEFT's function does of itself, which is for a quantized base alone.
    Raises InputError for a model of diffusers, ModelError for one that cannot be checkpointed.
    """
    if not kbit and not wanted:
        return
    held: Any = model
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise InputError(
            f"{type(model).__name__} is no model of transformers, which kbit and gradient_checkpointing are for: "
            "leave them out, or give the nn.Module as it is trained"
        )
    if kbit:
        from peft import prepare_model_for_kbit_training

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by a name that is going away
            if kbit:
                # Reentrant is what PEFT leaves torch to choose, with a warning.
                prepare_model_for_kbit_training(
                    held,
                    use_gradient_checkpointing=wanted is not False,
                    gradient_checkpointing_kwargs={"use_reentrant": True},
                )
            if wanted and not held.is_gradient_checkpointing:
                held.gradient_checkpointing_enable()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"gradient checkpointing cannot be turned on for {type(model).__name__} ({first_line(error)}): give "
            "gradient_checkpointing=False"
        ) from error


def kbit_notes(model: nn.Module, *, kbit: bool, autocast: torch.dtype | None) -> tuple[str, ...]:
    """Return what a plan of a model that is ours assumes where it is quantized or prepared for k-bit training."""
    method = getattr(model, "quantization_method", None)
    under = "without autocast" if autocast is None else f"under autocast to {str(autocast).removeprefix('torch.')}"
    if kbit:
        halves = any(p.dtype in (torch.float16, torch.bfloat16) and not p.requires_grad for p in model.parameters())
        cast = f"casts nothing of a {_text(method)} base" if halves else "what is not quantized is in float32"
        checkpointing = "with" if getattr(model, "is_gradient_checkpointing", False) else "without"
        return (
            f"Planned as PEFT's prepare_model_for_kbit_training leaves it ({cast}), {checkpointing} gradient "
            f"checkpointing, {under}.",
        )
    if method is None:
        return ()
    return (
        "Planned as its quantizer loads it, without PEFT's prepare_model_for_kbit_training (what is not quantized "
        f"stays as it is), {under}: QLoRA as PEFT documents it needs more, see --qlora and --kbit (qlora=True, "
        "kbit=True).",
    )


def _text(kind: object) -> str:
    return str(getattr(kind, "value", kind))
