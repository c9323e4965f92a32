"""What stands before a managed module's moves, casts, copies, saves and loads while its weights are streamed.

Streamed weights are placeholders and views of an arena: ``.to`` would make real tensors of the former and part the
latter from their slot. Trainers call ``.to`` all the same, mostly to where the model is already: what is harmless goes
through, the rest is refused before it begins. A ``state_dict`` reads true weights from their homes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from memplan.errors import MovedWeightsError, RunError
from memplan.hooks.compiled import WAY_OUT, OptimizedModule
from memplan.model.weights import frozen_weights, is_wrapper, own_weights, rewrapped, wrapped_parts
from memplan.run.access.away import plain
from memplan.run.access.dispatched import unasked

if TYPE_CHECKING:
    from memplan.run.access.direct_access import DirectAccess

MERGES = ("merge_adapter", "unmerge_adapter", "merge_and_unload")
"""What PEFT's models write an adapter into the weights by."""
_REGISTERS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)
_LAYER_MERGES = ("merge", "unmerge")


class Guard:
    """Stands before one module. ``kept``: what reads each managed tensor from its home, by the tensor's id. ``device``:
    where they are for whoever would move them, though one may be read on the host. ``handle``: the
    :class:`memplan.Handle` that the model is under.
    """

    def __init__(
        self,
        module: nn.Module,
        kept: Mapping[int, Callable[[], torch.Tensor]],
        device: torch.device,
        direct: DirectAccess,
        handle: object,
    ) -> None:
        self._module = module
        self._direct: DirectAccess | None = direct
        self._kept = kept
        self.handle = handle
        within = [weight.tensor for weight in frozen_weights("", module, deep=True) if id(weight.tensor) in kept]
        self._kinds = tuple(sorted({(tensor.dtype, device) for tensor in within}, key=str))
        self._own = tuple(weight for weight in own_weights(module) if id(weight.tensor) in kept)
        ids = {id(weight.tensor) for weight in self._own}
        held = [*module._parameters.items(), *module._buffers.items()]
        self._hidden = tuple(
            name
            for name, tensor in held
            if tensor is not None and any(id(part) in ids for part in wrapped_parts(tensor))
        )
        """Names of what the module has that must not be seen by those who move or load tensors."""
        # Found on the instance before the class, by torch, PEFT, copy and pickle alike.
        self._stands_before: dict[str, Any] = {
            "_apply": self.apply,
            "_load_from_state_dict": self.load,
            "_save_to_state_dict": self.begin_save,
            "__deepcopy__": _refuse_copy,
            "__reduce_ex__": _refuse_copy,
        }
        merges = MERGES + (_LAYER_MERGES if hasattr(type(module), "get_base_layer") else ())
        if not isinstance(module, OptimizedModule):  # has no compile of its own, and says so of what it wraps
            self._stands_before["compile"] = _refuse_compile
        self._stands_before |= {name: _refuse_merge for name in merges if hasattr(type(module), name)}

        def telling(name: str) -> Callable[..., Any]:
            def register(*args: Any, **kwargs: Any) -> Any:
                direct.hooks_came(module)
                return getattr(type(module), name)(module, *args, **kwargs)

            return register

        self._stands_before |= {name: telling(name) for name in _REGISTERS}
        self._hook = module.register_state_dict_post_hook(lambda *given: self.save(*given))  # torch marks the function
        module.__dict__.update(self._stands_before)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Stand for ``_apply``, which ``.to``, ``.cuda``, ``.half`` and their like all go through."""
        for dtype, device in self._kinds:
            like = (torch.arange(8, device=device) % 2).to(dtype).view(1, 2, 2, 2)
            moved = fn(like)
            if moved.dtype == dtype and moved.device == device:
                if moved.stride() != like.stride() or not torch.equal(moved, like):
                    raise MovedWeightsError(
                        f"the weights of {type(self._module).__name__} were to be changed (their values or their "
                        "memory format), but memplan streams them: do so before attach, or detach() first"
                    )
            else:
                raise MovedWeightsError(
                    f"{type(self._module).__name__} was to go from {dtype} on {device} to {moved.dtype} on "
                    f"{moved.device}, but memplan streams its weights: leave placement to memplan, or detach() first"
                )
        self._without_kept(lambda: type(self._module)._apply(self._module, fn, recurse))
        return self._module

    def begin_save(self, *args: Any, **kwargs: Any) -> None:
        """Stand for ``_save_to_state_dict``, which takes all weights: they are not read for that, ``save`` puts them
        in.
        """
        assert self._direct is not None
        held = [*(weight.tensor for weight in self._own), *(tensor for _, tensor in self._entries())]
        with self._direct.written.loader().lock, contextlib.ExitStack() as shown:  # another thread may train meanwhile
            for tensor in {id(tensor): tensor for tensor in held}.values():
                shown.enter_context(plain(tensor))
            shown.enter_context(unasked())
            type(self._module)._save_to_state_dict(self._module, *args, **kwargs)

    def save(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        """Put the weights from their homes into a ``state_dict``: nothing is copied, what is on disk is mapped."""
        entries = dict(self._entries())
        for name, now in (*module._parameters.items(), *module._buffers.items()):
            if name in entries and now is not None and now is not entries[name]:
                del entries[name]  # another parameter has taken its place
            if now is not None and id(now) in self._kept:
                entries[name] = now  # under whatever name it goes by now (pruning, spectral norm)
        if self._direct is None or not entries:
            return
        with self._direct.written.loader().lock:
            self._direct.written.settle_before(state)
            for name, held in entries.items():
                if prefix + name in state and not isinstance(state[prefix + name], nn.Parameter):
                    state[prefix + name] = rewrapped(held, self._read)

    def _entries(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what a ``state_dict`` of the module holds of its weights, by name."""
        for weight in self._own:
            yield weight.name, weight.tensor
        for name in self._hidden:
            parameter = self._module._parameters.get(name)
            if is_wrapper(parameter):
                assert parameter is not None
                yield name, parameter

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._kept[id(tensor)]()

    def load(
        self,
        state: dict[str, Any],
        prefix: str,
        metadata: object,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Stand for ``_load_from_state_dict``: frozen weights may come again, but not others."""
        for name, tensor in self._entries():
            given = state.pop(prefix + name, None)
            if given is not None:
                if not self._same(tensor, given):
                    raise MovedWeightsError(
                        f"load_state_dict would give the frozen weight {prefix + name} other values, but memplan "
                        "streams it: detach() first"
                    )
            elif strict and name in self._hidden:
                missing.append(prefix + name)
        kind = type(self._module)
        self._without_kept(
            lambda: kind._load_from_state_dict(
                self._module, state, prefix, metadata, strict, missing, unexpected, errors
            )
        )

    def _same(self, tensor: torch.Tensor, given: torch.Tensor) -> bool:
        """Whether given weights are those that are kept of ``tensor``."""
        own, others = list(wrapped_parts(tensor)), list(wrapped_parts(given))
        if len(own) != len(others):
            return False
        for part, other in zip(own, others, strict=True):
            held = self._read(part)
            if other.shape != held.shape or not torch.equal(other.to(held.device, held.dtype), held):
                return False
        return True

    def _without_kept(self, act: Callable[[], object]) -> None:
        """Act on the module as though it had none of the managed weights."""
        without(self._module, self._hidden, act)

    @property
    def kept(self) -> Iterable[int]:
        """The ids of all managed tensors of the model."""
        return self._kept

    def remove(self) -> None:
        """Step aside."""
        self._hook.remove()
        for name in self._stands_before:
            self._module.__dict__.pop(name, None)
        # They hold this guard, and what it keeps holds the arenas: those go now, not when the collector comes by.
        self._stands_before = {}
        self._kept = {}
        self._own = ()
        self._direct = None


def without(module: nn.Module, names: Iterable[str], act: Callable[[], object]) -> None:
    """Act on a module as though it had none of the parameters and buffers of these names."""
    hidden = set(names)
    before = [(held, dict(held)) for held in (module._parameters, module._buffers)]
    for held, _ in before:
        for name in hidden:
            held.pop(name, None)
    try:
        act()
    finally:
        for held, everything in before:
            left = dict(held)
            held.clear()
            held.update({name: left.get(name, tensor) for name, tensor in everything.items()})  # type: ignore[misc]


def guard_of(module: nn.Module) -> Guard | None:
    """Return what stands before a module, or None."""
    stands = getattr(module.__dict__.get("_apply"), "__self__", None)
    return stands if isinstance(stands, Guard) else None


def managed(model: nn.Module) -> set[int]:
    """Return the ids of a model's parameters and buffers whose bytes are streamed, in whole or in part."""
    guards = [guard for module in model.modules() if (guard := guard_of(module)) is not None]
    kept = {key for guard in guards for key in guard.kept}
    tensors = (*model.parameters(), *model.buffers()) if kept else ()
    return {id(tensor) for tensor in tensors if any(id(part) in kept for part in wrapped_parts(tensor))}


def _refuse_copy(*args: object) -> NoReturn:
    raise RunError(
        "a module whose weights memplan streams was to be copied or pickled, which would keep placeholders (PEFT "
        "copies layers for modules_to_save, and quantized ones for DoRA): add such adapters before plan(), save the "
        "state_dict(), or detach() first"
    )


def _refuse_compile(*args: object, **options: object) -> NoReturn:
    raise RunError(f"a module was to be compiled while memplan streams its weights: detach() first, and {WAY_OUT}")


def _refuse_merge(*args: object, **options: object) -> NoReturn:
    raise RunError(
        "an adapter was to be merged into weights that memplan streams, which are only ever read: detach() first"
    )
