"""Loading a model that would not fit, and building its trainer: what ``memplan run`` does, inside a ``with``."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack
from weakref import WeakSet

import torch
from torch import nn

from memplan.errors import DoesNotFitError, InputError
from memplan.model.calls import Call, Step
from memplan.plan_options import PlanOptions
from memplan.program.schema import Plan
from memplan.run.handle import handle_of
from memplan.trainers.hf_trainer import CallUnknownError, check_early, wrap_within
from memplan.trainers.launch import say
from memplan.trainers.loading.deferred_placement import (
    arrived,
    ask,
    forget,
    is_trained_in_part,
    move,
    tell_device,
    wait,
    waits,
    waits_itself,
)
from memplan.trainers.loading.from_pretrained import (
    QuantizedError,
    device_asked,
    is_distributed,
    mappable_folder,
    mapped_from,
    why_not_mapped,
)
from memplan.trainers.loading.mapped_weights import is_mapped
from memplan.trainers.other_models import Scope

if TYPE_CHECKING:
    from transformers import Trainer


@contextlib.contextmanager
def placing(
    *,
    plan: Plan | None = None,
    batch: Mapping[str, torch.Tensor] | Call | None = None,
    checked: bool = False,
    log: bool = False,
    lines: bool = False,
    **options: Unpack[PlanOptions],
) -> Iterator[None]:
    """Load a model that would not fit, and build its trainer, inside this context.

    ``PreTrainedModel.from_pretrained`` of safetensors maps the weights from their files: they are true from the start,
    and take no RAM that the kernel cannot take back. Adapters are added as ever, whatever they begin with. The Trainer
    that is built is wrapped before its constructor returns (one whose data does not say what its model is called with,
    such as GRPO's: at the model's first call to be trained). Other models, and those whose Trainer is built elsewhere,
    are whole and work as ever; all share the budgets (:mod:`memplan.trainers.other_models`).

    ``plan``: as for :func:`memplan.wrap`, and so are the others.
    ``batch``: the largest micro-batch that will come.
    ``checked``: as for :func:`memplan.attach`.
    ``log``: add the scalars of :meth:`memplan.Handle.scalars` to what the trainer logs.
    ``lines``: print them after each step.
    ``options``: those of :func:`memplan.plan`.

    Entering raises InputError for options that cannot be used. ``from_pretrained`` raises InputError for what is not
    served here, CheckpointError; a Trainer what ``wrap`` raises.
    """
    check_early(plan, options)
    inside = _Inside(options, plan=plan, batch=batch, checked=checked, log=log, lines=lines)
    with contextlib.ExitStack() as undo:
        inside.open(undo)
        try:
            yield
        except BaseException:
            inside.leave(arrived)
            raise
        inside.leave(move)


class _Inside:
    """What was loaded and built inside one context."""

    def __init__(self, options: PlanOptions, *, plan: Plan | None, **wrapping: Any) -> None:
        """``wrapping``: what else :func:`memplan.wrap` is given."""
        self._options = options
        self._plan = plan
        self._wrapping = wrapping
        self._scope = Scope()
        self._building: dict[int, int] = {}
        """By trainer's id, how many of its classes' constructors are at work."""
        self._for_trainers: WeakSet[nn.Module] = WeakSet()
        """Models of trainers that are placed at their first call."""

    def open(self, undo: contextlib.ExitStack) -> None:
        """Have libraries' classes do as the context says until ``undo`` is closed."""
        from transformers import PreTrainedModel, Trainer

        undo.callback(tell_device(PreTrainedModel))
        _replaced(undo, PreTrainedModel, "from_pretrained", classmethod(self._from_pretrained(PreTrainedModel)))
        kinds: list[type[Any]] = [Trainer]
        for kind in kinds:
            kinds += [below for below in type.__subclasses__(kind) if below not in kinds]
            self._watch(undo, kind)
        inherited = Trainer.__init_subclass__

        def init_subclass(cls: type[Any], /, **more: Any) -> None:
            inherited.__func__(cls, **more) if hasattr(inherited, "__func__") else inherited(**more)
            self._watch(undo, cls)

        _replaced(undo, Trainer, "__init_subclass__", classmethod(init_subclass))
        if importlib.util.find_spec("peft") is not None:
            from peft import PeftModel

            _replaced(undo, PeftModel, "__init__", self._adapted(PeftModel.__init__))

    def leave(self, end: Callable[[nn.Module], None]) -> None:
        """Have what still waits be as any model, ``end`` having been done to it."""
        for model in list(self._scope.loaded):
            if waits_itself(model) and model not in self._for_trainers:
                forget(model)
                end(model)

    def _from_pretrained(self, kind: Any) -> Callable[..., Any]:
        original = kind.__dict__["from_pretrained"]

        @functools.wraps(original.__func__)
        def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
            folder = None if is_distributed() else mappable_folder(name, kwargs)
            if folder is None:
                model = original.__get__(None, cls)(name, *args, **kwargs)
                if isinstance(model, nn.Module):
                    self._scope.loaded.add(model)
                return model
            model = _mapped(cls, name, folder, args, kwargs)
            device = device_asked(kwargs)
            if device is not None:
                ask(model, device)
            self._scope.loaded.add(model)
            self._wait(model)
            return model

        return from_pretrained

    def _wait(self, model: nn.Module) -> None:
        """Have the frozen weights of what may be placed stay mapped, and a call to be trained find it whole."""
        self._scope.loaded.add(model)
        wait(model, lambda model, step: move(model))

    def _adapted(self, original: Callable[..., None]) -> Callable[..., None]:
        """A model with its adapter is what is placed, not the one within it, which it does not even call."""

        @functools.wraps(original)
        def init(model: Any, *args: Any, **kwargs: Any) -> None:
            original(model, *args, **kwargs)
            if waits(model):
                self._wait(model)

        return init

    def _watch(self, undo: contextlib.ExitStack, kind: type[Any]) -> None:
        """Have a trainer wrapped once the outermost of its constructors is done: before, it is not all there."""
        original = kind.__dict__.get("__init__")
        if original is None:
            return

        @functools.wraps(original)
        def init(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            key = id(trainer)
            self._building[key] = self._building.get(key, 0) + 1
            try:
                original(trainer, *args, **kwargs)
            finally:
                self._building[key] -= 1
                outermost = not self._building[key]
                if outermost:
                    del self._building[key]
            if outermost:
                self._place(trainer)

        _replaced(undo, kind, "__init__", init)

    def _place(self, trainer: Trainer) -> None:
        model = trainer.model
        if not isinstance(model, nn.Module):
            return
        if not is_mapped(model) and not waits(model):  # a copy waits as what it was copied from
            if is_trained_in_part(model) and handle_of(model) is None:
                say(f"the model of {type(trainer).__name__} was not loaded inside placing: it stays whole")
            return
        handle = handle_of(model)
        if handle is not None:  # of a trainer before
            trainer.__dict__["memplan"] = handle
            return
        if getattr(trainer, "model_init", None) is not None:
            raise InputError(
                "a trainer that makes its model anew as it trains (model_init) was built inside memplan.placing, which "
                "places the model that is there: give it model="
            )
        if trainer.train_dataset is None:
            forget(model)
            move(model)
            say(f"{type(trainer).__name__} has no data to train on: its model stays whole")
            return
        try:
            self._wrap(trainer, model)
        except CallUnknownError:
            self._wait_for_call(trainer, model)

    def _wrap(self, trainer: Trainer, model: nn.Module) -> None:
        try:
            self._wrap_within(trainer)
        except DoesNotFitError as error:
            # What earlier trainers hold more than they need: none of them trains while this one is built.
            if self._plan is not None or not self._scope.make_room(model, error, self._options):
                raise
            self._wrap_within(trainer)

    def _wrap_within(self, trainer: Trainer, **more: Any) -> None:
        wrap_within(self._scope, trainer, plan=self._plan, **{**self._wrapping, **more}, **self._options)

    def _wait_for_call(self, trainer: Trainer, model: nn.Module) -> None:
        """Have a model planned for and placed as its trainer first calls it to be trained."""

        def place(model: nn.Module, step: Step) -> None:
            self._wrap_within(trainer, batch=step)

        self._for_trainers.add(model)
        wait(model, place)


def _mapped(cls: Any, name: Any, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    unknown = why_not_mapped(args, kwargs)
    what = f"from_pretrained({str(name)!r})"
    if unknown:
        raise InputError(
            f"{what} was called with {', '.join(unknown)}, which memplan.placing does not serve: leave it out, or "
            "load this model outside of placing, and use memplan.wrap where it is to be trained"
        )
    try:
        return mapped_from(cls, name, folder, kwargs)
    except QuantizedError as error:
        raise QuantizedError(
            f"{what}: {error}: load this model outside of memplan.placing, and use memplan.wrap where it is to be "
            f"trained"
        ) from None


def _replaced(undo: contextlib.ExitStack, owner: type, name: str, value: Any) -> None:
    """Give a class an attribute until ``undo`` is closed."""
    held = name in owner.__dict__
    before = owner.__dict__.get(name)
    undo.callback(lambda: setattr(owner, name, before) if held else delattr(owner, name))
    setattr(owner, name, value)
