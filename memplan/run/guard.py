"""What stands before a managed module's moves, casts, copies, saves and loads while its weights are streamed.

Streamed weights are placeholders and views of an arena: ``.to`` would make real tensors of the former and part the
latter from their slot. Trainers call ``.to`` all the same, mostly to where the model is already: what is harmless goes
through, the rest is refused before it begins. A ``state_dict`` reads true weights from their homes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from memplan.errors import MovedWeightsError, RunError

if TYPE_CHECKING:
    from memplan.run.handle import Handle

_MERGES = ("merge_adapter", "unmerge_adapter", "merge_and_unload")
_LAYER_MERGES = ("merge", "unmerge")


class Guard:
    """Stands before one module. ``kept``: what reads each managed parameter from its home, by the parameter's id."""

    def __init__(self, module: nn.Module, kept: Mapping[int, Callable[[], torch.Tensor]]) -> None:
        self._module = module
        self._kept = kept
        self.handle: Handle | None = None
        own = {(p.dtype, p.device) for p in module.parameters() if id(p) in kept}
        self._kinds = tuple(sorted(own, key=str))
        # Found on the instance before the class, by torch, PEFT, copy and pickle alike.
        self._stands_before: dict[str, Any] = {
            "_apply": self.apply,
            "_load_from_state_dict": self.load,
            "__deepcopy__": _refuse_copy,
            "__reduce_ex__": _refuse_copy,
        }
        merges = _MERGES + (_LAYER_MERGES if hasattr(type(module), "get_base_layer") else ())
        self._stands_before |= {name: _refuse_merge for name in merges if hasattr(type(module), name)}
        self._hook = module.register_state_dict_post_hook(lambda *given: self.save(*given))  # torch marks the function
        module.__dict__.update(self._stands_before)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Stand for ``_apply``, which ``.to``, ``.cuda``, ``.half`` and their like all go through."""
        for dtype, device in self._kinds:
            moved = fn(torch.empty(1, dtype=dtype, device=device))
            if moved.dtype != dtype or moved.device != device:
                raise MovedWeightsError(
                    f"{type(self._module).__name__} was to go from {dtype} on {device} to {moved.dtype} on "
                    f"{moved.device}, but memplan streams its weights: leave placement to memplan, or detach() first"
                )
        self._without_kept(lambda: type(self._module)._apply(self._module, fn, recurse))
        return self._module

    def save(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
        """Put the weights from their homes into a ``state_dict``: nothing is copied, what is on disk is mapped."""
        for name, parameter in module._parameters.items():
            read = self._kept.get(id(parameter))
            held = state.get(prefix + name)
            if read is not None and held is not None and not isinstance(held, nn.Parameter):
                state[prefix + name] = read()

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
        for name, parameter in self._module._parameters.items():
            read = self._kept.get(id(parameter))
            if read is None:
                continue
            given = state.pop(prefix + name, None)
            if given is not None:
                held = read()
                if given.shape != held.shape or not torch.equal(given.to(held.device, held.dtype), held):
                    raise MovedWeightsError(
                        f"load_state_dict would give the frozen weight {prefix + name} other values, but memplan "
                        "streams it: detach() first"
                    )
            elif strict:
                missing.append(prefix + name)
        kind = type(self._module)
        self._without_kept(
            lambda: kind._load_from_state_dict(
                self._module, state, prefix, metadata, strict, missing, unexpected, errors
            )
        )

    def _without_kept(self, act: Callable[[], object]) -> None:
        """Act on the module as though it had none of the managed parameters."""
        parameters = self._module._parameters
        everything = dict(parameters)
        for name, parameter in everything.items():
            if parameter is not None and id(parameter) in self._kept:
                del parameters[name]
        try:
            act()
        finally:
            left = dict(parameters)
            parameters.clear()
            parameters.update({name: left.get(name, parameter) for name, parameter in everything.items()})

    def remove(self) -> None:
        """Step aside."""
        self._hook.remove()
        for name in self._stands_before:
            self._module.__dict__.pop(name, None)
        # They hold this guard, and what it keeps holds the arenas: those go now, not when the collector comes by.
        self._stands_before = {}
        self._kept = {}


def guard_of(module: nn.Module) -> Guard | None:
    """Return what stands before a module, or None."""
    stands = getattr(module.__dict__.get("_apply"), "__self__", None)
    return stands if isinstance(stands, Guard) else None


def _refuse_copy(*args: object) -> NoReturn:
    raise RunError(
        "a model whose weights memplan streams was to be copied or pickled, which would keep placeholders: detach() "
        "first, or save its state_dict()"
    )


def _refuse_merge(*args: object, **options: object) -> NoReturn:
    raise RunError(
        "an adapter was to be merged into weights that memplan streams, which are only ever read: detach() first"
    )
