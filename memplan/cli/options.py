"""Options that commands share: those of a plan, in the one table that says how each is given on a command line."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import click

from memplan.cli.defaults import from_file, variable
from memplan.model.arguments import ALL_LINEAR, DEFAULT_TARGETS
from memplan.request import ACTIVATIONS, ANY, AUTO, GRAINS, LOSSES, STATE_HOMES, TIERS, TRAINERS, tier_of
from memplan.units import parse_rate, parse_size

if TYPE_CHECKING:
    from types import ModuleType

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")

_QUANTIZERS = ("bitsandbytes", "torchao")
"""Slow to import: two of the ten seconds that a plan takes."""


class Row(NamedTuple):
    """How an option of a plan is given on a command line."""

    said: tuple[click.Option, ...]
    read: Callable[..., Any] = lambda value: value
    """From their values to the option's; None: it was not given. Raises click.BadParameter and InputError."""
    with_script: bool = True
    """Whether it makes sense where a script makes the model and the batch."""


def _size(option: str, words: Sequence[str] = ()) -> Callable[[str | None], int | str | None]:
    def read(given: str | None) -> int | str | None:
        if given is None or given.lower() in words:
            return given and given.lower()
        return parse_size(given, option)

    return read


def _rate(given: str | None) -> float | None:
    return None if given is None else parse_rate(given, "--network")


def _adapter(rank: int, names: str) -> dict[str, Any]:
    targets = [target for target in map(str.strip, names.split(",")) if target]
    if not targets:
        raise click.BadParameter("give module names, or all-linear.", param_hint="--lora-targets")
    is_all = [target.lower().replace("_", "-") for target in targets] == [ALL_LINEAR]
    if targets == [DEFAULT_TARGETS]:
        return {"rank": rank, "targets": DEFAULT_TARGETS}
    return {"rank": rank, "targets": ALL_LINEAR if is_all else targets}


def _pins(given: tuple[str, ...]) -> dict[str, str] | None:
    tiers: dict[str, str] = {}
    for pin in given:
        block, _, word = pin.rpartition("=")
        tier = tier_of(word)
        if not block or tier is None:
            raise click.BadParameter(
                f"{pin!r} is not BLOCK=TIER with the tier {', '.join(TIERS[:-1])} or {TIERS[-1]}.", param_hint="--pin"
            )
        if tiers.setdefault(block, tier) != tier:
            raise click.BadParameter(f"{block!r} is pinned to {tiers[block]} and to {tier}.", param_hint="--pin")
    return tiers or None


def _group(given: str | None) -> int | str | None:
    if given is None or given == AUTO:
        return given
    if not given.isascii() or not given.isdecimal() or int(given) < 1:
        raise click.BadParameter(f"{given!r} is neither a number of micro-batches nor {AUTO}.", param_hint="--group")
    return int(given)


def _flag(given: bool) -> bool | None:
    return given or None


def _option(*names: str, **more: Any) -> tuple[click.Option, ...]:
    words = [name.partition("/")[0] for name in names if name.startswith("--")]
    return (click.Option(names, envvar=[variable(word) for word in words], **more),)


OPTIONS: dict[str, Row] = {
    "vram": Row(
        _option("--vram", metavar="SIZE", help="Device memory, such as 6GiB.  [default: auto, what is free]"),
        _size("--vram", ("auto",)),
    ),
    "margin": Row(
        _option("--margin", metavar="SIZE", help="Part of --vram to leave free.  [default: none of it]"),
        _size("--margin"),
    ),
    "ram": Row(
        _option("--ram", metavar="SIZE", help="Host memory, such as 24GiB.  [default: what is available]"),
        _size("--ram", ("auto",)),
    ),
    "disk": Row(
        _option("--disk", metavar="SIZE", help="Disk for packed blocks.  [default: the checkpoint's own files only]"),
        _size("--disk"),
    ),
    "page_lock": Row(
        _option(
            "--page-lock",
            metavar="SIZE",
            help="Maximum pinned host memory.  [default: all of --ram, or the limit that was measured]",
        ),
        _size("--page-lock"),
    ),
    "hardware": Row(
        _option(
            "--hardware",
            "--gpu",
            "hardware",
            metavar="NAME|FILE",
            help="A card such as rtx-4090, a profile's file, or auto: this machine, measured.  [default: auto]",
        )
    ),
    "adapter": Row(
        (
            *_option(
                "--lora-rank", metavar="N", type=COUNT, default=16, show_default=True, help="Rank of the adapter."
            ),
            *_option(
                "--lora-targets",
                metavar="NAMES",
                default=DEFAULT_TARGETS,
                help="Such as q_proj,v_proj, or all-linear.  [default: all-linear; with experts PEFT's for the type, "
                "or attention]",
            ),
        ),
        _adapter,
        with_script=False,
    ),
    "dtype": Row(
        _option("--dtype", metavar="NAME", default="bf16", show_default=True, help="Of the frozen weights."),
        with_script=False,
    ),
    "attention": Row(
        _option("--attention", metavar="NAME", help="Attention kernel.  [default: the model's own]"), with_script=False
    ),
    "quantization": Row(
        _option("--quantization", metavar="NAME", help="Of the frozen weights, such as nf4, nf4-nested or int8."),
        with_script=False,
    ),
    "qlora": Row(
        _option(
            "--qlora",
            is_flag=True,
            help="QLoRA as PEFT documents it: --quantization nf4-nested --kbit --autocast bf16 --optimizer "
            "paged_adamw_8bit.",
        ),
        _flag,
        with_script=False,
    ),
    "kbit": Row(
        _option(
            "--kbit/--no-kbit",
            default=None,
            help="Prepared by PEFT's prepare_model_for_kbit_training.  [default: with --qlora]",
        ),
        with_script=False,
    ),
    "gradient_checkpointing": Row(
        _option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            default=None,
            help="Turned on in the model itself.  [default: with --kbit; else memplan chooses what is recomputed]",
        ),
        with_script=False,
    ),
    "autocast": Row(
        _option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Where the forward runs under autocast.")
    ),
    "accumulation": Row(
        _option(
            "--accumulation",
            metavar="N",
            type=COUNT,
            help="Micro-batches per step.  [default: 1; with a script its trainer's]",
        )
    ),
    "group": Row(
        _option(
            "--group",
            metavar="N|auto",
            help="Micro-batches of a step that share each load; auto: as many as make a step shortest.  [default: 1]",
        ),
        _group,
    ),
    "gpus": Row(
        _option("--gpus", metavar="N", type=COUNT, help="Ranks of a node, under DDP.  [default: 1]"), with_script=False
    ),
    "nodes": Row(
        _option("--nodes", metavar="N", type=COUNT, help="Of so many ranks each.  [default: 1]"), with_script=False
    ),
    "network": Row(
        _option("--network", metavar="RATE", help="Between two nodes.  [default: 10Gbit, assumed]"),
        _rate,
    ),
    "steps": Row(
        _option(
            "--steps",
            metavar="N",
            type=COUNT,
            help="Total steps, to estimate run time.  [default: none; with a script its trainer's]",
        )
    ),
    "examples": Row(
        _option("--examples", metavar="N", type=COUNT, help="Of an epoch, to count the steps from."),
        with_script=False,
    ),
    "epochs": Row(
        _option("--epochs", metavar="N", type=COUNT, help="With --examples.  [default: 1]"), with_script=False
    ),
    "optimizer": Row(
        _option(
            "--optimizer",
            metavar="NAME",
            help="Optimizer whose state is counted: a transformers optim name or one of memplan's.  [default: adamw; "
            "with a script "
            "its trainer's]",
        )
    ),
    "loss": Row(
        _option(
            "--loss",
            type=click.Choice(LOSSES),
            help="Logits of all tokens at once, in memplan's chunks, or as Liger's fused loss.  [default: full]",
        ),
        with_script=False,
    ),
    "trained_by": Row(
        _option(
            "--trainer",
            "trained_by",
            type=click.Choice(TRAINERS),
            help="What the model is called with, as this trainer's loss does.  [default: transformers]",
        ),
        with_script=False,
    ),
    "pins": Row(
        _option("--pin", "pins", multiple=True, metavar="BLOCK=TIER", help="Such as layers.3=device. Repeatable."),
        _pins,
    ),
    "activations": Row(
        _option(
            "--activations",
            type=click.Choice([*ACTIVATIONS, ANY]),
            help="Activation policy for every layer; any: picks one per layer (one extra trace).  [default: kept or "
            "recomputed]",
        )
    ),
    "elastic": Row(
        _option(
            "--elastic/--no-elastic",
            default=None,
            help="Let weights use memory that activations leave free.  [default: on the CPU only, until validated on a "
            "GPU]",
        )
    ),
    "blocks": Row(
        _option(
            "--blocks",
            type=click.Choice(GRAINS),
            help="What comes at once; parts: each module of a layer by itself, for budgets below two layers.  "
            "[default: layers]",
        )
    ),
    "optimizer_state": Row(
        _option(
            "--optimizer-state",
            type=click.Choice(STATE_HOMES),
            help="Where it is kept between steps.  [default: whichever is faster; on the CPU device]",
        )
    ),
    "checkpoint": Row(
        _option(
            "--checkpoint",
            metavar="FOLDER",
            type=click.Path(exists=True, file_okay=False),
            help="Safetensors that blocks may be read from.  [default: the model's own]",
        )
    ),
    "measure": Row(
        _option("--measure", is_flag=True, help="Time every kind of layer on this machine, instead of by rates."), _flag
    ),
    "max_step_s": Row(
        _option("--max-step-s", metavar="S", type=float, help="The longest step that will do; else exit with 1.")
    ),
    "gains": Row(
        _option(
            "--gains/--no-gains",
            default=None,
            help="Look at what a little more memory would save.  [default: yes; with a script no]",
        )
    ),
}
"""By the names of :class:`memplan.request.PlanOptions`. What is a function, or told of otherwise, is not among them."""


class WithDefaults(click.Command):
    """A command whose options may have defaults in a file (:mod:`memplan.cli.defaults`)."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        listed = [option for row in OPTIONS.values() for option in row.said]
        words = {word.removeprefix("--"): str(option.name) for option in listed for word in option.opts}
        file, values = from_file(Path.cwd(), {**words, "batch": "batch", "seq": "seq"})
        mine = {str(parameter.name) for parameter in self.params}
        used = {name: value for name, value in values.items() if name in mine}
        context = super().make_context(info_name, args, parent, default_map=used, **extra)
        said = [name for name in used if context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP]
        if file is not None and said:
            click.echo(f"memplan: from {file.name}: {', '.join(said).replace('_', '-')}", err=True)
        return context


def training(*, without: Sequence[str] = ()) -> list[click.Parameter]:
    """Return the parameters of a command that is asked about a model and a training: ``model``, ``batch``, ``seq``,
    sizes in pixels, and the options of a plan but for those ``without``.
    """
    rows = [row for name, row in OPTIONS.items() if name not in without]
    return [
        click.Argument(["model"]),
        *_option("--batch", metavar="N", type=COUNT, default=1, show_default=True, help="Sequences of a micro-batch."),
        *_option("--seq", metavar="N", type=COUNT, help="Tokens of a sequence.  [default: 512 where it reads text]"),
        *_option("--height", metavar="PIXELS", type=COUNT, help="Of images or videos, for a model of diffusers."),
        *_option("--width", metavar="PIXELS", type=COUNT, help="Likewise.  [default: as the model is configured]"),
        *_option("--frames", metavar="N", type=COUNT, help="Of a video.  [default: 81]"),
        *(option for row in rows for option in row.said),
    ]


def of_script() -> list[click.Parameter]:
    """Return the parameters of a command that runs a script: the options of a plan that say nothing of its model."""
    return [option for row in OPTIONS.values() if row.with_script for option in row.said]


def given(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a plan that were given, from the values of a command's parameters.

    Raises click.BadParameter and InputError.
    """
    found: dict[str, Any] = {}
    for name, row in OPTIONS.items():
        values = [said[str(option.name)] for option in row.said if option.name in said]
        value = row.read(*values) if values else None
        if value is not None:
            found[name] = value
    if "steps" in found and "examples" in found:
        raise click.BadParameter("give --steps or --examples, not both.", param_hint="--steps")
    if "epochs" in found and "examples" not in found:
        raise click.BadParameter("give --examples too, or --steps alone.", param_hint="--epochs")
    return found


def shape(batch: int, seq: int | None, said: dict[str, Any]) -> tuple[int, ...] | dict[str, int]:
    """Return the shape of a micro-batch; sizes in pixels are taken out of ``said``."""
    pixels = {name: size for name in ("height", "width", "frames") if (size := said.pop(name)) is not None}
    if pixels:
        return {"batch": batch, **({} if seq is None else {"seq": seq}), **pixels}
    return (batch,) if seq is None else (batch, seq)


def files(model: str, options: Mapping[str, Any]) -> dict[str, Path | None]:
    """Return the files that a model and options name, by what names them."""
    from memplan.model.models import folder_of

    folder, hardware = folder_of(model), options.get("hardware", "auto")
    return {
        "MODEL": None if folder is None else folder / "config.json",
        "--hardware": Path(hardware) if os.path.isfile(hardware) else None,
    }


def prepare(model: str, options: Mapping[str, Any], *, own_process: bool) -> None:
    """Have this process be quick. ``own_process``: quantizers that are not asked for may be left out of it."""
    from memplan.analyze import graph_cache as kept
    from memplan.model import models

    kept.ours = True
    if own_process and "quantization" not in options and "qlora" not in options and models.is_plain(model):
        for package in _QUANTIZERS:
            # An import that finds None there says that there is no such package: PEFT and transformers import what they
            # find.
            sys.modules.setdefault(package, cast("ModuleType", None))
    gc.disable()  # a sixth of the time, and little is left to collect
