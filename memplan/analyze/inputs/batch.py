"""A batch as the user gives it -> what the model is called with, on fake tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.analyze.inputs.latents import SIZES, call_for, is_of_diffusers
from memplan.analyze.inputs.modalities import SOUNDS, image, sound
from memplan.analyze.trace.fake import fake_of
from memplan.errors import InputError
from memplan.hooks.nested import changed, tensors_in
from memplan.model.calls import Call, Step

_TOKENS = 512
"""Tokens of a sequence of which no length is given."""
_SOUND_OF_A_TOKEN = 1000
"""Samples, or frames, of sound that a token stands for where labels are made: fewer than any model makes positions of.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What the model is called with in one pass: mostly once."""

    calls: tuple[Call, ...]
    as_it_is: bool = False
    """Whether the model is in the mode that it will be called in: else that is training mode."""
    reads_rest: bool = False
    """Whether what the calls do not come to is read as well, where nobody knows how."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return its tensors, each once."""
        given = [(call.args, call.kwargs) for call in self.calls]
        return tuple({id(tensor): tensor for tensor in tensors_in(given)}.values())

    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tokens(self) -> int:
        """Return the tokens of the batch, or its samples where there is no sequence."""
        return sum(map(_tokens_of, self.calls))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by its name, or by its place where it has none; with the name of the module
        that is called where that is not the model, and with the call's number where there are several.
        """
        found: dict[str, tuple[int, ...]] = {}
        for number, call in enumerate(self.calls):
            which = [str(number)] * (len(self.calls) > 1) + [call.entry] * bool(call.entry)
            for name, value in (*enumerate(call.args), *call.kwargs.items()):
                held = tensors_in(value)
                for place, tensor in enumerate(held):
                    named = str(name) if len(held) == 1 else f"{name}.{place}"
                    found[".".join((*which, named))] = tuple(tensor.shape)
        return found

    def faked(self, mode: FakeTensorMode) -> Batch:
        """Return the same with fake tensors."""

        return self.changed(lambda tensor: fake_of(tensor, mode))

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the same with each tensor changed; what required a gradient does so again."""

        def other(tensor: torch.Tensor) -> torch.Tensor:
            made = change(tensor.detach())
            return made.requires_grad_() if tensor.requires_grad else made

        calls = (Call.of(c.entry, changed(c.args, other), changed(c.kwargs, other)) for c in self.calls)
        return replace(self, calls=tuple(calls))


def _tokens_of(call: Call) -> int:
    ids = next((call.kwargs[n] for n in ("input_ids", "inputs_embeds") if call.kwargs.get(n) is not None), None)
    if isinstance(ids, torch.Tensor) and ids.dim() >= 2:
        return int(ids.shape[0] * ids.shape[1])
    first = next(iter(tensors_in((call.args, call.kwargs))), None)
    if first is None:
        return 0
    if not first.dtype.is_floating_point and first.dim() == 2:
        return int(first.shape[0] * first.shape[1])
    return int(first.shape[0]) if first.dim() else 1


def batch_for(model: nn.Module, given: object) -> Batch:
    """Return the call that ``given`` stands for.

    A mapping is given as keywords; a tensor, tuple or list as positions; a :class:`Call` as both. Whole numbers make
    the tensors that a model of transformers is trained on: (batch, sequence) tokens, (batch,) images of the configured
    size, (batch, length) sound, where the length is not configured. A mapping of whole numbers (``{"batch": 1,
    "height": 480, "width": 832, "frames": 81, "seq": 512}``) makes what a model of diffusers is called with. Raises
    InputError for anything else.
    """
    if is_shape(given):
        return _from_shape(model, *_as_sizes(given))
    if isinstance(given, Step):
        batch = Batch(calls=given.calls, as_it_is=True, reads_rest=given.reads_rest)
    elif isinstance(given, Call):
        batch = Batch(calls=(given,))
    elif isinstance(given, Mapping):
        batch = _of_keywords({str(name): value for name, value in given.items()})
    elif isinstance(given, torch.Tensor):
        batch = Batch(calls=(Call(given),))
    elif isinstance(given, (tuple, list)):
        batch = Batch(calls=(Call(*given),))
    else:
        raise InputError(
            f"the batch is a {type(given).__name__}: give a mapping of tensors, a tuple of tensors, a memplan.Call, or "
            "a (batch, sequence) pair"
        )
    if not batch.tensors():
        raise InputError("the batch holds no tensor: give one micro-batch, or a (batch, sequence) pair")
    return batch


def _of_keywords(kwargs: Mapping[str, Any]) -> Batch:
    return Batch(calls=(Call(**kwargs),))


def random_tokens(model: nn.Module, call: Batch) -> Batch:
    """Return the call that a shape stands for with tokens of the whole vocabulary: zeros would all take one way."""
    config: Any = base_of(model).config
    given: Any = getattr(base_of(model), "get_output_embeddings", None)
    over_vocabulary = callable(given) and given() is not None  # else labels are classes, of which there may be two
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 2
    keywords = call.calls[0].kwargs
    tokens = {
        name: torch.randint(0, vocabulary, tuple(tensor.shape))
        for name, tensor in keywords.items()
        if tensor.dim() == 2 and (name in ("input_ids", "decoder_input_ids") or (name == "labels" and over_vocabulary))
    }
    return _of_keywords({**keywords, **tokens})


def is_shape(given: object) -> bool:
    """Whether a batch is given as (batch, sequence) or (batch,), or as sizes by name."""
    if isinstance(given, Mapping):
        return "batch" in given and all(
            name in SIZES and isinstance(size, int) and not isinstance(size, bool) for name, size in given.items()
        )
    return (
        isinstance(given, (tuple, list))
        and len(given) in (1, 2)
        and all(isinstance(size, int) and not isinstance(size, bool) for size in given)
    )


def _as_sizes(given: Any) -> tuple[int, int | None, dict[str, int]]:
    """Return the batch, the length of a sequence, and the sizes in pixels and frames that were given."""
    sizes = dict(given) if isinstance(given, Mapping) else dict(zip(("batch", "seq"), given, strict=False))
    for size in sizes.values():
        if size < 1:
            raise InputError(f"the batch was given as {given}: each number must be at least 1")
    return sizes.pop("batch"), sizes.pop("seq", None), sizes


def _from_shape(model: nn.Module, batch: int, length: int | None, pixels: Mapping[str, int]) -> Batch:
    base = base_of(model)
    if is_of_diffusers(base):
        sizes = {"batch": batch, **({} if length is None else {"seq": length}), **pixels}
        return _of_keywords(call_for(base, sizes))
    if pixels:
        raise InputError(
            f"{' and '.join(pixels)} were given, but {type(base).__name__} is no model of diffusers: what it reads has "
            "the size in its configuration; leave them out"
        )
    takes = inspect.signature(base.forward).parameters
    main = getattr(base, "main_input_name", "input_ids")
    if getattr(base, "config", None) is None or not {"input_ids", main} & {*takes}:
        raise InputError(
            f"the batch was given as a shape, but {type(base).__name__} takes no input_ids, images or sound that a "
            "configuration of transformers describes: give a mapping of tensors"
        )
    if main in takes and main in SOUNDS:
        return _of_sound(base, takes, batch, length)
    if main in takes and main == "pixel_values" and "input_ids" not in takes:
        return _of_images(base, takes, batch, length)
    length = _tokens(base, batch, length)
    ids = torch.zeros(batch, length, dtype=torch.long)
    kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "pixel_values" in takes and "return_loss" in takes:  # it is trained on pairs
        kwargs |= {"pixel_values": image(base, batch), "return_loss": True}
        if "attention_mask" not in takes:
            del kwargs["attention_mask"]
    if "labels" in takes:
        kwargs["labels"] = torch.zeros(batch, dtype=torch.long) if _labels_samples(base) else torch.zeros_like(ids)
    elif "decoder_input_ids" in takes:
        kwargs["decoder_input_ids"] = torch.zeros_like(ids)
    return _of_keywords(kwargs)


def _of_images(base: nn.Module, takes: Mapping[str, Any], batch: int, length: int | None) -> Batch:
    kwargs = {"pixel_values": image(base, batch)}
    if "decoder_input_ids" in takes:
        kwargs["labels"] = torch.zeros(batch, _tokens(base, batch, length), dtype=torch.long)
    elif length is not None:
        raise InputError(
            f"the batch was given as ({batch}, {length}), but {type(base).__name__} takes images of the size in its "
            f"configuration, and no sequence: give ({batch},)"
        )
    elif "labels" in takes and _labels_samples(base):
        kwargs["labels"] = torch.zeros(batch, dtype=torch.long)
    return _of_keywords(kwargs)


def _of_sound(base: nn.Module, takes: Mapping[str, Any], batch: int, length: int | None) -> Batch:
    name, made, used = sound(base, batch, length)
    kwargs = {name: made}
    if "labels" in takes and _labels_samples(base):
        kwargs["labels"] = torch.zeros(batch, dtype=torch.long)
    elif "labels" in takes:
        tokens = max(1, made.shape[1] // _SOUND_OF_A_TOKEN) if used else _tokens(base, batch, length)
        kwargs["labels"] = torch.zeros(batch, tokens, dtype=torch.long)
    return _of_keywords(kwargs)


def _labels_samples(base: nn.Module) -> bool:
    """Whether a model has one label a sample."""
    heads = ("SequenceClassification", "MultipleChoice", "ImageClassification", "AudioClassification")
    return type(base).__name__.endswith(tuple(f"For{head}" for head in heads))


def _tokens(base: nn.Module, batch: int, length: int | None) -> int:
    """Return the length of a sequence of tokens: as given, else 512 or as many as the model has positions."""
    limit = _positions(base)
    if length is None:
        return min(_TOKENS, limit or _TOKENS)
    if limit and length > limit:
        raise InputError(
            f"the batch was given as ({batch}, {length}), but {type(base).__name__} knows {limit} positions: give "
            "shorter sequences, or a configuration with more (max_position_embeddings)"
        )
    return length


def _positions(base: nn.Module) -> int:
    """Return how many positions a model has learned, or 0 where it goes on beyond any.

    Rotary positions go on; a table of learned ones does not. Some have a few rows more (OPT, BART), and some count from
    the row after that of the padding (RoBERTa).
    """
    config: Any = base.config
    texts = getattr(config, "get_text_config", None)
    named = {
        getattr(holder, name, None)
        for holder in (config, texts() if callable(texts) else config)
        for name in ("max_position_embeddings", "max_target_positions")
    }
    limits = [
        min(limit, module.num_embeddings - 1 - module.padding_idx) if module.padding_idx is not None else limit
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe"))
        for limit in named
        if isinstance(limit, int) and limit <= module.num_embeddings < limit + 4
    ]
    return max(0, min(limits, default=0))


def base_of(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model."""
    unwrap: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return unwrap() if callable(unwrap) else model
