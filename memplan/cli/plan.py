"""Commands that make plans and show them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from memplan.cli.entry import OK, group
from memplan.cli.options import COUNT, FILE, JSON, Asked, asking
from memplan.cli.output import show


@group.command(short_help="Say what fits, where each block goes, and the time of a step.")
@click.pass_obj
@asking
@click.option("--steps", metavar="N", type=COUNT, help="Of the whole run, for its time.")
@click.option("--examples", metavar="N", type=COUNT, help="Of an epoch, to count the steps from.")
@click.option("--epochs", metavar="N", type=COUNT, help="With --examples.  [default: 1]")
@click.option("--measure", is_flag=True, help="Time every kind of layer on this machine, instead of by rates.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the plan to this file.")
@JSON
def plan(
    context: dict[str, bool],
    asked: Asked,
    steps: int | None,
    examples: int | None,
    epochs: int | None,
    measure: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Say what fits, where each block goes, and the time of a step, before any weight is loaded.

    MODEL is a directory with a config.json, the name of a well-known model, or one on the hub. The adapter is a LoRA of rank 16 on all linear layers unless said
    otherwise. Exits with 0 if it fits, 1 if not, 2 if the input is wrong.
    """
    arguments = asked.arguments()
    if steps is not None and examples is not None:
        raise click.BadParameter("give --steps or --examples, not both.", param_hint="--steps")
    if epochs is not None and examples is None:
        raise click.BadParameter("give --examples too, or --steps alone.", param_hint="--epochs")
    # Before the work: a plan may take a minute to make.
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"the folder {out.parent} does not exist.", param_hint="--out")

    from memplan import api
    from memplan.show.listing import progress

    asked.prepare(context["own_process"])
    with progress("Measuring") if measure else nullcontext() as tell:
        made = api.plan(
            asked.model,
            asked.shape,
            **arguments,
            steps=steps,
            examples=examples,
            epochs=epochs,
            measure=measure,
            progress=tell,
        )
    if out is not None:
        made.save(out)
    show(made, None, as_json)
    if out is not None and not as_json:
        click.echo(f"\nThe plan is in {out}.")
    return OK


@group.command(short_help="Show a plan, and what was measured under it.")
@click.argument("plan", type=FILE)
@click.argument("record", type=FILE, required=False)
@JSON
def report(plan: Path, record: Path | None, as_json: bool) -> int:
    """Show a PLAN file, and beside it the RECORD of a run under it: what was predicted, what was measured."""
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

    show(Plan.load(plan), None if record is None else RunRecord.load(record), as_json)
    return OK
