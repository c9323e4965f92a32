"""The options of everything that plans: their names, what each takes, and what it is when it is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from memplan.hardware.profile import HardwareProfile


class PlanOptions(TypedDict, total=False):
    """The options of a plan; what is left out is as the text of each says. ``docs/reference/options.md`` is their page.

    A trainer's own settings (accumulation, steps, optimizer, loss, autocast) stand in for what is left out where it is
    a trainer's model that is planned for.
    """

    vram: int | str
    """Device memory: bytes, or text such as ``"6GiB"``. ``"auto"``, the default: what is free less a reserve."""
    margin: int | str
    """Of ``vram`` what is left free, for what no plan can know (fragmentation, other processes): 0 unless it is
    given."""
    ram: int | str | None
    """Host memory of a node, as ``vram``. None or ``"auto"``: what is available less a reserve."""
    disk: int | str | None
    """Disk for packed blocks, as ``vram``. None: no disk beyond the checkpoint's own files."""
    page_lock: int | str | None
    """Maximum pinned host memory for a GPU; the rest of ``ram`` is read at the rate of pageable RAM. None: the
    profile's limit, where pinning was seen to fail, and else all."""
    hardware: str | Path | HardwareProfile
    """``"auto"``, the default (measured once, then cached), a shipped profile's name, or a profile's file."""
    adapter: Any
    """A PEFT configuration or ``{"rank": 16, "targets": "all-linear"}``, where the model has none yet."""
    dtype: Any
    """Of the frozen weights, such as ``"bf16"``, for a model that is built from its configuration."""
    attention: str | None
    """Attention kernel, for a model that is built from its configuration. None: its own."""
    quantization: Any
    """Of the frozen weights, for a model that is built from its configuration: ``"nf4"``, ``"nf4-nested"``, ``"fp4"``,
    ``"int8"`` and others (:data:`memplan.model.quantization.NAMES`), or transformers' configuration of it. None: as the
    model's configuration says; ``"none"``: dequantized, as one is trained that is stored as fp8 or mxfp4."""
    qlora: bool
    """QLoRA as PEFT documents it, each part unless it is given otherwise: ``quantization="nf4-nested"`` (or the
    configuration's own), ``kbit=True``, ``autocast="bf16"``, ``optimizer="paged_adamw_8bit"``. For a model that is
    built from its configuration."""
    kbit: bool | None
    """Prepared by PEFT's ``prepare_model_for_kbit_training`` (what is not quantized in float32, and gradient
    checkpointing), for a model that is built from its configuration. None: with ``qlora``."""
    gradient_checkpointing: bool | None
    """Turned on as the model is built from its configuration. None: as ``kbit`` does, else not, and memplan chooses
    what is recomputed."""
    autocast: str | None
    """``"bf16"`` or ``"fp16"``, where the forward will run under ``torch.autocast``, which saves casts of a float32
    base for backward. None: as the autocast that this is called in, if any."""
    accumulation: int
    """Micro-batches per step: 1 unless it is given."""
    group: int | str
    """Micro-batches of a step that share each load: so many pass each layer one after another before it leaves, which
    :meth:`memplan.Handle.accumulate` does. 1 unless it is given; ``"auto"``: as many as make a step shortest."""
    gpus: int
    """Data-parallel ranks of a node, each with its own device: 1 unless it is given. ``vram`` is that of each,
    ``ram`` and ``disk`` are the node's. Where ranks run already it is theirs."""
    nodes: int
    """Nodes of as many ranks each: 1 unless it is given."""
    network: int | float | str | None
    """Rate between two nodes: bytes a second, or text such as ``"10Gbit"``. None: 10 Gbit/s is assumed, and said."""
    steps: int | None
    """Total steps, to estimate run time."""
    examples: int | None
    """Of an epoch, to count the steps from, where the batch is a shape: each epoch ends with a step, however few are
    left for it."""
    epochs: int | None
    """Of the whole run, with ``examples``. None: one."""
    optimizer: str | None
    """Optimizer whose state is counted: a transformers ``optim`` name, or ``"adamw"`` (the default), ``"sgd"``,
    ``"momentum"`` and others.
    """
    loss: Callable[[Any], Any] | str | None
    """From the model's output to a scalar, where the output holds none. Or a word: ``"chunked"``, the model's own loss
    of labels for a few tokens at a time, which is opt-in since its bits differ; ``"fused"``, planned as Liger's fused
    linear cross entropy takes it, to look at; ``"full"``, the default."""
    trained_by: str | None
    """``"transformers"`` (the default), ``"trl-sft"`` or ``"trl-dpo"``, for a model that is built from its
    configuration: what the trainer calls it with, as the installed TRL does."""
    pins: Mapping[str, str] | None
    """Tier by block name: ``"device"``, ``"host"`` or ``"disk"``. A block may be named by its last parts, such as
    ``layers.3``."""
    activations: str | Mapping[str, str] | None
    """``"keep"``, ``"recompute"`` or ``"offload"`` (to RAM, until backward) for every layer, or by layer name. None:
    kept or recomputed, whichever is faster; ``"any"``: the fastest of the three, on a device with memory of its own
    (one extra trace)."""
    elastic: bool | None
    """Let weights use memory that activations leave free, for as long as they do. None: on the CPU alone, until
    validated on a GPU."""
    blocks: str
    """``"layers"``, the default: a layer's weights come together. ``"parts"``: those of each module in a layer come by
    themselves, and every layer is recomputed as a whole (one extra trace): for budgets with no room for two layers."""
    optimizer_state: str | None
    """``"device"``, or ``"host"`` for RAM between steps, from where it is brought for each step of the optimizer and
    sent back. None: whichever makes a step shorter (on the CPU: on the device)."""
    checkpoint: str | Path | None
    """Folder of safetensors that blocks may be read from. None: where the model says it came from."""
    measure: bool
    """Time each access on this machine, with one block's memory, in place of estimating it from rates."""
    max_step_s: float | None
    """The longest step that will do, in seconds."""
    gains: bool
    """Look at what one more GiB (of vram, of RAM, a second of the link) or a loss in chunks would save, for the report:
    so unless it is False, or the plan is a trainer's."""
    progress: Callable[[str], None] | None
    """Called with a short text before each part."""
