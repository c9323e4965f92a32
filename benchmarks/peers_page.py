"""Fill the table of docs/benchmarks.md that compares with peers, from the results that were kept.

    python -m benchmarks.peers_page

The table stands between ``<!-- versus -->`` and ``<!-- /versus -->``; a test holds it to the results. What no GPU has
measured is said to be so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.about import RESULTS
from benchmarks.versus import parts
from benchmarks.versus.table import gradients
from memplan.units import format_bytes

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- versus -->", "<!-- /versus -->"
WHAT = {
    "whole": "whole model on the device",
    "memplan-50": "memplan, 50% of the frozen bytes there",
    "memplan-25": "memplan, 25%",
    "memplan-12.5": "memplan, 12.5%",
    "memplan-least": "memplan, minimum vram",
    "memplan-card": "memplan, what the card holds",
    "spread-25": "evenly spread, equal buffers, all recomputed; budget of 25%",
    "spread-card": "the same with what the card holds",
    "fsdp2-offload": "FSDP2, CPU offload",
    "deepspeed-cpu": "DeepSpeed ZeRO-3, CPU offload",
    "deepspeed-nvme": "DeepSpeed ZeRO-3, NVMe offload",
    "accelerate-cpu": "accelerate `cpu_offload`",
    "accelerate-disk": "accelerate `disk_offload`",
    "accelerate-map": "accelerate device map, adapter added after",
    "diffusers-group": "diffusers group offload",
}


def results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the last result of each part that was kept, those of CPUs first."""
    last: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*-versus-*.json")):
        if path.stem.endswith("-failed"):
            continue
        found = json.loads(path.read_text())
        last[found["part"]] = found
    order = list(parts.ALL)
    return sorted((found for found in last.values() if found["part"] in order), key=lambda f: order.index(f["part"]))


def section(found: list[dict[str, Any]]) -> str:
    """Return what stands between the marks."""
    cpu = [result for result in found if result["device"] == "cpu"]
    cuda = [result for result in found if result["device"] == "cuda"]
    told = [_table(cpu, "device peak (whole, memplan)")] if cpu else ["Not yet measured on a CPU."]
    told += [_table(cuda, "device peak")] if cuda else ["GPU: not yet measured on a GPU."]
    return "\n\n".join(told)


def _table(found: list[dict[str, Any]], peak: str) -> str:
    """Return a table with a column for each part."""
    machines = sorted({f"{r['gpu'] or r['processor']}, torch {r['torch']}, commit {r['commit']}" for r in found})
    heads = [f"{result['part']}, {result['tokens']} tokens" for result in found]
    lines = [
        f"{'; '.join(machines)}. Step beside the whole model's (median of rounds), {peak}, gradients beside the whole "
        f"model's:",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    rows = [{row["contender"]: row for row in result["rows"]} for result in found]
    for name in WHAT:
        if any("error" not in row[name] for row in rows if name in row):  # else it ran nowhere: no result, no row
            lines.append(f"| {WHAT[name]} | " + " | ".join(_cell(row.get(name)) for row in rows) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "did not run: " + row["error"][:60].replace("|", "/")
    ratio = f"{row['of_whole']:.2f}" if row.get("of_whole") is not None else f"{row['step_s']:.3f} s"
    peak = row.get("device_peak_bytes")
    return ", ".join([ratio, *([format_bytes(peak)] if peak else []), gradients(row)])


def filled(text: str, inside: str) -> str:
    """Return the page's text with ``inside`` between the marks. Raises ValueError where they are not there once."""
    pattern = re.compile(f"{BEGIN}\n.*?{END}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page must have {BEGIN} and {END} once each")
    return pattern.sub(lambda _: f"{BEGIN}\n{inside}\n{END}", text)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), section(results())), encoding="utf-8")


if __name__ == "__main__":
    main()
