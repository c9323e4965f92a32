"""Commands that make plans and show them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memplan.atomic_write import STANDARD_OUTPUT
from memplan.cli.entry import DOES_NOT_FIT, OK, group
from memplan.cli.options import JSON, WithDefaults, files, given, prepare, shape, training
from memplan.cli.output import print_json, show, show_compared, show_first
from memplan.cli.paths import INPUT, OUTPUT, apart_from, require_apart

if TYPE_CHECKING:
    from memplan.program.schema import Plan
    from memplan.show.first_screen import Beside


@group.command(
    cls=WithDefaults, short_help="Say what fits, where each block goes, and the time of a step.", params=training()
)
@click.pass_obj
@click.option("--verbose", "-v", is_flag=True, help="Print all tables, every block and all notes.")
@click.option(
    "--compare", is_flag=True, help="Compare with other placements (accelerate's device map, all streamed, ...)."
)
@click.option("--out", type=OUTPUT, help="Write the plan to this file; - is standard output.")
@click.option("--csv", type=OUTPUT, help="Write one row per block to this file.")
@JSON
def plan(
    context: dict[str, bool],
    /,
    model: str,
    batch: int,
    seq: int | None,
    verbose: bool,
    compare: bool,
    out: Path | None,
    csv: Path | None,
    as_json: bool,
    **said: Any,
) -> int:
    """Say what fits, where each block goes, and the time of a step, before any weight is loaded.

    MODEL is a directory with a config.json, the name of a well-known model, or one on the hub. The adapter is a LoRA of
    rank 16 on all linear layers unless said otherwise. Exits with 0 if it fits, 1 if not, 2 if the input is wrong.
    """
    given_shape, options = shape(batch, seq, said), given(said)
    require_apart({"--out": out, "--csv": csv}, files(model, options), as_json=as_json)

    from memplan import api
    from memplan.show.tables import progress

    prepare(model, options, own_process=context["own_process"])
    with progress("Planning") as tell:
        made = api.plan(model, given_shape, **options, progress=tell)
    if out is not None:
        made.save(out)
    if csv is not None:
        from memplan.show.csv import write_csv

        write_csv(made, csv)
    with apart_from(out, csv):
        if compare:
            show_compared(made, as_json)
        elif as_json or verbose:
            show(made, None, as_json)
        else:
            show_first(made, _beside(made, out, said))
    if out not in (None, STANDARD_OUTPUT) and not as_json:
        click.echo(f"\nThe plan is in {out}.", err=csv == STANDARD_OUTPUT)
    return OK


def _beside(plan: Plan, out: Path | None, said: Mapping[str, Any]) -> Beside:
    """Return what the first screen says besides: the card, whether one was named, and what to type next."""
    from memplan.hardware.budgets import most_vram_bytes
    from memplan.hardware.machine import profile_of_plan
    from memplan.show.first_screen import Beside

    table = plan.table
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s, table.disk_bytes_per_s)
    profile = None if table.device == "cpu" else profile_of_plan(plan.hardware, rates)
    if out is not None and out != STANDARD_OUTPUT:
        budget = ["--plan", str(out)]
    else:
        names = [name for name in ("vram", "ram", "disk", "margin") if said.get(name)]
        budget = [word for name in names for word in (f"--{name}", str(said[name]))]
    return Beside(
        device_bytes=None if profile is None else most_vram_bytes(profile),
        is_this_cpu=table.device == "cpu" and said["hardware"] is None,
        next_command=" ".join(["memplan run", *map(shlex.quote, budget), "-- python train.py"]),
    )


@group.command(
    "frontier",
    cls=WithDefaults,
    short_help="Show device memory against the time of a step.",
    params=training(without=("max_step_s", "gains")),
)
@click.pass_obj
@click.option(
    "--points", metavar="N", type=click.IntRange(2, 257), default=17, show_default=True, help="Budgets to try."
)
@JSON
def frontier(
    context: dict[str, bool], /, model: str, batch: int, seq: int | None, points: int, as_json: bool, **said: Any
) -> int:
    """Show device memory against the time of a step, from the least vram that works to all weights on the device.

    Only what is faster than with less memory is shown. --vram, where it is given, is tried too.
    """
    given_shape, options = shape(batch, seq, said), given(said)

    from memplan.case import case_of
    from memplan.queries.frontier import frontier as across
    from memplan.request import Request
    from memplan.show.tables import progress

    prepare(model, options, own_process=context["own_process"])
    with progress("Placing") as tell:
        request = Request.of(model, given_shape, options)
        vram_bytes = request.sizes.vram_bytes
        case = case_of(request)
        found = across(case, points, tell, () if vram_bytes is None else (vram_bytes,))
    if as_json:
        from msgspec import to_builtins

        from memplan.program.results import Frontier

        print_json(
            to_builtins(Frontier(model=case.model, hardware=case.hardware, tokens=case.workload.tokens, points=found))
        )
    else:
        from memplan.show.query_tables import write_frontier

        write_frontier(f"{case.model}: {case.workload.size} per micro-batch, on {case.hardware}", found)
    return OK


@group.command(
    "fit",
    cls=WithDefaults,
    short_help="Find the largest batch, sequence and rank that fit.",
    params=training(without=("max_step_s", "gains")),
)
@click.option(
    "--slowdown",
    metavar="SHARE",
    type=float,
    default=0.05,
    show_default=True,
    help="Slowdown accepted for the minimum vram.",
)
@click.option("--quantizations", is_flag=True, help="Try int8, nf4 and nested nf4 too; takes longer.")
@JSON
@click.pass_obj
def fit(
    context: dict[str, bool],
    /,
    model: str,
    batch: int,
    seq: int | None,
    slowdown: float,
    quantizations: bool,
    as_json: bool,
    **said: Any,
) -> int:
    """Find the largest micro-batch, sequence and LoRA rank that fit, each alone and the rest as asked.

    And the least vram for what was asked. Exits with 0 if that fits, 1 if not.
    """
    given_shape, options = shape(batch, seq, said), given(said)
    if "pins" in options or "activations" in options:
        raise click.BadParameter("leave --pin and --activations out: memplan chooses.", param_hint="fit")
    adapter = options.pop("adapter")

    from memplan.queries.fit import fit as most
    from memplan.show.tables import progress

    prepare(model, options, own_process=context["own_process"] and not quantizations)
    with progress("Looking") as tell:
        found = most(
            model, given_shape, **adapter, slowdown=slowdown, quantizations=quantizations, progress=tell, **options
        )
    if as_json:
        from msgspec import to_builtins

        print_json({"model": model, **to_builtins(found)})
    else:
        from memplan.show.query_tables import write_fit

        vram, hardware = said["vram"] or "auto", said["hardware"] or "auto"
        write_fit(f"{model}: the most that fits in {vram} of vram, on {hardware}", found)
    return OK if found.asked is not None else DOES_NOT_FIT


@group.command(short_help="Show a plan, and what was measured under it; or two plans or runs side by side.")
@click.argument("plan", type=INPUT)
@click.argument("other", metavar="[RECORD|PLAN]", type=INPUT, required=False)
@click.option("--html", type=OUTPUT, help="Write a page to this file instead.")
@click.option("--frontier", type=INPUT, help="With --html: what memplan frontier --json printed for the same case.")
@click.option("--trace", type=OUTPUT, help="Write a micro-batch to this file, for Perfetto or Chrome.")
@JSON
def report(
    plan: Path, other: Path | None, html: Path | None, frontier: Path | None, trace: Path | None, as_json: bool
) -> int:
    """Show a PLAN file, and beside it the RECORD of a run under it: what was predicted, what was measured.

    Two plans, or the records of two runs, are compared: what changed, and what it cost. - is standard input, and
    standard output where a file is written.
    """
    if html is None and frontier is not None:
        raise click.BadParameter("give --html too: points are drawn on a page.", param_hint="--frontier")
    if html is not None and as_json:
        raise click.BadParameter("give --html or --json, not both.", param_hint="--html")
    files = {"PLAN": plan, "RECORD": other, "--frontier": frontier}
    require_apart({"--html": html, "--trace": trace}, files, as_json=as_json)

    from memplan.program.reading import load_either
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

    first = load_either(plan)
    second = None if other is None else load_either(other)
    if isinstance(first, Plan) and not isinstance(second, Plan):
        if trace is not None:
            from memplan.show.trace import write_trace

            write_trace(trace, first, second)
        if html is None:
            with apart_from(trace):
                show(first, second, as_json)
            return OK

        from memplan import api
        from memplan.program.results import Frontier

        points = () if frontier is None else Frontier.load(frontier).beside(first)
        api.report(first, second, html=html, points=points)
        if html != STANDARD_OUTPUT:
            click.echo(f"The report is in {html}.", err=trace == STANDARD_OUTPUT)
        return OK
    if trace is not None or html is not None:
        raise click.BadParameter(
            "give one plan, and the record of a run under it where there is one.",
            param_hint="--html" if trace is None else "--trace",
        )
    from memplan.show import compare

    if isinstance(first, Plan) and isinstance(second, Plan):
        compared = compare.compare_plans(first, second)
    elif isinstance(first, RunRecord) and isinstance(second, RunRecord):
        compared = compare.compare_records(first, second)
    else:
        raise click.BadParameter("give the plan first, then the record.", param_hint="PLAN")
    names = (plan.name, other.name) if other is not None and plan.name != other.name else (str(plan), str(other))
    if as_json:
        from dataclasses import asdict

        print_json(asdict(compared))
    else:
        compare.write_compared_files(compared, names)
    return OK
