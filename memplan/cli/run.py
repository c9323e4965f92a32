"""Commands that train: a script as it is, and the demonstration."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from memplan.atomic_write import STANDARD_OUTPUT, reason
from memplan.cli.entry import group
from memplan.cli.options import COUNT, FILE, JSON, WithDefaults, given, of_script
from memplan.cli.paths import OUTPUT, require_apart
from memplan.units import parse_size


@group.command(
    cls=WithDefaults,
    short_help="Run an unmodified script within a memory budget.",
    context_settings={"allow_interspersed_args": False},
    params=of_script(),
)
@click.option("--plan", "plan_file", type=FILE, help="A plan made before, in place of one made for the script.")
@click.option("--report", "report_file", type=OUTPUT, help="Write the report here.")
@click.option(
    "--trace", "trace_file", type=OUTPUT, help="Write a micro-batch as planned and as measured here, for Perfetto."
)
@click.option("--log", is_flag=True, help="Add what memplan measures to what transformers' Trainer logs.")
@click.option("--lines", is_flag=True, help="Print one line per step, with transformers' Trainer.")
@click.option(
    "--chunked-loss",
    is_flag=True,
    help="Compute the model's loss for a few tokens at a time: less memory, other bits.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    plan_file: Path | None,
    report_file: Path | None,
    trace_file: Path | None,
    log: bool,
    lines: bool,
    chunked_loss: bool,
    command: tuple[str, ...],
    **said: Any,
) -> int:
    """Run COMMAND, such as -- python train.py, with its trainer's model under a plan.

    The script is not changed. What cannot be served runs as it would without memplan, and a line on standard error says
    why. Options here override the script's trainer settings. The exit code is the script's own, whatever it
    is: 1 may be the script's too. Where memplan cannot start it, 2.
    """
    options = _checked(given(said) | ({"loss": "chunked"} if chunked_loss else {}))
    words = {word: Path(word) for word in command if os.path.isfile(word)}
    profile = options.get("hardware", "auto")
    its = {"--plan": plan_file, "--hardware": Path(profile) if os.path.isfile(profile) else None}
    require_apart({"--report": report_file, "--trace": trace_file}, {**its, **words})
    if plan_file is not None:
        from memplan.program.schema import Plan
        from memplan.request import refuse_beside_plan

        refuse_beside_plan(options)
        if not plan_file.is_file():  # the script's process reads it again
            raise click.BadParameter(f"{plan_file} is not a file.", param_hint="--plan")
        Plan.load(plan_file)
    program = _program(command[0])
    if (flag := _keeps_out(command)) is not None:
        click.echo(
            f"memplan: inactive: {Path(command[0]).name} {flag} imports nothing at its start: leave {flag} out",
            err=True,
        )

    from memplan.trainers.launch import Settings, environment

    settings = Settings(
        options=options,
        plan=None if plan_file is None else str(plan_file.resolve()),
        report=report_file if report_file is None else _absolute(report_file),
        trace=None if trace_file is None else _absolute(trace_file),
        log=log,
        lines=lines,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    if hasattr(signal, "SIGPIPE"):  # Python ignores it, and what is started here would do so too
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        # In place of this process: signals, exit code and terminal are the script's own.
        os.execve(program, command, environment(settings, os.environ))
    except OSError as error:
        raise click.BadParameter(f"{program} cannot be started: {reason(error)}.", param_hint="COMMAND") from error


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Return options for the script's process, files by their whole paths. Raises HardwareError and InputError."""
    from memplan.request import Request

    request = Request.of(None, None, options)  # of the model and the batch the script knows
    name = options.get("hardware", "auto")
    if name != "auto":
        from memplan.hardware import profile as profiles
        from memplan.hardware.budgets import require_vram

        profile = profiles.load(name)
        if request.sizes.vram_bytes is not None:
            require_vram(profile, request.sizes.vram_bytes)
        options = {**options, "hardware": str(Path(name).resolve()) if Path(name).is_file() else profile.name}
    if "checkpoint" in options:
        options = {**options, "checkpoint": os.path.abspath(options["checkpoint"])}
    return options


def _program(name: str) -> str:
    """Return the path of what is to be started. Raises click.BadParameter where there is no such program."""
    program = shutil.which(name)
    if program is not None:
        return program
    what = f"there is no program {name!r}"
    if Path(name).is_file():
        what = f"{name!r} is not executable" if os.sep in name else f"{name!r} is a file, not a program"
        if name.endswith(".py"):
            what += f": give python {name}"
    raise click.BadParameter(f"{what}.", param_hint="COMMAND")


def _keeps_out(command: Sequence[str]) -> str | None:
    """Return the flag by which a Python ignores its environment or starts without ``site``, and so without memplan."""
    if not re.fullmatch(r"python[\d.]*(\.exe)?", Path(command[0]).name):
        return None
    words = iter(command[1:])
    for word in words:
        if not word.startswith("-") or word.startswith("--") or word == "-":
            break
        flags = re.match(r"-([a-zA-Z]*?)(?:[cmWX]|$)", word)
        if flags is not None and (found := set("EIS") & set(flags[1])):
            return f"-{min(found)}"
        if word[-1] in "WX" and flags is not None:
            next(words, None)  # its value
        elif re.fullmatch(r"-[a-zA-Z]*[cm].*", word):
            break
    return None


def _absolute(path: Path) -> str:
    # Not resolved: a link is followed when the report is written, and /dev/fd/63 leads to no path.
    return str(path if path == STANDARD_OUTPUT else path.absolute())


@group.command(short_help="Train a small model streamed and whole, and compare.")
@click.option("--vram", metavar="SIZE", help="Memory for the step.  [default: less than the whole model needs]")
@click.option("--steps", metavar="N", type=COUNT, help="Steps of each run.")
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Keep model, plan and record here.",
)
@JSON
def demo(vram: str | None, steps: int | None, keep: Path | None, as_json: bool) -> int:
    """Make a small model, plan it, train it streamed and whole, and compare the two."""
    if vram is not None:
        parse_size(vram, "--vram")

    from memplan import demo as demonstration

    return demonstration.run(vram=vram, steps=steps, folder=keep, as_json=as_json)
