"""The command line. Exit codes: 0 fits or done, 1 does not fit, 2 bad input, 130 interrupted.

What a command needs is imported inside it, so that ``memplan report`` starts without torch.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

import memplan
from memplan.errors import DoesNotFitError, MemplanError
from memplan.units import format_bytes, parse_size

if TYPE_CHECKING:
    from types import ModuleType

    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

OK, DOES_NOT_FIT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

_QUANTIZERS = ("bitsandbytes", "torchao")
"""Slow to import: two of the ten seconds that a plan takes."""
_TIERS = ("device", "host", "disk")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_COUNT = click.IntRange(min=1)
_VRAM = click.option("--vram", metavar="SIZE", default="auto", show_default=True, help="Device memory, such as 6GiB.")
_RAM = click.option("--ram", metavar="SIZE", help="Host memory, such as 24GiB.  [default: what is available]")
_DISK = click.option(
    "--disk", metavar="SIZE", help="Disk for packed blocks.  [default: the checkpoint's own files only]"
)
_HARDWARE = click.option(
    "--hardware", metavar="NAME|FILE", default="auto", show_default=True, help="A profile, or this machine, measured."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ``arguments``: else those of the process."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    context = {"own_process": arguments is None}
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)  # else it is a script's
    collected = gc.isenabled()
    try:
        return int(group.main(args=given, prog_name="memplan", standalone_mode=False, obj=context) or OK)
    except click.Abort:
        return _fail("Interrupted", "interrupted", as_json, INTERRUPTED)
    except click.ClickException as error:
        if as_json:
            return _fail(type(error).__name__, error.format_message(), as_json, BAD_INPUT)
        error.show()
        return BAD_INPUT
    except DoesNotFitError as error:
        _show_failure(error, as_json)
        return DOES_NOT_FIT
    except MemplanError as error:
        return _fail(type(error).__name__, str(error), as_json, BAD_INPUT)
    except ModuleNotFoundError as error:
        package = (error.name or "memplan").partition(".")[0]
        if package == "memplan":
            raise
        extra = "'memplan[hf]'" if package in ("transformers", "peft") else package
        message = f"this needs the package {package}, which is not installed: pip install {extra}"
        return _fail(type(error).__name__, message, as_json, BAD_INPUT)
    finally:
        if collected:
            gc.enable()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(memplan.__version__)
def group() -> None:
    """Plan where the frozen blocks of a model live while an adapter is trained."""


@group.command(short_help="Say what fits, where each block goes, and the time of a step.")
@click.pass_obj
@click.argument("model")
@_VRAM
@_RAM
@_DISK
@click.option("--batch", metavar="N", type=_COUNT, default=1, show_default=True, help="Sequences of a micro-batch.")
@click.option("--seq", metavar="N", type=_COUNT, help="Tokens of a sequence.  [default: 512 where it reads text]")
@click.option("--accumulation", metavar="N", type=_COUNT, default=1, show_default=True, help="Micro-batches of a step.")
@click.option("--steps", metavar="N", type=_COUNT, help="Of the whole run, for its time.")
@click.option("--examples", metavar="N", type=_COUNT, help="Of an epoch, to count the steps from.")
@click.option("--epochs", metavar="N", type=_COUNT, help="With --examples.  [default: 1]")
@click.option("--lora-rank", metavar="N", type=_COUNT, default=16, show_default=True, help="Rank of the adapter.")
@click.option("--lora-targets", metavar="NAMES", default="all-linear", show_default=True, help="Such as q_proj,v_proj.")
@click.option("--dtype", metavar="NAME", default="bf16", show_default=True, help="Of the frozen weights.")
@click.option("--attention", metavar="NAME", help="Attention kernel.  [default: the model's own]")
@click.option("--quantization", metavar="NAME", help="Of the frozen weights, such as nf4, nf4-nested or int8.")
@click.option("--autocast", type=click.Choice(["bf16", "fp16"]), help="Where the forward runs under autocast.")
@click.option(
    "--optimizer",
    metavar="NAME",
    default="adamw",
    show_default=True,
    help="Its state counts: as transformers' optim, or a name of memplan's.",
)
@_HARDWARE
@click.option(
    "--activations", type=click.Choice(["keep", "recompute", "offload"]), help="Of every layer.  [default: chosen]"
)
@click.option("--pin", "pins", multiple=True, metavar="BLOCK=TIER", help="Such as layers.3=device. Repeatable.")
@click.option("--measure", is_flag=True, help="Time every kind of layer on this machine, instead of by rates.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan to this file.")
@_JSON
def plan(
    context: dict[str, bool],
    model: str,
    vram: str,
    ram: str | None,
    disk: str | None,
    batch: int,
    seq: int | None,
    accumulation: int,
    steps: int | None,
    examples: int | None,
    epochs: int | None,
    lora_rank: int,
    lora_targets: str,
    dtype: str,
    quantization: str | None,
    attention: str | None,
    autocast: str | None,
    optimizer: str,
    hardware: str,
    activations: str | None,
    pins: tuple[str, ...],
    measure: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Say what fits, where each block goes, and the time of a step, before any weight is loaded.

    MODEL is a directory with a config.json, the name of a well-known model, or one on the hub. The adapter is a LoRA of rank 16 on all linear layers unless said
    otherwise. Exits with 0 if it fits, 1 if not, 2 if the input is wrong.
    """
    vram_given = "auto" if vram == "auto" else parse_size(vram, "--vram")
    ram_given = None if ram is None else parse_size(ram, "--ram")
    disk_given = None if disk is None else parse_size(disk, "--disk")
    tiers = _parse_pins(pins)
    targets = [target for target in map(str.strip, lora_targets.split(",")) if target]
    if not targets:
        raise click.BadParameter("give module names, or all-linear.", param_hint="--lora-targets")
    if steps is not None and examples is not None:
        raise click.BadParameter("give --steps or --examples, not both.", param_hint="--steps")
    if epochs is not None and examples is None:
        raise click.BadParameter("give --examples too, or --steps alone.", param_hint="--epochs")
    # Before the work: a plan may take a minute to make.
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"the folder {out.parent} does not exist.", param_hint="--out")

    from memplan import api, models
    from memplan.analyze import kept
    from memplan.show.listing import progress

    kept.ours = True
    if context["own_process"] and quantization is None and models.is_plain(model):
        _leave_out(_QUANTIZERS)
    gc.disable()  # a sixth of the time, and little is left to collect
    with progress("Measuring") if measure else nullcontext() as tell:
        made = api.plan(
            model,
            (batch,) if seq is None else (batch, seq),
            vram=vram_given,
            ram=ram_given,
            disk=disk_given,
            adapter={"rank": lora_rank, "targets": "all-linear" if targets == ["all-linear"] else targets},
            dtype=dtype,
            attention=attention,
            quantization=quantization,
            autocast=autocast,
            accumulation=accumulation,
            steps=steps,
            examples=examples,
            epochs=epochs,
            optimizer=optimizer,
            hardware=hardware,
            pins=tiers,
            activations=activations,
            measure=measure,
            progress=tell,
        )
    if out is not None:
        made.save(out)
    _show(made, None, as_json)
    if out is not None and not as_json:
        click.echo(f"\nThe plan is in {out}.")
    return OK


@group.command(short_help="Show a plan, and what was measured under it.")
@click.argument("plan", type=_FILE)
@click.argument("record", type=_FILE, required=False)
@_JSON
def report(plan: Path, record: Path | None, as_json: bool) -> int:
    """Show a PLAN file, and beside it the RECORD of a run under it: what was predicted, what was measured."""
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

    _show(Plan.load(plan), None if record is None else RunRecord.load(record), as_json)
    return OK


@group.command(
    short_help="Train with a script as it is, under a plan.", context_settings={"allow_interspersed_args": False}
)
@_VRAM
@_RAM
@_DISK
@_HARDWARE
@click.option("--plan", "plan_file", type=_FILE, help="A plan made before, in place of one made for the script.")
@click.option("--report", "report_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    vram: str,
    ram: str | None,
    disk: str | None,
    hardware: str,
    plan_file: Path | None,
    report_file: Path | None,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND, such as -- python train.py, with its trainer's model under a plan.

    The script is not changed. What cannot be served runs as it would without memplan, and a line on standard error says
    why. The exit code is the script's.
    """
    for size, option in ((vram, "--vram"), (ram, "--ram"), (disk, "--disk")):
        if size not in (None, "auto"):
            parse_size(size, option)
    if report_file is not None and not report_file.parent.is_dir():
        raise click.BadParameter(f"the folder {report_file.parent} does not exist.", param_hint="--report")
    if plan_file is not None:
        from memplan.program.schema import Plan

        Plan.load(plan_file)
    program = shutil.which(command[0])
    if program is None:
        raise click.BadParameter(f"there is no program {command[0]!r}.", param_hint="COMMAND")
    if Path(hardware).is_file():
        hardware = str(Path(hardware).resolve())

    from memplan.trainers.launch import Settings, environment

    settings = Settings(
        vram=vram,
        ram=ram,
        disk=disk,
        hardware=hardware,
        plan=None if plan_file is None else str(plan_file.resolve()),
        report=None if report_file is None else str(report_file.resolve()),
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # In place of this process: signals, exit code and terminal are the script's own.
    os.execve(program, command, environment(settings, os.environ))


@group.command(short_help="Measure this machine's rates, for better times in plans.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the profile to this file too.")
@_JSON
def calibrate(out: Path | None, as_json: bool) -> int:
    """Measure what this machine can do, under two minutes, and keep it for the plans to come.

    Plans measure it themselves where it was not yet: do so again on a quiet machine, after a change of hardware or driver.
    """
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"the folder {out.parent} does not exist.", param_hint="--out")

    from memplan import hardware
    from memplan.show.listing import progress, write_rates

    with progress("Measuring") as tell:
        profile = hardware.measured(progress=tell)
    if out is not None:
        try:
            hardware.save(profile, out)
        except OSError as error:
            raise click.BadParameter(f"{out} cannot be written ({error.strerror}).", param_hint="--out") from error
    if as_json:
        from msgspec import to_builtins

        _print_json(to_builtins(profile))
        return OK
    click.echo(f"{profile.name}\n")
    write_rates(hardware.listed(profile))
    if out is not None:
        click.echo(f"\nThe profile is in {out}: memplan plan --hardware {out}")
    return OK


@group.command(short_help="Say what is found on this machine, and what it means.")
@_JSON
def doctor(as_json: bool) -> int:
    """Look at this machine: memory, devices, libraries, folders. Exits with 2 where something is in the way."""
    from memplan import doctor as doctors

    found = doctors.findings()
    if as_json:
        from msgspec import to_builtins

        _print_json({"findings": to_builtins(found)})
    else:
        from memplan.show.listing import write_findings

        write_findings([(one.what, one.found, one.meaning, one.is_problem) for one in found])
    return BAD_INPUT if any(one.is_problem for one in found) else OK


@group.group(short_help="Look at packed blocks, or remove them.")
def cache() -> None:
    """Blocks that were packed for the disk because no checkpoint holds them as they are."""


@cache.command("list")
@_JSON
def list_cache(as_json: bool) -> int:
    """Show what is cached, the oldest first."""
    from memplan.cache import BlockCache
    from memplan.hardware import cache_folder

    held = BlockCache(cache_folder())
    if as_json:
        from msgspec import to_builtins

        _print_json({"folder": str(held.folder), "blocks": to_builtins(held.entries())})
    else:
        from memplan.show.listing import write_cache

        write_cache(str(held.folder), [(e.about, e.size_bytes, e.created) for e in held.entries()])
    return OK


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_JSON
def clear_cache(yes: bool, as_json: bool) -> int:
    """Remove all packed blocks, and the analyses of models. Runs that use them go on."""
    from memplan.analyze import kept
    from memplan.cache import BlockCache
    from memplan.hardware import cache_folder

    held = BlockCache(cache_folder())
    if not yes:
        click.confirm(f"Remove {len(held.entries())} packed blocks from {held.folder}?", abort=True, err=True)
    freed = held.clear() + kept.clear(cache_folder() / kept.FOLDER)
    if as_json:
        _print_json({"folder": str(held.folder), "freed_bytes": freed})
    else:
        click.echo(f"{format_bytes(freed)} freed in {held.folder}.")
    return OK


@group.command(short_help="Train a small model streamed and whole, and compare.")
@click.option("--vram", metavar="SIZE", help="Memory for the step.  [default: less than the whole model needs]")
@click.option("--steps", metavar="N", type=_COUNT, help="Steps to train.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep model, plan and record here.",
)
@_JSON
def demo(vram: str | None, steps: int | None, keep: Path | None, as_json: bool) -> int:
    """Make a small model, plan it, train it streamed and whole, and compare the two."""
    if vram is not None:
        parse_size(vram, "--vram")

    from memplan import demo as demonstration

    return demonstration.run(vram=vram, steps=steps, folder=keep, as_json=as_json)


def _leave_out(packages: Sequence[str]) -> None:
    """Have packages that are not needed be as if they were not installed: PEFT and transformers import what they find."""
    for package in packages:
        # An import that finds None there says that there is no such package.
        sys.modules.setdefault(package, cast("ModuleType", None))


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


def _show(plan: Plan, record: RunRecord | None, as_json: bool) -> None:
    if as_json:
        from memplan.show.facts import as_dict

        _print_json(as_dict(plan, record))
    else:
        from memplan.show import terminal

        terminal.write(plan, record)


def _show_failure(error: DoesNotFitError, as_json: bool) -> None:
    if as_json:
        from memplan.show.facts import failure_dict

        _print_json(failure_dict(error))
    else:
        from memplan.show import terminal

        click.echo(terminal.failure_text(error), nl=False, err=True)


def _fail(kind: str, message: str, as_json: bool, code: int) -> int:
    if as_json:
        _print_json({"error": kind, "message": message})
    else:
        from memplan.show.glyphs import RICH

        click.echo(f"memplan: {RICH.safe(message)}", err=True)
    return code


def _print_json(value: dict[str, object]) -> None:
    # ASCII only: the same bytes whatever the encoding of the output.
    click.echo(json.dumps(value, indent=2))
