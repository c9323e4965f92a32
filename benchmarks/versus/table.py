"""A part's rows as a table for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from memplan.units import format_bytes

COLUMNS = (
    "step s",
    "× whole",
    "tokens/s",
    "device peak",
    "RAM peak",
    "page-locked",
    "stall",
    "over bound",
    "gradients",
    "losses",
)


def gradients(row: dict[str, Any]) -> str:
    """Return in a word how far a row's gradients are from the whole model's."""
    if row.get("gradients_missing"):
        return "missing"
    if "gradient_error" not in row:
        return "-"
    return "same bits" if row["gradients_equal"] else f"{row['gradient_error']:.0e}"


def cells(row: dict[str, Any]) -> list[str]:
    """Return what stands in a row's columns; a dash where it is not known."""

    def shown(key: str, form: str) -> str:
        return "-" if row.get(key) is None else form.format(row[key])

    def size(key: str) -> str:
        return "-" if row.get(key) is None else format_bytes(row[key])

    same = {True: "same bits", False: "differ", None: "-"}[row.get("losses_equal")]
    return [
        shown("step_s", "{:.3f}"),
        shown("of_whole", "{:.3f}"),
        shown("tokens_per_s", "{:,.0f}"),
        size("device_peak_bytes"),
        size("rss_peak_bytes"),
        size("page_locked_bytes"),
        shown("stall_share", "{:.1%}"),
        shown("over_bound", "{:.1%}"),
        gradients(row),
        same,
    ]


def write(result: dict[str, Any], console: Console) -> None:
    """Print a part's result."""
    rate = result.get("link_bytes_per_s")
    link = "" if rate is None else f", link {format_bytes(int(rate))}/s"
    before_s = result.get("whole_s_planned_with")
    drift = "" if before_s is None else f", planned with a whole step of {before_s:.3f} s"
    table = Table(title=f"{result['part']}: {result['tokens']} tokens, {result['dtype']}{link}{drift}", box=None)
    for column in ("contender", *COLUMNS):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for row in result["rows"]:
        if "error" not in row:
            table.add_row(row["contender"], *cells(row))
    console.print(table)
    for row in result["rows"]:
        if "error" in row:
            console.print(f"{row['contender']} could not run: {row['error']}", markup=False, highlight=False)
        for name, value in row.get("profile", {}).items():
            console.print(f"  {row['contender']}, {name}: {value}", markup=False, highlight=False)
