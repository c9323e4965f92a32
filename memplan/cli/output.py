"""What commands print: reports, failures, one JSON object."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.errors import DoesNotFitError
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan
    from memplan.show.first_screen import Beside


def show(plan: Plan, record: RunRecord | None, as_json: bool) -> None:
    """Print a plan, and what was measured under it where there is a record."""
    if as_json:
        from memplan.show.summary import as_dict

        print_json(as_dict(plan, record))
    else:
        from memplan.show import terminal

        terminal.write(plan, record)


def show_first(plan: Plan, beside: Beside) -> None:
    """Print the first screen of a plan."""
    from memplan.show import first_screen

    first_screen.write(plan, beside)


def show_compared(plan: Plan, as_json: bool) -> None:
    """Print what other ways of placing cost, beside a plan."""
    from memplan.queries.compare import compare

    found = compare(plan)
    if as_json:
        from msgspec import to_builtins

        print_json({"model": plan.model, "hardware": plan.hardware, "ways": to_builtins(found)})
    else:
        from memplan.show.query_tables import write_compared

        write_compared(
            f"{plan.model}: {plan.workload.size} per micro-batch, on {plan.hardware}, in vram of "
            f"{format_bytes(plan.budgets.vram_bytes)}",
            list(found.items()),
        )


def show_failure(error: DoesNotFitError, as_json: bool) -> None:
    """Print what does not fit, what would, and what to change."""
    if as_json:
        from memplan.show.summary import failure_dict

        print_json(failure_dict(error))
    else:
        from memplan.show import terminal

        click.echo(terminal.failure_text(error), nl=False, err=True)


def fail(kind: str, message: str, as_json: bool, code: int) -> int:
    """Print an error; return ``code``."""
    if as_json:
        print_json({"error": kind, "message": message})
    else:
        from memplan.show.glyphs import RICH

        click.echo(f"memplan: {RICH.safe(message)}", err=True)
    return code


def print_json(value: dict[str, object]) -> None:
    """Print an object as JSON."""
    # ASCII only: the same bytes whatever the encoding of the output.
    click.echo(json.dumps(value, indent=2))
