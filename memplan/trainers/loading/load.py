"""Models whose weights go straight to their homes: never held whole, not even for a moment."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan import api
from memplan.errors import CheckpointError, InputError, ModelError, first_line
from memplan.model.adapters import with_adapter
from memplan.model.checkpoint import StoredTensor
from memplan.model.meta_model import from_configuration
from memplan.model.names import canonical, stored_name
from memplan.program.check.judge import require
from memplan.program.schema import Plan
from memplan.run.attach import attach, device_of
from memplan.run.handle import Handle
from memplan.run.memory.arena import dtype_of, is_placeholder
from memplan.run.memory.disk import DiskReader
from memplan.trainers.loading.stored import (
    checkpoint_of,
    map_stored,
    names_of,
    origin_of,
    put_placeholders,
    read_stored,
)

_SOME_BYTES = 4096
"""Enough to see that a weight was changed: what changes one changes all of it."""


def load(
    path: str | Path,
    plan: Plan | str | Path,
    *,
    adapter: Any = None,
    attention: str | None = None,
    checked: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Return the model of a checkpoint under a plan, each tensor straight in its home. Train it as ever.

    dtypes are the plan's; keys are renamed and experts fused as transformers does. The model is in evaluation mode, as
    ``from_pretrained`` leaves it; :func:`memplan.handle_of` gives its handle. Detached it is whole, on the host: its
    weights are mapped from their files.

    ``path``: folder with ``config.json`` and safetensors.
    ``plan``: a plan or its file.
    ``adapter``: the one that the plan was made with (a PEFT configuration or ``{"rank": 16, ...}``), or the folder of
    one that was saved.
    ``attention``: as for :func:`memplan.plan`.
    ``checked``: as for :func:`memplan.attach`.
    ``cache``: as for :func:`memplan.attach`.
    ``verify``: as for :func:`memplan.attach`.
    ``progress``: a bar on standard error (default: where that is a terminal).

    Peak RAM: the plan's arenas, 16 MiB of staging, and a piece of 16 MiB; where transformers makes a tensor of others,
    that tensor and those. Raises CheckpointError, PlanError and its children, InputError, ModelError.
    """
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    require(plan)
    if adapter is None and plan.workload.adapter:
        raise InputError(
            f"the plan was made with {plan.workload.adapter}, and no adapter was given: give the same with adapter="
        )
    skeleton = from_configuration(path, _dtype_of(plan), attention, buffers=True, plain=True)
    if skeleton.folder is None:
        raise CheckpointError(f"{path} is no folder with a checkpoint: give one with config.json and safetensors")
    device = device_of(plan)
    model = skeleton.model
    put_placeholders(model, skeleton.folder, device)
    buffers = {id(buffer) for buffer in model.buffers()}
    if adapter is not None:
        with _readable(model):
            model = _adapted(model, adapter)
    fill_trainables(model)
    _require_placeholders(model, buffers)
    with _bar(skeleton.name, sum(block.size_bytes for block in plan.table.blocks), progress) as advance:
        handle = attach(
            model,
            plan,
            checkpoint=checkpoint_of(model),
            checked=checked,
            cache=cache,
            verify=verify,
            progress=advance,
            replan=api.smaller,
        )
    at_detach(handle, lambda: _map_placeholders(model))
    return model.eval()


def at_detach(handle: Handle, act: Callable[[], None]) -> None:
    """Have something done when a handle has given its model back, last of all."""
    undo = contextlib.ExitStack()
    undo.callback(act)
    undo.enter_context(handle.undo.pop_all())
    handle.undo = undo


def _map_placeholders(model: nn.Module) -> None:
    from memplan.trainers.loading.mapped_weights import map_placeholders

    map_placeholders(model)


def fill_trainables(model: nn.Module) -> None:
    """Give weights of the checkpoint to what is trained (modules_to_save, unfrozen layers): it is never streamed.

    Raises ModelError where there are none for it, or where an adapter was made of weights that were not there.
    """
    stored = {stored_name(canonical(name)): tensor for name, tensor in (checkpoint_of(model) or {}).items()}
    with contextlib.closing(DiskReader()) as reader:
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            full = canonical(name)
            if is_placeholder(parameter):
                source = stored.get(stored_name(full))
                if source is None:
                    raise ModelError(
                        f"{full} is trained, but the checkpoint holds no weights for it: load the model outside of "
                        "memplan and use memplan.wrap or memplan.attach"
                    )
                parameter.data = read_stored(reader, source).to(parameter.device, parameter.dtype)
            elif not bool(torch.isfinite(parameter.detach()).all()):
                raise _made_too_early(full)


def _made_too_early(name: str) -> ModelError:
    return ModelError(
        f"{name} was made of weights that were not there yet: an adapter whose beginning rests on the model's "
        "weights, in another dtype than the checkpoint's. Load the model with its weights, add the adapter, and use "
        "memplan.wrap or memplan.attach"
    )


def _require_placeholders(model: nn.Module, buffers: set[int]) -> None:
    """Check that nothing was made of a placeholder: a cast, a copy or a sum of one is not seen to be one.

    ``buffers``: the ids of those that were there before. Raises ModelError.
    """
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, parameter in frozen:
        if origin_of(parameter) is not None and parameter.numel() and not is_placeholder(parameter):
            raise ModelError(
                f"{canonical(name)} was replaced, cast or copied before its weights were there: load the model with "
                "its weights, change it, and use memplan.wrap or memplan.attach"
            )
    made: list[tuple[str, torch.Tensor]] = [(name, held) for name, held in frozen if origin_of(held) is None]
    made += [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in buffers]
    for name, tensor in made:
        if tensor.is_floating_point() and bool(torch.isnan(tensor.detach()).any()):
            raise _made_too_early(canonical(name))


def _dtype_of(plan: Plan) -> str:
    """Return the dtype that most of the plan's weights have."""
    sizes: dict[str, int] = {}
    for block in plan.table.blocks:
        for tensor in block.tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _adapted(model: nn.Module, adapter: Any) -> nn.Module:
    if not isinstance(adapter, (str, Path)):
        return with_adapter(model, adapter, real=True)
    if not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise CheckpointError(f"{adapter} holds no adapter_model.safetensors: give the folder of a saved adapter")
    import peft

    asked: Any = model
    try:
        adapted: nn.Module = peft.PeftModel.from_pretrained(asked, str(adapter), is_trainable=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise CheckpointError(f"the adapter in {adapter} does not fit {type(model).__name__}: {reason}") from error
    return adapted


@contextlib.contextmanager
def _readable(model: nn.Module) -> Iterator[None]:
    """Have the weights mapped from the checkpoint inside, where it holds them as they are.

    Some adapters look at them when they are made (DoRA's magnitudes). Raises ModelError where one has changed them
    (PiSSA takes its part out of them).
    """
    stored = checkpoint_of(model) or {}
    away: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor, StoredTensor]] = []
    with contextlib.closing(DiskReader()) as reader:
        for parameter, names in names_of(model):
            held = next((stored[name] for name in names if name in stored), None)
            if isinstance(held, StoredTensor) and dtype_of(held.dtype) == parameter.dtype:
                raw = map_stored(reader, held, held.size_bytes)
                away.append((parameter, parameter.data, raw, held))
                parameter.data = raw.view(parameter.dtype).view(held.shape)
        try:
            yield
            for parameter, _, raw, held in away:
                some = min(_SOME_BYTES, held.size_bytes)
                if parameter.data_ptr() != raw.data_ptr() or not torch.equal(
                    raw[:some], map_stored(reader, held, some)
                ):
                    raise ModelError(
                        f"the adapter has changed the weight {held.name} that it was added to (as PiSSA, OLoRA and "
                        "CorDA do), and memplan only ever reads those: save the changed model, or begin the adapter "
                        "in another way"
                    )
        finally:
            for parameter, placeholder, _, _ in away:
                parameter.data = placeholder


@contextlib.contextmanager
def _bar(name: str, size_bytes: int, wanted: bool | None) -> Iterator[Callable[[int], None] | None]:
    """A bar that moves with each block that has come home."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"Loading {name}", total=size_bytes)
        yield lambda done: bar.advance(task, done)
