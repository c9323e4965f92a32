"""What a plan is asked for: the one list of options, and the value that they become, checked once. No torch here.

A slip is refused before anything heavy is imported: an option that there is none of, a word that is not known, a size
without its unit. What only the model or the machine can tell is checked by :mod:`memplan.case`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from memplan.analyze.blocks.optimizers import optimizer_name
from memplan.cost.group import sizes
from memplan.cost.ranks import Ranks
from memplan.errors import InputError
from memplan.model.arguments import QLORA, Understood, autocast_name, like, understood
from memplan.plan_options import PlanOptions
from memplan.units import format_bytes, parse_rate, parse_size

if TYPE_CHECKING:
    from memplan.analyze.graph import Activations
    from memplan.hardware.profile import HardwareProfile
    from memplan.program.schema import LossKind, StateHome, Tier

TIERS: tuple[Tier, ...] = ("device", "host", "disk")
STATE_HOMES: tuple[StateHome, ...] = ("device", "host")
ACTIVATIONS: tuple[Activations, ...] = ("keep", "recompute", "offload")
LOSSES: tuple[LossKind, ...] = ("full", "chunked", "fused")
Trainer = Literal["transformers", "trl-sft", "trl-dpo"]
TRAINERS: tuple[Trainer, ...] = ("transformers", "trl-sft", "trl-dpo")
AUTO = "auto"
DEFAULT_GROUP: int | str = 1
"""Of the option ``group``, here alone: ``"auto"`` once what trains under a plan passes groups unless told otherwise."""
GRAINS = ("layers", "parts")
ANY = "any"
"""Activations that may be offloaded too, where that is fastest."""


NAMES = tuple(PlanOptions.__annotations__)
"""Of the options, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Budgets in bytes as they were asked for; None: as the machine has it."""

    vram_bytes: int | None
    ram_bytes: int | None
    disk_bytes: int | None
    page_lock_bytes: int | None
    margin_bytes: int
    """Of the vram what is left free; never None."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Sizes:
        """Return the budgets among the options. Raises SizeError."""
        vram, ram = options.get("vram", "auto"), options.get("ram")
        disk, page_lock = options.get("disk"), options.get("page_lock")
        vram_bytes = None if vram == "auto" else parse_size(vram, "vram")
        margin_bytes = parse_size(options.get("margin", 0), "margin")
        if vram_bytes and margin_bytes >= vram_bytes:
            raise InputError(
                f"the margin was given as {format_bytes(margin_bytes)}, which leaves nothing of the vram of "
                f"{format_bytes(vram_bytes)}: give less than that"
            )
        return cls(
            vram_bytes=vram_bytes,
            margin_bytes=margin_bytes,
            ram_bytes=None if ram is None or ram == "auto" else parse_size(ram, "ram"),
            disk_bytes=None if disk is None else parse_size(disk, "disk"),
            page_lock_bytes=None if page_lock is None else parse_size(page_lock, "page_lock"),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What is done with the model, and how often."""

    accumulation: int
    groups: tuple[int, ...]
    """Sizes of groups of micro-batches of which one is chosen, the smallest first."""
    ranks: Ranks
    network_bytes_per_s: float | None
    """Between two nodes; None where nobody said."""
    steps: int | None
    """Of the whole run, as far as they are known: counted from the examples where those are given."""
    examples: int | None
    epochs: int | None
    optimizer: str
    """By the name that memplan knows."""
    autocast: Any
    loss: Callable[[Any], Any] | None
    loss_kind: LossKind
    trained_by: Trainer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Build:
    """What a model is built with: the keywords of :func:`memplan.analyze.inputs.prepare.prepare`."""

    adapter: Any
    dtype: Any
    attention: str | None
    quantization: Any
    kbit: bool
    gradient_checkpointing: bool | None

    def keywords(self) -> dict[str, Any]:
        """Return them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the placement was told to do or to look at."""

    pins: Mapping[str, Tier]
    """By what a block was called."""
    activations: Mapping[str, Activations]
    """By what a layer was called; an empty name stands for all layers."""
    offload_where_best: bool
    """Whether layers for which nothing is asked may be offloaded too (``"any"``)."""
    elastic: bool | None
    parts: bool
    """Whether layers are in parts."""
    optimizer_state: StateHome | None
    measure: bool
    max_step_s: float | None
    gains: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """A model, a batch, and what is asked of their plan: understood, and checked as far as that needs no torch."""

    model: Any
    """By the name that memplan knows, where it was given as one."""
    batch: Any
    sizes: Sizes
    training: Training
    build: Build
    choices: Choices
    hardware: str | Path | HardwareProfile
    checkpoint: str | Path | None
    progress: Callable[[str], None] | None
    notes: tuple[str, ...]
    """What is to be said of how it was understood."""

    @classmethod
    def of(cls, model: Any, batch: Any, options: Mapping[str, Any]) -> Request:
        """Return what is asked; ``options``: those of :class:`PlanOptions`.

        Raises InputError for an option that there is none of, with those that are near it, and for what cannot be used.
        """
        check_names(options)
        given = cast("PlanOptions", options)
        max_step_s = given.get("max_step_s")
        if max_step_s is not None:
            check_speed(max_step_s)
        accumulation: Any = given.get("accumulation", 1)
        if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
            raise InputError(
                f"accumulation was given as {accumulation!r}: give a whole number of micro-batches, at least 1"
            )
        groups = _groups(given.get("group", DEFAULT_GROUP), accumulation)
        if parts := _parts(given):
            groups = groups[:1]
        ranks = _ranks(given)
        if ranks.count > 1 and groups != (1,):
            if given.get("group") != AUTO:
                raise InputError(
                    f"group was given as {given.get('group')}, but micro-batches that share loads go one by one on "
                    "several ranks: leave group out"
                )
            groups = (1,)
        network = given.get("network")
        qlora, kbit, autocast, optimizer = (
            given.get("qlora", False), given.get("kbit"), given.get("autocast"), given.get("optimizer"),
        )  # fmt: skip
        if qlora:
            _require_description(model)
            kbit, autocast = kbit is not False, autocast or "bf16"
            optimizer = optimizer or "paged_adamw_8bit"
        steps, epochs = _run_of(batch, accumulation, given)
        sizes = Sizes.of(given)
        activations = _activations(given.get("activations"))
        pins = _pins(given.get("pins"))
        optimizer = optimizer_name(optimizer or "adamw")
        optimizer_state = _optimizer_state(given.get("optimizer_state"), optimizer)
        loss, loss_kind = _loss(given.get("loss"))
        trained_by = _trained_by(given.get("trained_by"), model, loss, loss_kind)
        said = _understood(model, given)
        if autocast is not None:
            autocast_name(autocast)
        return cls(
            model=said.model,
            batch=batch,
            sizes=sizes,
            training=Training(
                accumulation=accumulation,
                groups=groups,
                ranks=ranks,
                network_bytes_per_s=None if network is None else parse_rate(network, "network"),
                steps=steps,
                examples=given.get("examples"),
                epochs=epochs,
                optimizer=optimizer,
                autocast=autocast,
                loss=loss,
                loss_kind=loss_kind,
                trained_by=trained_by,
            ),
            build=Build(
                adapter=given.get("adapter"),
                dtype=said.dtype or "bf16" if qlora else said.dtype,
                attention=given.get("attention"),
                quantization=said.quantization or QLORA if qlora else said.quantization,
                kbit=bool(kbit),
                gradient_checkpointing=given.get("gradient_checkpointing"),
            ),
            choices=Choices(
                pins=pins,
                activations=activations,
                offload_where_best=given.get("activations") == ANY,
                elastic=given.get("elastic"),
                parts=parts,
                optimizer_state=optimizer_state,
                measure=given.get("measure", False),
                max_step_s=max_step_s,
                gains=given.get("gains", True),
            ),
            hardware=given.get("hardware", "auto"),
            checkpoint=given.get("checkpoint"),
            progress=given.get("progress"),
            notes=said.notes,
        )


def check_names(options: Iterable[str]) -> None:
    """Raise InputError for an option that there is none of, with those that are near it."""
    for name in options:
        if name not in NAMES:
            raise InputError(
                f"there is no option {name!r}{like(name, NAMES)}. memplan.PlanOptions has all that there are, each "
                "with what it does"
            )


def refuse(options: Mapping[str, Any], names: Iterable[str], where: str, why: str) -> None:
    """Raise InputError where one of ``names`` is among the options of what has no use for it."""
    for name in names:
        if name in options:
            raise InputError(f"{name} was given to {where}, {why}: leave it out")


def refuse_beside_plan(options: Mapping[str, Any]) -> None:
    """Raise InputError for options that were given with a plan that was made before: it has its own.

    The checkpoint is also for what puts the plan to work.
    """
    for name in options:
        if name != "checkpoint":
            raise InputError(
                f"{name} was given with a plan that was made before, which has its own: leave out {name}, or the plan"
            )


def completed(options: Mapping[str, Any], **said: Any) -> dict[str, Any]:
    """Return options with what a trainer says itself in place of those that were left out."""
    if options.get("loss") == "full":  # the trainer knows what it makes of the output
        options = {name: value for name, value in options.items() if name != "loss"}
    if "examples" in options or "epochs" in options:
        said.pop("steps", None)  # they are to be counted
    return {**said, **options}


def check_speed(max_step_s: float) -> None:
    """Raise InputError for what is no time of a step."""
    if not 0 < max_step_s < float("inf"):
        raise InputError(f"the longest step was given as {max_step_s!r} s: give seconds, more than 0")


def tier_of(given: object) -> Tier | None:
    """Return the tier of that name, or None."""
    return next((tier for tier in TIERS if tier == given), None)


def _understood(model: Any, given: PlanOptions) -> Understood:
    return understood(
        model,
        dtype=given.get("dtype"),
        quantization=given.get("quantization"),
        attention=given.get("attention"),
        adapter=given.get("adapter"),
    )


def _require_description(model: Any) -> None:
    """Raise InputError for ``qlora`` with a module: what it stands for is done as a model is built."""
    if callable(getattr(model, "named_parameters", None)):
        raise InputError(
            f"qlora was given with a {type(model).__name__} that is built already: give its configuration or name, "
            "or build it as it is trained (prepare_model_for_kbit_training, then the adapter) and give autocast and "
            "optimizer"
        )


def _run_of(batch: Any, accumulation: int, given: PlanOptions) -> tuple[int | None, int | None]:
    """Return the steps and the epochs of a run, as far as they are known."""
    steps, examples, epochs = given.get("steps"), given.get("examples"), given.get("epochs")
    counts: dict[str, Any] = {"steps": steps, "examples": examples, "epochs": epochs}
    for what, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"{what} were given as {count!r}: give a whole number, at least 1")
    if examples is None:
        if epochs is not None:
            raise InputError("epochs were given without the examples of one: give examples too, or steps alone")
        return steps, None
    if steps is not None:
        raise InputError("steps were given, and examples to count them from: give one of the two")
    sizes = tuple(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(sizes, (tuple, list)) or not sizes or not all(type(size) is int for size in sizes):
        raise InputError(
            "examples were given to count steps from, but the batch is no shape, so how many of them it holds is not "
            "known: give steps, or batch as (batch, sequence)"
        )
    epochs = 1 if epochs is None else epochs
    passes = -(-examples // max(1, batch["batch"] if isinstance(batch, Mapping) else batch[0]))
    return epochs * -(-passes // accumulation), epochs


def _groups(given: object, accumulation: int) -> tuple[int, ...]:
    """Return the sizes of groups that may be chosen, the smallest first."""
    if given == AUTO:
        return sizes(accumulation)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise InputError(f"group was given as {given!r}: give a number of micro-batches, 1 or more, or {AUTO}")
    return (min(given, accumulation),)


def _parts(given: PlanOptions) -> bool:
    """Return whether layers are to be in parts."""
    blocks = given.get("blocks", GRAINS[0])
    if blocks not in GRAINS:
        raise InputError(f"the blocks were given as {blocks!r}: give one of {', '.join(GRAINS)}")
    if blocks == GRAINS[0]:
        return False
    group = given.get("group", DEFAULT_GROUP)
    if group not in (1, AUTO):
        raise InputError(
            f"layers in parts cannot be shared by a group of {group} micro-batches: leave group or blocks out"
        )
    if given.get("activations") is not None:
        raise InputError("layers in parts are recomputed as a whole: leave activations or blocks out")
    if given.get("measure"):
        raise InputError("the times of layers in parts cannot be measured: leave measure or blocks out")
    return True


def _ranks(given: PlanOptions) -> Ranks:
    """Return how many ranks train."""
    counts: dict[str, Any] = {"gpus": given.get("gpus", 1), "nodes": given.get("nodes", 1)}
    for what, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"{what} were given as {count!r}: give a whole number, at least 1")
    return Ranks(nodes=counts["nodes"], per_node=counts["gpus"])


def _activations(given: str | Mapping[str, str] | None) -> dict[str, Activations]:
    if given is None or given == ANY:
        return {}
    found: dict[str, Activations] = {}
    for name, policy in (given if isinstance(given, Mapping) else {"": given}).items():
        known = next((one for one in ACTIVATIONS if one == policy), None)
        if known is None:
            raise InputError(
                f"the activations{f' of {name}' if name else ''} were given as {policy!r}: give one of "
                f"{', '.join(ACTIVATIONS)}" + ("" if name else f" or {ANY}")
            )
        found[name] = known
    return found


def _pins(given: Mapping[str, str] | None) -> dict[str, Tier]:
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"the pins were given as {given!r}: give a tier by block name, one of {', '.join(TIERS)}")
    found: dict[str, Tier] = {}
    for name, word in (given or {}).items():
        tier = tier_of(word)
        if tier is None:
            raise InputError(f"the pin {name}={word} names the tier {word!r}: give one of {', '.join(TIERS)}")
        found[name] = tier
    return found


def _loss(given: object) -> tuple[Callable[[Any], Any] | None, LossKind]:
    """Return the loss that was given as a function, and of what kind the model's own is."""
    if given is None or callable(given):
        return given, "full"
    kind = next((kind for kind in LOSSES if kind == given), None)
    if kind is None:
        raise InputError(f"the loss was given as {given!r}: give a function, or one of {', '.join(LOSSES)}")
    return None, kind


def _trained_by(given: object, model: Any, loss: object, kind: LossKind) -> Trainer:
    known = next((trainer for trainer in TRAINERS if trainer == (given or TRAINERS[0])), None)
    if known is None:
        raise InputError(f"the trainer was given as {given!r}: give one of {', '.join(TRAINERS)}")
    if known != TRAINERS[0]:
        if callable(getattr(model, "named_parameters", None)):
            raise InputError(
                f"the trainer was given with a {type(model).__name__} that is built already: give its configuration or "
                "name, or the trainer itself to memplan.wrap"
            )
        if loss is not None or kind != "full":
            raise InputError(f"a loss was given with the trainer {known}, which has its own: leave one of them out")
    return known


def _optimizer_state(given: str | None, optimizer: str) -> StateHome | None:
    home = next((home for home in STATE_HOMES if home == given), None)
    if home is None and given is not None:
        raise InputError(
            f"the optimizer's state cannot be in {given!r} between steps: give one of {', '.join(STATE_HOMES)}"
        )
    if not optimizer.startswith("paged_"):
        return home
    if home == "host":
        raise InputError(
            f"the state of {optimizer} is paged, and goes to the host between steps by itself: "
            "leave optimizer_state out, or use an optimizer that is not paged"
        )
    return "device"
