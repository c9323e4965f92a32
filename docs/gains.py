"""Plans what README's first table and the tutorial's first screen show, and writes both:  python docs/gains.py

Each row is one model on one card, planned from its configuration alone within a budget, beside gradient checkpointing
with all weights on a GPU of the same speed and any amount of memory. Nothing is run.
``gains.json`` keeps the figures; a test makes all anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import memplan
from memplan.cli import main as main_of_memplan
from memplan.program.whole import checkpointing_only

FOLDER = Path(__file__).parent
KEPT = FOLDER / "gains.json"
README = FOLDER.parent / "README.md"
TUTORIAL = FOLDER / "tutorial.md"
CASES = {
    "8B, nf4": ("llama-3.1-8b", "rtx-4060", "7GiB", "nf4"),
    "8B, bf16": ("llama-3.1-8b", "rtx-3060-12gb", "8GiB", None),
    "14B, bf16": ("qwen3-14b", "rtx-3060-12gb", "11GiB", None),
    "32B, bf16": ("qwen3-32b", "rtx-4090", "22GiB", None),
    "70B, nf4": ("llama-3.1-70b", "rtx-4090", "23GiB", "nf4"),
}
TOKENS, RANK, RAM = 2048, 16, "96GiB"
GIB = 1 << 30
CARDS = {
    "rtx-4060": ("RTX 4060, 8 GB", 8 * GIB),
    "rtx-3060-12gb": ("RTX 3060, 12 GB", 12 * GIB),
    "rtx-4090": ("RTX 4090, 24 GB", 24 * GIB),
}


def planned(name: str) -> dict[str, Any]:
    """Return what is predicted of a case in both ways: bytes, seconds of a step."""
    model, card, vram, quantization = CASES[name]
    options: dict[str, Any] = {
        "dtype": "bf16",
        "adapter": {"rank": RANK, "targets": "all-linear"},
        "quantization": quantization,
        "ram": RAM,
        "gains": False,
    }
    within = memplan.plan(model, (1, TOKENS), vram=vram, hardware=card, **options)
    alone = checkpointing_only(within)
    assert alone is not None, f"{name} checkpoints by itself"
    return {
        "model": model, "card": card, "budget": vram,
        "memplan_bytes": within.prediction.peaks.vram_bytes, "memplan_ram_bytes": within.prediction.peaks.ram_bytes,
        "memplan_step_s": within.prediction.step_s,
        "checkpointing_bytes": alone.vram_bytes, "checkpointing_step_s": alone.step_s,
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| Model | GPU | VRAM, checkpointing (GiB) | VRAM, memplan | RAM, memplan | Step, checkpointing (s) "
        "| Step, memplan |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        card, size_bytes = CARDS[row["card"]]
        assert row["checkpointing_bytes"] > size_bytes, f"{name} fits {card} without memplan"
        lines.append(
            f"| {name} | {card} | {row['checkpointing_bytes'] / GIB:.1f} "
            f"| **{row['memplan_bytes'] / GIB:.1f}** | {row['memplan_ram_bytes'] / GIB:.0f} "
            f"| ({row['checkpointing_step_s']:.2f}) | {row['memplan_step_s']:.2f} |"
        )
    return "\n".join(lines)


def screen() -> str:
    """Return what the tutorial's first command prints."""
    (line,) = re.findall(r"^\$ memplan (plan .*)$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if main_of_memplan(line.split()):
            raise AssertionError(f"memplan {line} failed")
    lines = [one.rstrip() for one in printed.getvalue().strip().splitlines()]
    return "\n".join(["```text", *lines, "```"])


def filled(text: str, mark: str, inside: str) -> str:
    """Return a page's text with what is made between two marks. Raises ValueError where they are not there once."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    pattern = re.compile(f"{begin}\n.*?{end}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    return pattern.sub(lambda _: f"{begin}\n{inside}\n{end}", text)


def main() -> None:
    rows = {name: planned(name) for name in CASES}
    KEPT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), "gains", table(rows)), encoding="utf-8")
    TUTORIAL.write_text(filled(TUTORIAL.read_text(encoding="utf-8"), "screen", screen()), encoding="utf-8")


if __name__ == "__main__":
    main()
