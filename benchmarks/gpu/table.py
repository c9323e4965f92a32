"""All of a visit for people: one Markdown page of what the parts kept, written to a folder and printed.

python -m benchmarks.gpu.table OUT_FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.visit import DRY, STATE
from memplan.units import format_bytes

PARTS = ("tests", "cards-bf16", "cards-nf4", "peers", "calibrate", "truth", "timeline")


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def shown(row: dict[str, Any], key: str, form: str | Callable[[int], str]) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    return form.format(value) if isinstance(form, str) else form(int(value))


def word(row: dict[str, Any], key: str, yes: str, no: str) -> str:
    return "-" if row.get(key) is None else yes if row[key] else no


def tests(found: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if kind in found)
    ended = "" if found["finished"] else "; the time was over before all had run"
    return [f"{counts or 'no counts'}{ended}.", *(f"- {line}" for line in found["failures"])]


def cards(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return [f"Skipped: {found['skipped']}"]
    head = ("", "tokens/s", "step s", "beside checkpointing only", "reserved and context", "budget", "within",
            "over the bound", "step predicted", "peak predicted", "losses")  # fmt: skip
    rows = []
    for row in found["rows"]:
        if "error" in row:
            continue
        reserved = row.get("reserved_of_card") or row.get("reserved_peak_bytes")
        row = {**row, "reserved": reserved}
        rows.append([
            row["row"], shown(row, "tokens_per_s", "{:,.0f}"), shown(row, "step_s", "{:.3f}"),
            shown(row, "of_whole", "{:.2f}"), shown(row, "reserved", format_bytes),
            shown(row, "card_bytes", format_bytes), word(row, "within_card", "yes", "NO"),
            shown(row, "over_bound", "{:+.1%}"), shown(row, "step_error", "{:+.1%}"),
            shown(row, "peak_error", "{:+.2%}"), word(row, "losses_equal", "same bits", "differ"),
        ])  # fmt: skip
    return [*grid(head, rows), "", *not_run(found)]


def peers(found: dict[str, Any]) -> list[str]:
    head = ("", "tokens/s", "step s", "beside checkpointing only", "allocated", "reserved", "RAM peak", "gradients",
            "losses")  # fmt: skip
    rows = []
    for row in found["rows"]:
        if "error" in row:
            continue
        equal = row.get("gradients_equal")
        gradients = "missing" if row.get("gradients_missing") else "same bits" if equal else "-"
        if equal is False and gradients == "-":
            gradients = f"{row['gradient_error']:.0e}"
        rows.append([
            row["row"], shown(row, "tokens_per_s", "{:,.0f}"), shown(row, "step_s", "{:.3f}"),
            shown(row, "of_whole", "{:.2f}"), shown(row, "device_peak_bytes", format_bytes),
            shown(row, "reserved_peak_bytes", format_bytes), shown(row, "rss_peak_bytes", format_bytes), gradients,
            word(row, "losses_equal", "same bits", "differ"),
        ])  # fmt: skip
    case = f"{found['model']}, {found['tokens']} tokens, a card of {found['card_gib']} GiB."
    return [case, "", *grid(head, rows), "", *not_run(found)]


def not_run(found: dict[str, Any]) -> list[str]:
    """Return a line for each row that failed or had no turn."""
    lines = [f"- {row['row']} did not run: {row['error']}" for row in found["rows"] if "error" in row]
    return [*lines, *(f"- {name}: no time was left" for name in found["untried"])]


def calibrate(found: dict[str, Any]) -> list[str]:
    rows = []
    for key, value in found.items():
        if isinstance(value, dict) and isinstance(value.get("value"), (int, float)):
            rows.append([key, f"{value['value']:.4g}", str(value.get("source", ""))])
    return grid(("figure", "value", "source"), rows)


def truth(found: dict[str, Any]) -> list[str]:
    if not found["cases"]:
        return ["No case could be measured."]
    rows = [["peak", *(f"{found[key]:.2%}" for key in ("median", "worst", "most_under"))]]
    for key, name in (("time", "step, blocks measured"), ("time_by_rates", "step, by rates")):
        if key in found:
            rows.append([name, *(f"{found[key][figure]:.1%}" for figure in ("median", "worst", "most_under"))])
    lines = [f"{found['cases']} cases.", "", *grid(("error of", "median", "worst", "most too little"), rows), ""]
    lines += [f"- {row['case']['architecture']} failed: {row['error']}" for row in found.get("failures", [])]
    return [*lines, *(f"- {name}: no time was left" for name in found.get("untried", []))]


def timeline(found: dict[str, Any]) -> list[str]:
    rows = [
        ["step", shown(found, "unprofiled_step_s", "{:.3f} s"), "profiled: " + shown(found, "step_s", "{:.3f} s")],
        ["kernels run", shown(found, "compute_s", "{:.3f} s"), shown(found, "kernels", "{} kernels")],
        ["copies run", shown(found, "copying_s", "{:.3f} s"), shown(found, "overlap_share", "beside kernels: {:.1%}")],
        ["only copies run", shown(found, "waiting_s", "{:.3f} s"), ""],
        ["nothing runs", shown(found, "idle_s", "{:.3f} s"), shown(found, "idle_gaps", "{} gaps")],
        ["the host waits", shown(found, "host_waiting_s", "{:.3f} s"), shown(found, "host_waits", "{} times")],
    ]  # fmt: skip
    return grid(("one micro-batch", "time", ""), rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "tests": ("Tests marked gpu", tests),
    "cards-bf16": ("An 8B in bfloat16 on emulated cards", cards),
    "cards-nf4": ("An 8B in nf4 on emulated cards", cards),
    "peers": ("Peers", peers),
    "calibrate": ("The card", calibrate),
    "truth": ("Predicted beside measured, small models", truth),
    "timeline": ("One micro-batch, kernel by kernel", timeline),
}


def page(kept: dict[str, dict[str, Any]]) -> str:
    """Return the page of what was kept, by part; what is not there is said."""
    some = next(iter(kept.values()), {})
    machine = some.get("gpu") or some.get("processor", "no machine")
    lines = [f"# A visit to {machine}", ""]
    if DRY:
        lines += ["**Dry: tiny shapes on a CPU. No figure here is a measurement.**", ""]
    if some:
        versions = ", ".join(f"{name} {some[name]}" for name in ("torch", "transformers", "peft") if name in some)
        lines += [f"{some['date']}, commit {some['commit']}, {versions}, driver {some.get('driver') or '-'}.", ""]
    for part in PARTS:
        title, section = SECTIONS[part]
        lines += [f"## {title}", ""]
        one = kept.get(part)
        if one is None:
            lines.append("Not run.")
        elif one["result"] is None:
            lines += [f"Ended with exit code {one['exit_code']} and no result. Its last lines:", "", "```"]
            lines += [*one["last_lines"][-12:], "```"]
        else:
            if not one["complete"]:
                lines += [f"Cut short (exit code {one['exit_code']}).", ""]
            lines += section(one["result"])
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    kept = {part: json.loads(path.read_text()) for part in PARTS if (path := STATE / f"{part}.json").is_file()}
    text = page(kept)
    name = "gpu-visit.md"
    if kept:
        machine = next(iter(kept.values()))
        name = f"{machine['date']}-gpu-visit.md"
    (Path(sys.argv[1]) / name).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
