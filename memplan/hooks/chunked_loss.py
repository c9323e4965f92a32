"""A causal model's loss in chunks of tokens: the logits of a chunk, their loss and its gradient, then the next.

[Note: chunked loss] The head and the loss are the greatest lump of memory in most steps: the logits of all tokens, once
in the model's dtype and several times in float32. Here the model's forward is its own. It is given a stand-in for its
head, which returns logits that are not made (:class:`PendingLogits`) and remembers what is done to them (scale, cap);
the loss function makes them chunk by chunk within a call of the real head, with the gradient at once, since the
head is frozen. So its weights are read once a micro-batch, in the forward. What is kept for backward is the gradient of
the hidden states. Sums change their order, so bits differ from the full loss.

Whoever reads such logits is told that there are none. In evaluation, and without labels or gradients, all is as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from memplan.errors import ModelError, RunError
from memplan.hooks.compiled import call_of, is_compiled, replace_call
from memplan.hooks.tiled_heads import base_of, call_within, head_of_outputs, is_hooked

LossKind = Literal["chunked", "fused"]

CHUNK_BYTES = 64 << 20
"""Of a chunk's logits in float32."""

_STEPS = frozenset({"__truediv__", "div", "true_divide", "__mul__", "__rmul__", "mul", "multiply", "tanh", "float"})
"""What a model may do to its logits: each is done to a chunk alike."""
_TOLD = frozenset({"size", "dim", "is_floating_point", "is_complex", "numel", "nelement", "ndimension", "__hash__"})
"""Methods that ask for no value; all properties but these of autograd and memory are told too."""
_HIDDEN = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})


def chunk_tokens(vocabulary: int, width: int, tokens: int, kind: LossKind = "chunked") -> int:
    """Return for how many of ``tokens`` there are logits at a time.

    ``fused``: as Liger's fused linear cross entropy has it: logits of a chunk take about what all hidden states do, to
    the next power of two of tokens. Cut cross entropy (axolotl's, unsloth's) takes less.
    """
    if kind == "fused":
        chunks = -(-vocabulary // width)
        return min(tokens, 1 << (-(-tokens // chunks) - 1).bit_length())
    fits = max(1, CHUNK_BYTES // (4 * vocabulary))
    return min(tokens, fits if fits < 8 else fits // 8 * 8)


class PendingLogits(torch.Tensor):
    """Logits that were not made: shape, dtype and device alone. Any other use raises RunError."""

    hidden: torch.Tensor | None
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...]

    @staticmethod
    def of(
        hidden: torch.Tensor | None,
        shape: tuple[int, ...],
        like: torch.Tensor,
        dtype: torch.dtype,
        steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (),
    ) -> PendingLogits:
        """Return logits of a shape on the device of ``like``. ``hidden``: what they would be made of; None: spent."""
        made: PendingLogits = torch.Tensor._make_wrapper_subclass(PendingLogits, shape, dtype=dtype, device=like.device)
        made.hidden, made.steps = hidden, steps
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        told = name in _TOLD
        if name == "__get__":  # of a property
            told = getattr(func.__self__, "__name__", "") not in _HIDDEN
        if told or name in ("__set__", "__delete__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        mine = next((arg for arg in args if isinstance(arg, PendingLogits)), None)
        others = [arg for arg in args if arg is not mine]
        if name == "float" and mine is not None and mine.hidden is None:  # accelerate does so with all that comes out
            return PendingLogits.of(None, tuple(mine.shape), mine, torch.float32)
        if mine is None or mine.hidden is None or name not in _STEPS or kwargs or not all(map(_is_number, others)):
            raise RunError(
                f"the logits were read (by {name}), but under a chunked loss they are not made: take the loss from the "
                "model's output, call the model in evaluation or without labels, or leave the chunked loss out"
            )

        def step(logits: torch.Tensor) -> torch.Tensor:
            done: torch.Tensor = func(*(logits if arg is mine else arg for arg in args))
            return done

        shape, dtype = tuple(mine.shape), torch.float32 if name == "float" else mine.dtype
        return PendingLogits.of(mine.hidden, shape, mine.hidden, dtype, (*mine.steps, step))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RunError(f"logits that are not made under a chunked loss were given to {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        return "PendingLogits(under a chunked loss there are none)"

    def __deepcopy__(self, memo: dict[int, Any]) -> PendingLogits:
        return self


def _is_number(value: object) -> bool:
    """Whether a factor is one for all logits, which no gradient is wanted of."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not value.requires_grad
    return isinstance(value, (int, float))


def chunk_loss(model: nn.Module, kind: LossKind = "chunked") -> Callable[[], None]:
    """Have a model compute the loss of labels in chunks while it trains; return what undoes it.

    Raises ModelError for a model of which that is not known to be right.
    """
    base = base_of(model)
    head = _checked_head(base)
    held = [(module, name) for module in base.modules() for name, part in module._modules.items() if part is head]
    stand_in = _StandIn(head)
    original = base.loss_function
    forward = call_of(base)
    signature = inspect.signature(forward)

    def put(module: nn.Module) -> None:
        for parent, name in held:
            parent._modules[name] = module

    def chunked_forward(*args: Any, **kwargs: Any) -> Any:
        if not (base.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if kwargs.get("labels") is None and signature.bind_partial(*args, **kwargs).arguments.get("labels") is None:
            raise RunError(
                f"{type(base).__name__} was called for training without labels, but a chunked loss is the model's own: "
                "give it labels, or leave the chunked loss out (a trainer with label smoothing or a loss of its own)"
            )
        put(stand_in)
        try:
            output = forward(*args, **kwargs)
        finally:
            put(head)
            unread, stand_in.made = stand_in.made, None
        if unread is not None:
            raise ModelError(f"{type(base).__name__} did not give its logits to its loss function: leave loss out")
        return output

    def loss(
        logits: Any,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        if type(logits) is not PendingLogits:
            given = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index, **more}
            full: torch.Tensor = original(logits, labels, vocab_size, shift_labels=shift_labels, **given)
            return full
        stand_in.made = None
        hidden, logits.hidden = logits.hidden, None
        if shift_labels is None:
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        assert hidden is not None
        targets = shift_labels.reshape(-1).to(hidden.device)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if targets.shape[0] != hidden.shape[0] or vocab_size != head.out_features:
            raise RunError(
                f"a chunked loss of {hidden.shape[0]} tokens and {head.out_features} words was given "
                f"{targets.shape[0]} labels of {vocab_size}: leave logits_to_keep out, or the chunked loss"
            )
        tokens = chunk_tokens(vocab_size, hidden.shape[1], hidden.shape[0], kind)
        put(head)
        total: torch.Tensor = call_within(head, _within_head(head), hidden, targets, tokens, logits.steps, ignore_index)
        put(stand_in)
        if num_items_in_batch is None:
            return total / (targets != ignore_index).sum()
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    had = base.__dict__.get("_loss_function")
    base.loss_function = loss
    undo_forward = replace_call(base, chunked_forward)

    def undo() -> None:
        undo_forward()
        if base.__dict__.get("_loss_function") is loss:
            if had is None:
                del base._loss_function
            else:
                base._loss_function = had

    return undo


@contextmanager
def in_chunks(model: nn.Module, kind: Literal["full", "chunked", "fused"]) -> Iterator[None]:
    """Have a model's loss be of a kind for as long as this is entered. Raises ModelError."""
    undo = None if kind == "full" else chunk_loss(model, kind)
    try:
        yield
    finally:
        if undo is not None:
            undo()


def _checked_head(base: Any) -> nn.Linear:
    """Return the head. Raises ModelError where a chunked loss would not be this model's loss."""
    head, why = head_of_outputs(base), None
    if head is None or type(head) is not nn.Linear:
        why = "it has no head that is a plain linear layer over a vocabulary"
    elif any(parameter.requires_grad for parameter in head.parameters()):
        why = "its head is trained, whose gradient needs all logits"
    elif type(head.weight) is not nn.Parameter or not head.weight.is_floating_point():
        why = "its head is quantized"
    elif is_hooked(head):
        why = "its head has hooks, which would have no logits"
    elif head.weight.dtype == torch.float16:
        why = "it computes in float16, whose gradients are scaled before they come to the logits"
    elif is_compiled(head) or is_compiled(base):
        why = "its head or the whole of it is compiled"
    elif not hasattr(base, "loss_function"):
        why = "it has no loss function that transformers' models have"
    else:
        from transformers.loss.loss_utils import ForCausalLMLoss

        if base.loss_function is not ForCausalLMLoss:
            why = f"its loss is {getattr(base.loss_function, '__name__', 'one of its own')}, not that of causal models"
    if why is not None or not isinstance(head, nn.Linear):
        raise ModelError(f"a chunked loss was asked for {type(base).__name__}, but {why}: leave it out")
    return head


class _StandIn(nn.Module):
    """Stands where the head is called from, and makes no logits."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.__dict__["head"] = head  # no part of the model
        self.__dict__["made"] = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["head"], name)

    def forward(self, hidden: torch.Tensor) -> PendingLogits:
        head = self.__dict__["head"]
        if is_hooked(head):
            raise RunError("the head of a model whose loss is computed in chunks has hooks, which would have no logits")
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        if dtype == torch.float16:
            raise RunError("a chunked loss cannot be computed in float16, whose gradients are scaled: use bfloat16")
        self.__dict__["made"] = made = PendingLogits.of(hidden, (*hidden.shape[:-1], head.out_features), hidden, dtype)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


def _within_head(head: nn.Linear) -> Callable[..., torch.Tensor]:
    """Return what stands for the head's forward: by then its weights are there."""

    def forward(hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        weight: torch.Tensor = head.weight
        bias: torch.Tensor | None = head.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # once, and not for each chunk
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            total: torch.Tensor = _ChunkedLoss.apply(hidden, weight, bias, *more)  # type: ignore[no-untyped-call]
        return total

    return forward


class _ChunkedLoss(torch.autograd.Function):
    """The sum of the cross entropies of ``hidden`` (tokens, width), float32; its gradient is made on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tokens: int,
        steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...],
        ignore_index: int,
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for begin in range(0, hidden.shape[0], tokens):
            part, of_part = hidden[begin : begin + tokens], targets[begin : begin + tokens]
            counts = of_part != ignore_index
            chosen = torch.where(counts, of_part, 0).unsqueeze(1)
            logits = functional.linear(part, weight, bias)
            scores = logits.float()
            if steps:
                logits.requires_grad_()
                with torch.enable_grad():
                    scores = logits
                    for step in steps:
                        scores = step(scores)
                    scores = scores.float()
            values = scores.detach()
            normalizer = values.logsumexp(1, keepdim=True)
            losses = (normalizer - values.gather(1, chosen)).squeeze(1)
            total += torch.where(counts, losses, 0.0).sum()
            if gradient is not None:
                # The softmax less one at the label: in place of the logits where nothing refers to these.
                slope = (values - normalizer if steps else values.sub_(normalizer)).exp_()
                slope.scatter_add_(1, chosen, slope.new_full(chosen.shape, -1.0))
                slope *= counts.unsqueeze(1)
                if steps:
                    (slope,) = torch.autograd.grad(scores, logits, slope)
                gradient[begin : begin + tokens] = slope.to(weight.dtype) @ weight
                del slope
            del logits, scores, values  # before the next are made
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (gradient * above[0]).to(gradient.dtype), None, None, None, None, None, None
