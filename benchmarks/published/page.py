"""Write docs/published.md and its picture from the newest results:  python -m benchmarks.published.page"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.about import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "published.md", DOCS / "figures" / "published.svg"
OUTLIER = 0.04
SIDE, EDGE = 420, 40
COLOURS = ("#1b6ca8", "#d1495b", "#2a9d4f", "#8d5fd3", "#e08e2b", "#555555", "#20a4a4", "#b5179e")

CAUSES = """\
## Why rows are off, or were

- **LoRA's dropout was counted as a CPU has it** (LitGPT's phi-2 and Phi-3 lay 18% and 16% over, and, tried beside them
  from the same table, their rows in bfloat16 7% and 6%, TinyLlama's 8%): a CPU keeps a mask in the input's dtype, a GPU
  one of a byte an element (`native_dropout`). With adapters on all linear layers that is a byte an element of every
  layer's input: by hand 1.00 GiB of phi-2 at 4 x 512 (2,560 x 3 + 10,240 elements a token and layer, 32 layers), where
  0.93 GiB were too much. Plans for a GPU have a GPU's dropout since; the rows in bfloat16 are 1.2% under.
- **4-bit rows of LitGPT lay 17 to 26% under.** They were measured before bitsandbytes' pull request 1270 (July 2024):
  `MatMul4Bit` kept its input as an attribute, which autograd does not let go of as backward goes by, and LitGPT's
  loop holds the logits of one micro-batch, and so its graph, until those of the next are there. The benchmark plans
  them with that put back (`_as_it_was`), counting both micro-batches in a forward, and with what Lightning's plugin
  quantizes from: float16, whatever the model computes in, so that each weight is there twice as it is dequantized.
  With today's bitsandbytes the same trainings need that much less.
- **They lie 1 to 10% over now, for the micro-batch before is counted as long as the longest.** Its length is not
  published: batches are padded to their own longest row, of at most 512 tokens. What was published is reached where it
  has 0.5 to 0.9 of that (Falcon-7B 0.9, Mistral and StableLM 0.8, phi-2 and Phi-3 0.6, Gemma 2 9B 0.5). Nothing was
  set by it.
- **fsdp_qlora's rows lay 16% under**: its loop holds the output while backward runs, whose logits transformers of March
  2024 had converted to float32: 1.95 GiB at 8 x 2,048 tokens. They are planned so.
- **Rows with large vocabularies lay under (Gemma 2B by 8%).** Lightning's Fabric converts what a model returns to
  torch's default dtype: logits are there once more, in float32. They are planned so.
- **GELU models lay 10 to 44% over** when transformers' models stood in for LitGPT's own: Falcon-7B 18.4 GB (with
  `sdpa`; `eager` 17.0) where 16.7 were published, Gemma 2B 14.8 where 12.6 were. These are other programs: transformers
  computes the loss of all tokens at once (3.1 GB of Gemma's), and its `gelu_new` as a formula whose steps are all
  saved; LitGPT's head and loss go 128 tokens at a time, and its GELU is one operator. Planned is LitGPT's own module
  (`pip install litgpt`).
- **FLUX.2 klein lay 4% under**: PEFT's script keeps its scorer (DINOv2-base, float32) and 14 prompts' embeddings on
  the card, 0.43 GiB by its own settings. That is counted.
- **Reserved is more than alive** by what torch's caching allocator cannot use: rounding and fragmentation. It follows
  from the traced pass, replayed on the allocator (`memplan/model/caching_allocator.py`); no constant was fitted. Where
  a few layers were traced, births and deaths are laid out for all: what the few alone come to is 0.33 GiB less for
  Llama 3.2 3B at 4 x 664.
  Batches whose lengths grow reserve far more than their longest: ten micro-batches from 420 to 560 tokens come to
  40.7 GiB in that order and to 17.0 in the other.
- **The longest batch of PEFT's language rows is not published** (padded to at most 768 tokens). It was taken from one
  row (LoRA rank 32: 648 tokens), which is not counted; the others are held to it. What errors share it hides; what
  differs between methods it does not.
"""


def page(found: dict[str, Any]) -> str:
    """Return the page's text."""
    left_out = Counter(found["left_out"].values())
    lines = [
        "# Published measurements",
        "",
        f"Other people measured {found['published_rows']} adapter trainings on real cards and published their",
        "settings (`benchmarks/published/rows.csv`, each row with its source). Those that have them are planned here",
        "as they were run, whole on the card, from the model's configuration alone; nothing ran. Written by",
        f"`python -m benchmarks.published --keep` and `python -m benchmarks.published.page`: {found['date']},",
        f"{found['commit']}, torch {found['torch']}, transformers {found['transformers']}, PEFT {found['peft']}.",
        *([found["note"]] if "note" in found else []),
        "",
        "![Predicted against published](figures/published.svg)",
        "",
        "| source | rows | memory: median | worst | time: rows | median | worst |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, of in found["verdict"].items():
        memory, time = of["memory"], of.get("time")
        timed = f"{time['rows']} | {time['median']:.0%} | {time['worst']:+.0%}" if time else "| |"
        lines.append(f"| {name} | {memory['rows']} | {memory['median']:.1%} | {memory['worst']:+.1%} | {timed} |")
    lines += ["", f"Planned: {found['planned']} of {found['published_rows']}. Left out:", ""]
    lines += [f"- {count}: {why}" for why, count in left_out.most_common()]
    lines += [f"- {row['name']}: {row['error']}" for row in found["failures"]]
    lines += ["", CAUSES, "## Rows", ""]
    lines += [
        "Memory in GiB as torch says it, without the CUDA context: reserved, but allocated for LitGPT.",
        "",
        "| source | row | published | predicted | error | s/step | predicted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        memory = f"{row['published_bytes'] / 2**30:.2f} | {row['predicted_bytes'] / 2**30:.2f}"
        timed = " | | "
        if row["published_s"]:
            timed = f"{row['published_s']:.3f} | {row['predicted_s']:.3f} | {row['time_error']:+.0%}"
        lines.append(f"| {row['source']} | {row['name']} | {memory} | {row['memory_error']:+.1%} | {timed} |")
    outliers = [row for row in found["rows"] if abs(row["memory_error"]) > OUTLIER]
    if outliers:
        lines += [
            "",
            f"More than {OUTLIER:.0%} off. What is said is how a row was planned; what is not said above has no cause "
            "that was shown:",
            "",
        ]
        lines += [
            f"- {row['source']}, {row['name']} ({row['memory_error']:+.1%}): "
            + ("; ".join(row["causes"]) or "nothing is known")
            for row in outliers
        ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> str:
    """Return the picture: predicted against published, memory and seconds a step, in logarithmic scales."""
    sources = list(dict.fromkeys(row["source"] for row in found["rows"]))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * SIDE} {SIDE + 20 * len(sources)}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{2 * SIDE}" height="{SIDE + 20 * len(sources)}" fill="white"/>',
    ]
    memory = [(row["source"], row["published_bytes"] / 2**30, row["predicted_bytes"] / 2**30) for row in found["rows"]]
    timed = [(row["source"], row["published_s"], row["predicted_s"]) for row in found["rows"] if row["published_s"]]
    parts += _chart(memory, sources, left=0, title="GiB", share=0.15)
    parts += _chart(timed, sources, left=SIDE, title="s/step", share=0.25)
    for number, source in enumerate(sources):
        y = SIDE + 20 * number
        parts.append(f'<circle cx="60" cy="{y}" r="4" fill="{COLOURS[number]}"/>')
        parts.append(f'<text x="72" y="{y + 4}">{source}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _chart(
    points: list[tuple[str, float, float]], sources: list[str], *, left: int, title: str, share: float
) -> Iterator[str]:
    low = min(min(x, y) for _, x, y in points) / 1.2
    high = max(max(x, y) for _, x, y in points) * 1.2
    room = SIDE - 2 * EDGE

    def at(value: float) -> float:
        return room * math.log(value / low) / math.log(high / low)

    def x_of(value: float) -> float:
        return round(left + EDGE + at(value), 1)

    def y_of(value: float) -> float:
        return round(SIDE - EDGE - at(value), 1)

    band = [(low, low * (1 - share)), (high, high * (1 - share)), (high, high * (1 + share)), (low, low * (1 + share))]
    inside = " ".join(f"{x_of(x)},{y_of(y)}" for x, y in band)
    yield f'<polygon points="{inside}" fill="#eeeeee"/>'
    yield f'<line x1="{x_of(low)}" y1="{y_of(low)}" x2="{x_of(high)}" y2="{y_of(high)}" stroke="#888888"/>'
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50):
        if low < tick < high:
            yield f'<text x="{x_of(tick)}" y="{SIDE - EDGE + 16}" text-anchor="middle">{tick:g}</text>'
            yield f'<text x="{left + EDGE - 6}" y="{y_of(tick) + 4}" text-anchor="end">{tick:g}</text>'
    yield (
        f'<rect x="{left + EDGE}" y="{EDGE}" width="{room}" height="{room}" fill="none" stroke="#444444"/>'
        f'<text x="{left + EDGE}" y="{EDGE - 8}">{title}: predicted (up) against published (right); '
        f"shaded: {share:.0%}</text>"
    )
    for source, x, y in points:
        colour = COLOURS[sources.index(source)]
        yield f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="3.5" fill="{colour}" fill-opacity="0.7"/>'


def main() -> None:
    newest = max(RESULTS.glob("*-published.json"))
    found = json.loads(newest.read_text())
    PAGE.write_text(page(found))
    PICTURE.write_text(draw(found))


if __name__ == "__main__":
    main()
