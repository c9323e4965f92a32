"""Commands that train: a script as it is, and the demonstration."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from memplan.cli.entry import group
from memplan.cli.options import COUNT, DISK, FILE, HARDWARE, JSON, PAGE_LOCK, RAM, VRAM
from memplan.units import parse_size


@group.command(
    short_help="Train with a script as it is, under a plan.", context_settings={"allow_interspersed_args": False}
)
@VRAM
@RAM
@DISK
@PAGE_LOCK
@HARDWARE
@click.option("--plan", "plan_file", type=FILE, help="A plan made before, in place of one made for the script.")
@click.option("--report", "report_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the report here.")
@click.option("--log", is_flag=True, help="Add what memplan measures to what transformers' Trainer logs.")
@click.option("--lines", is_flag=True, help="Say a line a step, with transformers' Trainer.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    vram: str,
    ram: str | None,
    disk: str | None,
    page_lock: str | None,
    hardware: str,
    plan_file: Path | None,
    report_file: Path | None,
    log: bool,
    lines: bool,
    command: tuple[str, ...],
) -> int:
    """Run COMMAND, such as -- python train.py, with its trainer's model under a plan.

    The script is not changed. What cannot be served runs as it would without memplan, and a line on standard error says
    why. The exit code is the script's.
    """
    for size, option in ((vram, "--vram"), (ram, "--ram"), (disk, "--disk"), (page_lock, "--page-lock")):
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
        page_lock=page_lock,
        hardware=hardware,
        plan=None if plan_file is None else str(plan_file.resolve()),
        report=None if report_file is None else str(report_file.resolve()),
        log=log,
        lines=lines,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # In place of this process: signals, exit code and terminal are the script's own.
    os.execve(program, command, environment(settings, os.environ))


@group.command(short_help="Train a small model streamed and whole, and compare.")
@click.option("--vram", metavar="SIZE", help="Memory for the step.  [default: less than the whole model needs]")
@click.option("--steps", metavar="N", type=COUNT, help="Steps to train.")
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
