"""Whether a plan is for this model, and what of the model it speaks of. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from memplan.errors import ModelError, PlanMismatchError
from memplan.hooks.compiled import WAY_OUT, whole_compiled
from memplan.hooks.triggers import modules_by_name
from memplan.model.checkpoint import has_checkpoint, read_checkpoint
from memplan.model.names import canonical, stored_name
from memplan.model.weights import Weight, kind_of, own_weights, unready
from memplan.program.schema import Plan
from memplan.run.memory.arena import dtype_of, is_placeholder
from memplan.run.memory.home import Checkpoint, Stored
from memplan.units import format_bytes


def match_weights(model: nn.Module, plan: Plan) -> dict[str, Weight]:
    """Return the model's frozen weights by canonical name, having checked that the plan is for this model."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"the module {canonical(name)} is hooked by accelerate (device_map or cpu_offload), which would move "
                "the same weights: load the model without device_map"
            )
    weights: dict[str, Weight] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for weight in own_weights(module, f"{name}." if name else ""):
            weights.setdefault(canonical(weight.name), weight)
        for parameter in module._parameters.values():
            why = None if parameter is None else unready(parameter, module)
            if why is not None:
                raise ModelError(f"a quantized weight of {canonical(name)} {why}")
    trained = {canonical(name): p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, parameter in trained.items():
        if _has_no_weights(parameter):
            raise ModelError(
                f"{name} is trained, but holds no weights: it was unfrozen, cast or copied while it was a placeholder. "
                "Load the model with its weights, change it, then attach"
            )
    planned = set()
    for block in plan.table.blocks:
        for tensor in block.tensors:
            if tensor.name in trained:
                raise PlanMismatchError(f"the plan streams {tensor.name}, which this model trains: make a new plan")
            if tensor.name not in weights:
                raise PlanMismatchError(
                    f"the plan is for another model ({plan.model}): it places {tensor.name}, which this model lacks; "
                    "make a plan for this model"
                )
            found = weights[tensor.name].tensor
            if kind_of(found) is not type(found):
                raise ModelError(
                    f"the weight {tensor.name} is streamed already, for a model that shares it and is under a plan: "
                    "detach() that one first"
                )
            if tuple(found.shape) != tensor.shape or found.dtype != dtype_of(tensor.dtype):
                raise PlanMismatchError(
                    f"the plan is for another model ({plan.model}): it has {tensor.name} as {tensor.dtype} "
                    f"{tensor.shape}, this model as {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
                )
            planned.add(id(found))
    for name, weight in weights.items():
        if id(weight.tensor) not in planned:
            raise PlanMismatchError(
                f"the model's frozen parameter {name} is not in the plan, which is for {plan.model}: make a new plan"
            )
    trained_bytes = sum({id(p): p.numel() * p.element_size() for p in trained.values()}.values())
    counted = sum(row.size_bytes for row in plan.table.fixed if row.kind == "adapters")
    if trained_bytes > counted:
        raise PlanMismatchError(
            f"the model trains {format_bytes(trained_bytes)}, the plan counts {format_bytes(counted)} of "
            "adapters: make a plan with this adapter"
        )
    return weights


def _has_no_weights(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a placeholder, or what a cast or a copy makes of one: NaN throughout."""
    if is_placeholder(parameter):
        return True
    held = parameter.detach()
    is_real = held.device.type != "meta" and held.is_floating_point() and held.numel() > 0
    return is_real and bool(held.isnan().all())


def trigger_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the modules whose calls announce accesses, by name. Raises PlanMismatchError where one is lacking."""
    modules = modules_by_name(model)  # as the analyzer has them: the wrapper, not what it wraps
    wanted = dict.fromkeys(access.module for access in plan.table.accesses if access.module)
    missing = [name for name in (*wanted, *plan.table.checkpointed) if name not in modules]
    if missing:
        raise PlanMismatchError(f"the plan watches the module {missing[0]}, which this model lacks: make a new plan")
    triggers = {name: modules[name] for name in wanted}
    whole = whole_compiled(model, triggers.values())
    if whole is not None:
        raise ModelError(
            f"{whole} is compiled as a whole, but memplan brings the weights of {next(iter(triggers))} and the rest "
            f"one by one: {WAY_OUT}"
        )
    return triggers


def recomputed_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the modules that the plan runs again in backward, by name, in the plan's order."""
    modules, again = modules_by_name(model), plan.recomputed()
    return {name: modules[name] for name in (*plan.policies(), *plan.table.checkpointed) if name in again}


def stored_tensors(model: nn.Module, checkpoint: str | Path | Checkpoint | None) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by canonical name; empty where there is none."""
    found: Checkpoint
    if isinstance(checkpoint, Mapping):
        found = checkpoint
    elif checkpoint is not None:
        found = read_checkpoint(checkpoint)
    else:
        folder = getattr(getattr(model, "config", None), "_name_or_path", None)
        if folder is None or not has_checkpoint(folder):
            return {}
        found = read_checkpoint(folder)
    stored = {canonical(name): tensor for name, tensor in found.items()}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(canonical(name))
    for names in aliases.values():  # a tied tensor is stored once, under any of its names
        held = next((stored[known] for name in names for known in (name, stored_name(name)) if known in stored), None)
        if held is not None:
            stored.update(dict.fromkeys(names, held))
    return stored
