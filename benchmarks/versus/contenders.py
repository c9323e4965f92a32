"""The contenders: how each makes a model of a checkpoint that trains.

Each is a function from a Setting to a Training, run in a process of its own. All adapters begin with the same values.
The CUDA branches are unproven: no GPU has run them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

import memplan
from benchmarks.link import Throttled
from benchmarks.versus.models import STD
from benchmarks.versus.training import LEARNING_RATE, Setting, Training, Whole
from memplan.demo import align
from memplan.model.adapters import with_adapter
from memplan.model.names import canonical
from memplan.program.schema import Plan

MAP_SHARE = 0.25
"""Of the layers that ``accelerate-map`` keeps on the device."""


# ---- what they share
# -----------------------------------------------------------------------------------------------------


def base_of(setting: Setting, device: str) -> nn.Module:
    """Return the base model with its weights on ``device``, each aligned as torch aligns a tensor of its own."""
    dtype = getattr(torch, setting.model.dtype)
    if setting.model.is_flux:
        from diffusers import FluxTransformer2DModel

        model: Any = FluxTransformer2DModel.from_pretrained(setting.checkpoint, torch_dtype=dtype).to(device)
    else:
        import transformers

        (name,) = json.loads((setting.checkpoint / "config.json").read_text())["architectures"]
        place = {"device_map": {"": device}} if device == "cuda" or setting.model.nf4 else {}
        model = getattr(transformers, name).from_pretrained(setting.checkpoint, dtype=dtype, **place)
    if device == "cpu" and not setting.model.nf4:
        align(model)
    return model


def adapted(model: nn.Module, setting: Setting) -> nn.Module:
    """Return the model with its adapter, in training mode."""
    return begun(with_adapter(model, setting.model.adapter, real=True), setting)


def begun(model: nn.Module, setting: Setting) -> nn.Module:
    """Give the adapter values that its names alone say (none of them zero: every gradient then is one)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(canonical(name).encode()))
                parameter.copy_(torch.empty(parameter.shape).normal_(0, STD, generator=generator))
    return model.train()


def checkpointed(model: Any, setting: Setting) -> None:
    """Have a contender that leaves activations alone recompute them, where the part says so."""
    if setting.checkpointing:
        base = model.get_base_model()
        if setting.model.is_flux:
            base.enable_gradient_checkpointing()
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})


def stacks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yield each repeated stack that lies in no other, with its owner."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            yield model, child
        else:
            yield from stacks(child)


def trainables(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training(setting: Setting, model: nn.Module, kind: type[Training] = Training, **more: Any) -> Training:
    optimizer = torch.optim.AdamW(trainables(model), lr=LEARNING_RATE)
    return kind(setting=setting, model=model, optimizer=optimizer, **more)


# ---- memplan
# -------------------------------------------------------------------------------------------------------------


def whole(setting: Setting, name: str) -> Training:
    model = adapted(base_of(setting, setting.device), setting)
    checkpointed(model, setting)
    return training(setting, model, Whole)


def planned(setting: Setting, name: str) -> Training:
    """Return the model under the plan of that name. On the CPU loads take what the plan's link takes."""
    plan = Plan.load(setting.plans / f"{name}.json")
    Throttled.bytes_per_s = plan.table.host_to_device_bytes_per_s
    with mock.patch("memplan.run.modules.install.CpuTransfers", Throttled):
        if setting.model.nf4:  # which memplan.load does not read: in RAM as a whole until it is attached
            model = adapted(base_of(setting, "cpu"), setting)
            handle = memplan.attach(model, plan)
        else:
            model = begun(
                memplan.load(setting.checkpoint, plan, adapter=setting.model.adapter, progress=False), setting
            )
            found = memplan.handle_of(model)
            assert found is not None
            handle = found
    return training(setting, model, handle=handle, plan=plan)


# ---- peers
# ---------------------------------------------------------------------------------------------------------------


def process_group(setting: Setting) -> None:
    from torch.distributed import HashStore, init_process_group

    init_process_group(
        "cpu:gloo,cuda:nccl" if setting.device == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1
    )


def fsdp2(setting: Setting, name: str) -> Training:
    """``fully_shard`` of each layer and the rest, with its CPU offload, in one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    process_group(setting)
    mesh = init_device_mesh(setting.device, (1,))
    model = adapted(base_of(setting, "cpu"), setting)
    checkpointed(model, setting)
    policy = CPUOffloadPolicy(pin_memory=setting.device == "cuda")
    for _, stack in stacks(model):
        for layer in stack:
            fully_shard(layer, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(setting.device)
    return training(setting, model)


def deepspeed(setting: Setting, name: str) -> Training:
    """ZeRO-3 with its parameters in RAM, or in files. The optimizer is the same as everyone's."""
    import deepspeed as library  # type: ignore[import-not-found, unused-ignore]

    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(20000 + os.getpid() % 20000))
    library.init_distributed(dist_backend="nccl" if setting.device == "cuda" else "gloo")
    model = adapted(base_of(setting, "cpu"), setting)
    checkpointed(model, setting)
    on_disk = name.endswith("nvme")
    offload: dict[str, Any] = {"device": "nvme" if on_disk else "cpu", "pin_memory": True}
    if on_disk:  # a buffer must hold the greatest weight, and is too small for an embedding unless it is told to
        most = max(parameter.numel() for parameter in model.parameters())
        offload |= {"nvme_path": str(setting.scratch), "buffer_size": most + 1}
    engine, *_ = library.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trainables(model), lr=LEARNING_RATE),
        config={
            "train_micro_batch_size_per_gpu": setting.shape[0],
            "zero_optimization": {"stage": 3, "offload_param": offload},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": setting.model.dtype == "bfloat16"},
        },
    )
    held = torch.optim.AdamW(trainables(model))  # names what is trained; the engine's own steps
    return Training(
        setting=setting,
        model=engine,
        optimizer=held,
        backward=engine.backward,
        step=engine.step,
        gradient=library.utils.safe_get_full_grad,
    )


def accelerate_whole(setting: Setting, name: str) -> Training:
    """``cpu_offload`` or ``disk_offload`` of the model with its adapter."""
    from accelerate import cpu_offload, disk_offload

    model = adapted(base_of(setting, "cpu"), setting)
    checkpointed(model, setting)
    device = torch.device(setting.device)
    if name.endswith("disk"):
        disk_offload(model, setting.scratch / "weights", execution_device=device)
    else:
        cpu_offload(model, execution_device=device)
    return training(setting, model)


def accelerate_map(setting: Setting, name: str) -> Training:
    """``dispatch_model`` by a device map, first layers on the device, the adapter added after: as transformers' users
    do.
    """
    from accelerate import dispatch_model

    model: Any = base_of(setting, "cpu")
    on_device: Any = 0 if setting.device == "cuda" else "cpu"
    away = "cpu" if setting.device == "cuda" else "disk"
    names = {id(module): name for name, module in model.named_modules()}
    layers = [names[id(layer)] for _, stack in stacks(model) for layer in stack]
    place = {layer: on_device if i < MAP_SHARE * len(layers) else away for i, layer in enumerate(layers)}
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        if not any(parameter.startswith(layer + ".") for layer in layers):
            place[parameter.rpartition(".")[0] or parameter] = on_device
    for buffer, _ in model.named_buffers():
        if not any(buffer.startswith(f"{module}.") for module in place):
            place[buffer.rpartition(".")[0] or buffer] = on_device
    model = dispatch_model(model, place, main_device=on_device, offload_dir=str(setting.scratch / "weights"))
    model = with_adapter(model, setting.model.adapter, real=True)
    for module in model.modules():  # PEFT leaves them where their layer's weight is: on meta
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device=setting.device))
    begun(model, setting)
    checkpointed(model, setting)
    return training(setting, model)


def diffusers_group(setting: Setting, name: str) -> Training:
    """Group offload by diffusers of the repeated stacks, a block ahead on a stream where there is one."""
    from diffusers.hooks import apply_group_offloading

    model = adapted(base_of(setting, "cpu"), setting)
    checkpointed(model, setting)
    inside = {id(p) for _, stack in stacks(model) for p in stack.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.data = parameter.data.to(setting.device)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(setting.device)
    on_cuda = setting.device == "cuda"
    for owner in {id(owner): owner for owner, _ in stacks(model)}.values():
        apply_group_offloading(
            owner,
            onload_device=torch.device(setting.device),
            offload_type="block_level",
            num_blocks_per_group=1,
            use_stream=on_cuda,
            non_blocking=on_cuda,
        )
    return training(setting, model)


PEERS: dict[str, Callable[[Setting, str], Training]] = {
    "fsdp2-offload": fsdp2,
    "deepspeed-cpu": deepspeed,
    "deepspeed-nvme": deepspeed,
    "accelerate-cpu": accelerate_whole,
    "accelerate-disk": accelerate_whole,
    "accelerate-map": accelerate_map,
    "diffusers-group": diffusers_group,
}
PLANNED = ("memplan-50", "memplan-25", "memplan-12.5", "memplan-least", "spread-25")
"""memplan with that many percent of the frozen bytes on the device, beside what all else takes with every activation
kept, and with the least that works. ``spread``: evenly spread in equal slots, every layer recomputed, as memplan runs
it."""
CARD = ("memplan-card", "spread-card")
"""The same with all that an emulated card holds."""


def begin(name: str, setting: Setting) -> Training:
    """Return the contender of that name, ready to train."""
    if setting.card_bytes is not None:
        limit_card(setting.card_bytes)
    from benchmarks.versus.streamers import STREAMERS  # which is made of what is here

    make = whole if name == "whole" else {**PEERS, **STREAMERS}.get(name, planned)
    return make(setting, name)


def limit_card(card_bytes: int | None) -> int:
    """Have torch allocate no more than a card of ``card_bytes`` would give (None: this one); return the bytes that the
    process takes beside its allocator.
    """
    torch.zeros(1, device="cuda")  # the context is there from now on
    free, total = torch.cuda.mem_get_info()
    # Of such a card the process's context would take its part too; the fraction is of what torch allocates.
    context = max(0, total - free - torch.cuda.memory_reserved())
    fraction = 1.0 if card_bytes is None else min(1.0, max(0, card_bytes - context) / total)
    torch.cuda.set_per_process_memory_fraction(fraction)
    return context
