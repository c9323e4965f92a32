"""Plans what README's first table shows, and writes it there:  python docs/gains.py

Each row is one model on one card, planned twice from its configuration alone: within a budget, and with gradient
checkpointing (the model's own) and all weights on a GPU of the same speed and any amount of memory. Nothing is run.
``gains.json`` keeps the figures; a test makes them anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import memplan
from memplan.hardware.profile import Figure, load

FOLDER = Path(__file__).parent
KEPT = FOLDER / "gains.json"
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- gains -->", "<!-- /gains -->"
CASES = {
    "8B, bf16": ("llama-3.1-8b", "rtx-3060-12gb", "8GiB", None),
    "14B, bf16": ("qwen3-14b", "rtx-3060-12gb", "11GiB", None),
    "32B, bf16": ("qwen3-32b", "rtx-4090", "22GiB", None),
    "70B, nf4": ("llama-3.1-70b", "rtx-4090", "23GiB", "nf4"),
}
TOKENS, RANK, RAM = 2048, 16, "96GiB"
GIB = 1 << 30
CARDS = {"rtx-3060-12gb": "RTX 3060, 12 GB", "rtx-4090": "RTX 4090, 24 GB"}


def planned(name: str) -> dict[str, Any]:
    """Return what the two plans of a case predict: bytes of the device, seconds of a step."""
    model, card, vram, quantization = CASES[name]
    options: dict[str, Any] = {
        "dtype": "bf16",
        "adapter": {"rank": RANK, "targets": "all-linear"},
        "quantization": quantization,
        "ram": RAM,
        "gains": False,
    }
    within = memplan.plan(model, (1, TOKENS), vram=vram, hardware=card, **options)
    any_size = Figure(value=float(1 << 40), kind="assumed", source="a card that holds any model", date="2026")
    large = replace(load(card), device_bytes=any_size)
    alone = memplan.plan(model, (1, TOKENS), vram=1 << 39, hardware=large, gradient_checkpointing=True, **options)
    if alone.prediction.loaded_bytes_per_pass:
        raise AssertionError(f"{name}: weights are streamed in what was to hold all of them")
    return {
        "model": model, "card": card, "budget": vram,
        "memplan_bytes": within.prediction.peaks.vram_bytes, "memplan_ram_bytes": within.prediction.peaks.ram_bytes,
        "memplan_step_s": within.prediction.step_s,
        "checkpointing_bytes": alone.prediction.peaks.vram_bytes, "checkpointing_step_s": alone.prediction.step_s,
    }  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| Model | Card | vram: checkpointing only | memplan | step: checkpointing only | memplan | RAM: memplan |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {CARDS[row['card']]} "
            f"| {row['checkpointing_bytes'] / GIB:.1f} GiB | **{row['memplan_bytes'] / GIB:.1f} GiB** "
            f"| {row['checkpointing_step_s']:.2f} s | {row['memplan_step_s']:.2f} s "
            f"| {row['memplan_ram_bytes'] / GIB:.0f} GiB |"
        )
    return "\n".join(lines)


def filled(text: str, inside: str) -> str:
    """Return README's text with the table between its marks. Raises ValueError where they are not there once."""
    pattern = re.compile(f"{BEGIN}\n.*?{END}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"README must have {BEGIN} and {END} once each")
    return pattern.sub(lambda _: f"{BEGIN}\n{inside}\n{END}", text)


def main() -> None:
    rows = {name: planned(name) for name in CASES}
    KEPT.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    README.write_text(filled(README.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
