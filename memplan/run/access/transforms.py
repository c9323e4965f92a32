"""Transforms of ``torch.func`` around a forward: which of them weights that come and go can bear."""

from __future__ import annotations

import torch

from memplan.errors import RunError


def refuse_transforms(module: str, recomputed: frozenset[str]) -> None:
    """Raise RunError where a forward is called in a transform whose backward no trigger sees. ``recomputed``: by the
    plan.

    Within ``vmap``, and in ``torch.autograd.forward_ad``, weights are read as ever.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    kinds = {level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()}
    if kinds & {"Grad", "Jvp"}:
        raise RunError(
            f"{module} was called within torch.func (grad, vjp, jvp, jacrev or the like), which reads weights again "
            "where no trigger of memplan sees it: use loss.backward() or torch.autograd.grad, pin all blocks to the "
            "device, or detach() first"
        )
    if "Vmap" in kinds and torch.is_grad_enabled() and module in recomputed:
        raise RunError(
            f"{module} was called within torch.vmap, and the plan runs its forward a second time in backward, outside "
            f"of it: plan "
            'with activations="keep", or detach() first'
        )
