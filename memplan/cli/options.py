"""Options that commands share, and what a model and a training are asked about with."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from memplan.units import parse_size

if TYPE_CHECKING:
    from types import ModuleType

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
VRAM = click.option("--vram", metavar="SIZE", default="auto", show_default=True, help="Device memory, such as 6GiB.")
RAM = click.option("--ram", metavar="SIZE", help="Host memory, such as 24GiB.  [default: what is available]")
DISK = click.option(
    "--disk", metavar="SIZE", help="Disk for packed blocks.  [default: the checkpoint's own files only]"
)
PAGE_LOCK = click.option(
    "--page-lock",
    metavar="SIZE",
    help="Of RAM what a GPU may have page-locked.  [default: all, or where the profile saw a limit]",
)
HARDWARE = click.option(
    "--hardware",
    "--gpu",
    "hardware",
    metavar="NAME|FILE",
    default="auto",
    show_default=True,
    help="A card such as rtx-4090, a profile's file, or auto: this machine, measured.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")

_QUANTIZERS = ("bitsandbytes", "torchao")
"""Slow to import: two of the ten seconds that a plan takes."""
_ALL_LINEAR = "all-linear"
_TIERS = ("device", "host", "disk")
_OPTIONS = (
    click.argument("model"),
    VRAM,
    RAM,
    DISK,
    PAGE_LOCK,
    click.option("--batch", metavar="N", type=COUNT, default=1, show_default=True, help="Sequences of a micro-batch."),
    click.option("--seq", metavar="N", type=COUNT, help="Tokens of a sequence.  [default: 512 where it reads text]"),
    click.option(
        "--accumulation", metavar="N", type=COUNT, default=1, show_default=True, help="Micro-batches of a step."
    ),
    click.option("--lora-rank", metavar="N", type=COUNT, default=16, show_default=True, help="Rank of the adapter."),
    click.option(
        "--lora-targets", metavar="NAMES", default="all-linear", show_default=True, help="Such as q_proj,v_proj."
    ),
    click.option("--dtype", metavar="NAME", default="bf16", show_default=True, help="Of the frozen weights."),
    click.option("--attention", metavar="NAME", help="Attention kernel.  [default: the model's own]"),
    click.option("--quantization", metavar="NAME", help="Of the frozen weights, such as nf4, nf4-nested or int8."),
    click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Where the forward runs under autocast."),
    click.option(
        "--optimizer",
        metavar="NAME",
        default="adamw",
        show_default=True,
        help="Its state counts: as transformers' optim, or a name of memplan's.",
    ),
    HARDWARE,
    click.option(
        "--activations",
        type=click.Choice(["keep", "recompute", "offload", "any"]),
        help="Of every layer; any: chosen among all three, after one look more.  [default: kept or recomputed]",
    ),
    click.option(
        "--elastic/--no-elastic",
        default=None,
        help="Weights have more room where activations leave it.  [default: on the CPU alone; no GPU has proven it]",
    ),
    click.option(
        "--optimizer-state",
        type=click.Choice(["device", "host"]),
        help="Where it lies between steps.  [default: as a step is shorter; on the CPU device]",
    ),
    click.option("--pin", "pins", multiple=True, metavar="BLOCK=TIER", help="Such as layers.3=device. Repeatable."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A model and a training, as given on the command line."""

    model: str
    vram: str
    ram: str | None
    disk: str | None
    page_lock: str | None
    batch: int
    seq: int | None
    accumulation: int
    lora_rank: int
    lora_targets: str
    dtype: str
    attention: str | None
    quantization: str | None
    autocast: str | None
    optimizer: str
    hardware: str
    activations: str | None
    elastic: bool | None
    optimizer_state: str | None
    pins: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a micro-batch."""
        return (self.batch,) if self.seq is None else (self.batch, self.seq)

    def files(self) -> dict[str, Path | None]:
        """Return the files that this names, by what names them."""
        from memplan.models import folder_of

        folder = folder_of(self.model)
        return {
            "MODEL": None if folder is None else folder / "config.json",
            "--hardware": Path(self.hardware) if os.path.isfile(self.hardware) else None,
        }

    def arguments(self) -> dict[str, Any]:
        """Return the keywords of :func:`memplan.plan`, but for the shape. Raises click.BadParameter and InputError."""
        targets = [target for target in map(str.strip, self.lora_targets.split(",")) if target]
        if not targets:
            raise click.BadParameter("give module names, or all-linear.", param_hint="--lora-targets")
        return {
            "vram": "auto" if self.vram.lower() == "auto" else parse_size(self.vram, "--vram"),
            "ram": None if self.ram is None or self.ram.lower() == "auto" else parse_size(self.ram, "--ram"),
            "disk": None if self.disk is None else parse_size(self.disk, "--disk"),
            "page_lock": None if self.page_lock is None else parse_size(self.page_lock, "--page-lock"),
            "adapter": {"rank": self.lora_rank, "targets": _ALL_LINEAR if _is_all(targets) else targets},
            "dtype": self.dtype,
            "attention": self.attention,
            "quantization": self.quantization,
            "autocast": self.autocast,
            "accumulation": self.accumulation,
            "optimizer": self.optimizer,
            "hardware": self.hardware,
            "pins": _parse_pins(self.pins),
            "activations": self.activations,
            "elastic": self.elastic,
            "optimizer_state": self.optimizer_state,
        }

    def prepare(self, *, own_process: bool) -> None:
        """Have this process be quick. ``own_process``: quantizers that are not asked for may be left out of it."""
        from memplan import models
        from memplan.analyze import kept

        kept.ours = True
        if own_process and self.quantization is None and models.is_plain(self.model):
            _leave_out(_QUANTIZERS)
        gc.disable()  # a sixth of the time, and little is left to collect


def asking(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the model and the options of a training, as ``asked``."""

    @functools.wraps(command)
    def called(*args: Any, **given: Any) -> int:
        asked = Asked(**{field.name: given.pop(field.name) for field in fields(Asked)})
        return command(*args, asked, **given)

    for option in reversed(_OPTIONS):
        called = option(called)
    return called


def _leave_out(packages: Sequence[str]) -> None:
    """Have packages that are not needed be as if they were not installed: PEFT and transformers import what they find."""
    for package in packages:
        # An import that finds None there says that there is no such package.
        sys.modules.setdefault(package, cast("ModuleType", None))


def _is_all(targets: Sequence[str]) -> bool:
    return [target.lower().replace("_", "-") for target in targets] == [_ALL_LINEAR]


def _parse_pins(pins: tuple[str, ...]) -> dict[str, str]:
    tiers: dict[str, str] = {}
    for pin in pins:
        block, _, tier = pin.rpartition("=")
        if not block or tier not in _TIERS:
            raise click.BadParameter(
                f"{pin!r} is not BLOCK=TIER with the tier {', '.join(_TIERS[:-1])} or {_TIERS[-1]}.", param_hint="--pin"
            )
        if tiers.setdefault(block, tier) != tier:
            raise click.BadParameter(f"{block!r} is pinned to {tiers[block]} and to {tier}.", param_hint="--pin")
    return tiers
