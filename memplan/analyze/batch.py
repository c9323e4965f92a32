"""A batch as the user gives it -> what the model is called with, on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.analyze.fake import fake_of
from memplan.errors import InputError
from memplan.triggers import tensors_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return its tensors, each once."""
        return tuple({id(tensor): tensor for tensor in tensors_in((self.args, self.kwargs))}.values())

    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tokens(self) -> int:
        """Return the tokens of the batch, or its samples where there is no sequence."""
        ids = next((self.kwargs[n] for n in ("input_ids", "inputs_embeds") if self.kwargs.get(n) is not None), None)
        if isinstance(ids, torch.Tensor) and ids.dim() >= 2:
            return int(ids.shape[0] * ids.shape[1])
        first = next(iter(self.tensors()))
        if not first.dtype.is_floating_point and first.dim() == 2:
            return int(first.shape[0] * first.shape[1])
        return int(first.shape[0]) if first.dim() else 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name, or by its place where it has none."""
        named = [*enumerate(self.args), *self.kwargs.items()]
        found: dict[str, tuple[int, ...]] = {}
        for name, value in named:
            held = list(tensors_in(value))
            for place, tensor in enumerate(held):
                found[str(name) if len(held) == 1 else f"{name}.{place}"] = tuple(tensor.shape)
        return found

    def faked(self, mode: FakeTensorMode) -> Batch:
        """Return the same with fake tensors."""

        return self.changed(lambda tensor: fake_of(tensor, mode))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the same with each tensor changed; what required a gradient does so again."""

        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                made = change(value.detach())
                return made.requires_grad_() if value.requires_grad else made
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return type(value)(*(changed(part) for part in value))
            if isinstance(value, (tuple, list)):
                return type(value)(changed(part) for part in value)
            if isinstance(value, Mapping):
                return {name: changed(part) for name, part in value.items()}
            return value

        return Batch(args=changed(self.args), kwargs=changed(self.kwargs))


def batch_for(model: nn.Module, given: object) -> Batch:
    """Return the call that ``given`` stands for.

    A mapping is given as keywords; a tensor, tuple or list as positions; a (batch, sequence) pair of whole numbers
    makes the tensors that a language model is trained on. Raises InputError for anything else.
    """
    if is_shape(given):
        return _from_shape(model, *given)  # type: ignore[misc]
    if isinstance(given, Mapping):
        batch = Batch(args=(), kwargs={str(name): value for name, value in given.items()})
    elif isinstance(given, torch.Tensor):
        batch = Batch(args=(given,), kwargs={})
    elif isinstance(given, (tuple, list)):
        batch = Batch(args=tuple(given), kwargs={})
    else:
        raise InputError(
            f"the batch is a {type(given).__name__}: give a mapping of tensors, a tuple of tensors, or a "
            "(batch, sequence) pair"
        )
    if not batch.tensors():
        raise InputError("the batch holds no tensor: give one micro-batch, or a (batch, sequence) pair")
    return batch


def random_tokens(model: nn.Module, call: Batch) -> Batch:
    """Return the call that a shape stands for with tokens of the whole vocabulary: zeros would all take one way."""
    config: Any = base_of(model).config
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 2
    tokens = {
        name: torch.randint(0, vocabulary, tuple(tensor.shape))
        for name, tensor in call.kwargs.items()
        if name in ("input_ids", "decoder_input_ids", "labels") and tensor.dim() == 2
    }
    return Batch(args=call.args, kwargs={**call.kwargs, **tokens})


def is_shape(given: object) -> bool:
    """Whether a batch is given as (batch, sequence)."""
    return (
        isinstance(given, (tuple, list))
        and len(given) == 2
        and all(isinstance(size, int) and not isinstance(size, bool) for size in given)
    )


def _from_shape(model: nn.Module, batch: int, sequence: int) -> Batch:
    if batch < 1 or sequence < 1:
        raise InputError(f"the batch was given as ({batch}, {sequence}): both must be at least 1")
    base = base_of(model)
    takes = inspect.signature(base.forward).parameters
    if getattr(base, "config", None) is None or "input_ids" not in takes:
        raise InputError(
            f"the batch was given as a shape, but {type(base).__name__} takes no input_ids: give a mapping of tensors"
        )
    named = getattr(base.config, "max_position_embeddings", None)
    limit = named if isinstance(named, int) else 0
    # Rotary positions go on beyond it; a table of learned ones (with a few rows more in OPT and BERT's kin) does not.
    learned = limit > 0 and any(
        isinstance(module, nn.Embedding) and limit <= module.num_embeddings < limit + 4
        for name, module in base.named_modules()
        if "position" in name or name.endswith("wpe")
    )
    if learned and sequence > limit:
        raise InputError(
            f"the batch was given as ({batch}, {sequence}), but {type(base).__name__} knows {limit} positions: give "
            "shorter sequences, or a configuration with more (max_position_embeddings)"
        )
    ids = torch.zeros(batch, sequence, dtype=torch.long)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "labels" in takes:
        per_sample = type(base).__name__.endswith(("ForSequenceClassification", "ForMultipleChoice"))
        kwargs["labels"] = torch.zeros(batch, dtype=torch.long) if per_sample else torch.zeros_like(ids)
    elif "decoder_input_ids" in takes:
        kwargs["decoder_input_ids"] = torch.zeros_like(ids)
    return Batch(args=(), kwargs=kwargs)


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
