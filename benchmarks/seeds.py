"""Memory predicted from shapes alone beside the figures that PEFT's README publishes for LoRA on one A100 of 80 GB.

    python -m benchmarks.seeds [--only TEXT] [--keep]

Nothing is loaded or trained. Each model is planned from its shapes in ``memplan/models.json``, in the setting of PEFT's
example scripts (docs/seeds.md says what they leave open): the whole model on the device, the bytes that PEFT measured
with DeepSpeed's offload as budgets, and the least vram that any plan needs beside that RAM. A table for people, in
powers of ten; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep

GB = 10**9
HARDWARE = "a100-80gb"
SOURCE = "PEFT README, 'LoRA PyTorch' and 'LoRA DeepSpeed with CPU Offloading'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """One row of PEFT's table: the setting of its script and what it measured there."""

    model: str
    """A name of ``memplan/models.json``."""
    source_tokens: tuple[int, ...]
    """Of a row; several where the script pads to the longest row of a batch, which is not published."""
    target_tokens: int
    """Of a decoder's row; 0 where there is one sequence."""
    whole_gb: float
    """Device, everything on it."""
    offload_gb: tuple[float, float]
    """Device and host with DeepSpeed's ZeRO-3 and offload."""


SEEDS = (
    Seed(model="t0-3b", source_tokens=(32, 64, 128), target_tokens=5, whole_gb=14.4, offload_gb=(9.8, 17.8)),
    Seed(model="mt0-xxl", source_tokens=(32, 64, 128), target_tokens=5, whole_gb=56, offload_gb=(22, 52)),
    Seed(model="bloomz-7b1", source_tokens=(64,), target_tokens=0, whole_gb=32, offload_gb=(18.1, 35)),
)
BATCH = 8


def model_of(name: str) -> Any:
    """Return the model on ``meta``, in float32, with PEFT's adapter, and a head apart where its checkpoint has one.

    transformers' T5 ties head and embedding from 5.0 on whatever the configuration says; what PEFT measured did not.
    """
    import torch
    from peft import LoraConfig

    from memplan.model.adapters import with_adapter
    from memplan.model.meta_model import from_configuration
    from memplan.model.models import table

    model: Any = from_configuration(name, "float32", None).model
    encodes = bool(model.config.is_encoder_decoder)
    missing = table()[name].parameters - sum(parameter.numel() for parameter in model.parameters())
    if missing == model.lm_head.weight.numel():
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    elif missing:
        raise RuntimeError(f"{name} has {missing:,} parameters that its checkpoint has and its shapes have not")
    task = "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM"
    return with_adapter(model, LoraConfig(task_type=task, r=8, lora_alpha=32, lora_dropout=0.1)).train()


def predicted(seed: Seed, source_tokens: int) -> dict[str, Any]:
    """Return what memplan says of one model and length. Bytes; the process's context apart only where it is said."""
    import torch

    import memplan
    from memplan.api import smaller
    from memplan.errors import DoesNotFitError

    ids = torch.empty(BATCH, source_tokens, dtype=torch.long, device="meta")
    labels = torch.empty(BATCH, seed.target_tokens or source_tokens, dtype=torch.long, device="meta")
    device_gb, host_gb = seed.offload_gb
    whole = memplan.plan(
        model_of(seed.model),
        {"input_ids": ids, "attention_mask": ids, "labels": labels},
        vram="80GB",
        ram=round(host_gb * GB),
        hardware=HARDWARE,
    )
    held = {item.home for item in whole.items} == {"device"} and set(whole.policies().values()) == {"keep"}
    if not held:
        raise RuntimeError(f"{seed.model} does not lie on the device as a whole: there is no figure to compare")
    parts = whole.prediction.vram_parts
    context_bytes = parts["context"]

    def at(vram_bytes: int) -> dict[str, Any]:
        """A plan's bytes: device with its context, host. Two times beside them, for the card's datasheet."""
        plan = smaller(whole, vram_bytes)
        said = plan.prediction
        return {
            "vram_bytes": said.peaks.vram_bytes,
            "ram_bytes": said.peaks.ram_bytes,
            "recomputed": sum(policy == "recompute" for policy in plan.policies().values()),
            "pass_s": said.pass_s,
            "compute_s": whole.prediction.compute_s,
        }

    try:
        least = at(1)
    except DoesNotFitError as error:
        least = {} if error.least_vram_bytes is None else at(error.least_vram_bytes)
    return {
        "model": seed.model,
        "source_tokens": source_tokens,
        "weights_bytes": parts["weights"],
        "whole_bytes": whole.prediction.peaks.vram_bytes - context_bytes,
        "context_bytes": context_bytes,
        "offload": at(round(device_gb * GB) + context_bytes),
        "least": least,
    }


def tokens_at(rows: list[dict[str, Any]], size_bytes: float) -> float | None:
    """Return the length whose whole peak is ``size_bytes``, on the line through the first and the last row."""
    first, last = rows[0], rows[-1]
    if first is last:
        return None
    slope = (last["whole_bytes"] - first["whole_bytes"]) / (last["source_tokens"] - first["source_tokens"])
    return float(first["source_tokens"] + (size_bytes - first["whole_bytes"]) / slope)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="models whose name holds this")
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    given = options.parse_args()
    table = Table("model", "tokens", "whole", "published", "at their offload's", "published", "least", box=None)
    rows = []
    for seed in (seed for seed in SEEDS if given.only in seed.model):
        found = []
        for source_tokens in seed.source_tokens:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(predicted(seed, source_tokens))
            print(f"{seed.model}, {source_tokens} tokens", file=sys.stderr, flush=True)
        lengths = {unit: tokens_at(found, seed.whole_gb * size) for unit, size in (("as_gb", GB), ("as_gib", 2**30))}
        rows.append({"seed": asdict(seed), "predicted": found, "tokens_at_published": lengths})
        for row in found:
            both = [
                f"{place['vram_bytes'] / GB:.1f} / {place['ram_bytes'] / GB:.1f}" if place else "none"
                for place in (row["offload"], row["least"])
            ]
            published = f"{seed.offload_gb[0]:g} / {seed.offload_gb[1]:g}"
            cells = (f"{row['whole_bytes'] / GB:.2f}", f"{seed.whole_gb:g}", both[0], published, both[1])
            table.add_row(seed.model, str(row["source_tokens"]), *cells)
    Console().print(table)
    result = {"benchmark": "seeds", "source": SOURCE, "batch": BATCH, "hardware": HARDWARE, "rows": rows}
    if given.keep:
        print(keep(result, "seeds"))
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
