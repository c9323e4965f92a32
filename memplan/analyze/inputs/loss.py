"""What is differentiated of what a pass makes: the model's own loss, the one given, or the sum of its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from memplan.analyze.inputs.batch import Batch
from memplan.errors import ModelError
from memplan.hooks.nested import tensors_in


def loss_of_pass(model: nn.Module, batch: Batch, loss: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    """Return the scalar that is differentiated: the sum of what :func:`loss_of` makes of the calls of a pass. Of
    several, those from which no gradient comes back are called for what they cost alone.
    """
    if len(batch.calls) == 1:
        return loss_of(batch.calls[0].run(model), loss)
    found = []
    for call in batch.calls:
        output = call.run(model)
        if any(tensor.requires_grad for tensor in tensors_in(output)):
            found.append(loss_of(output, loss).float())
        del output
    return loss_of(tuple(found), None)


def loss_of(output: Any, loss: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    """Return the scalar that is differentiated: the output's own loss, else ``loss``'s, else the sum of all floats."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None and loss is not None:
        found = loss(output)
    if found is None:
        parts = [t for t in tensors_in(output) if t.dtype.is_floating_point and t.requires_grad]
        if not parts:
            raise ModelError(
                "the model's output holds no loss and no tensor that a gradient reaches: give labels in the batch, "
                "or loss=, a function from the output to a scalar"
            )
        found = sum(part.sum() if part.dtype == torch.float32 else part.float().sum() for part in parts)
    if not isinstance(found, torch.Tensor) or not found.requires_grad:
        raise ModelError("the loss does not depend on any trained parameter: check the adapter and the loss")
    return found if found.dim() == 0 else found.sum()
