"""An 8B under a plan on cards of 4, 8 and 12 GiB that a larger one emulates, beside checkpointing only.

    python -m benchmarks.gpu.cards --model bf16|nf4 [--seconds N]

Random weights, LoRA on all linear layers, AdamW, one micro-batch a step. torch's allocator is held to what such a card
would leave it (``set_per_process_memory_fraction``, less the process's context). One process for all rows.
Columns: tokens/s; reserved peak and context beside the budget; distance of the step to the plan's bound; relative error
of the step and of the peak that were predicted, from times measured block by block.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shutil
import statistics
import sys
import time
import warnings
from typing import Any

import torch

from benchmarks.gpu.visit import (
    CARDS_GIB,
    DRY,
    DRY_SHARES,
    LENGTHS,
    Rows,
    checkpoint_of,
    model_of,
    plan_name,
    setting_of,
)
from benchmarks.versus.contenders import limit_card, planned, whole
from benchmarks.versus.models import Model
from benchmarks.versus.planning import priced
from benchmarks.versus.training import Setting, Training
from memplan.case import Case

MEASURED_S = 2.0
STEPS = (3, 10)
"""The fewest and the most steps that are timed."""


def free_card() -> int:
    """Give back what a row left; return the bytes that are allocated still."""
    gc.collect()
    if DRY:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def measured(training: Training) -> dict[str, Any]:
    """Train the first steps, and then as many as fit in MEASURED_S; return the figures of a row."""
    first = training.first()
    (once_s,) = training.train(1)
    training.times_s.clear()
    count = min(STEPS[1], max(STEPS[0], int(MEASURED_S / once_s)))
    times_s = training.train(count)
    step_s = statistics.median(times_s)
    tokens = training.setting.shape[0] * training.setting.shape[1]
    return {
        **first,
        **training.figures(),
        "steps": count,
        "step_s": step_s,
        "step_s_range": [min(times_s), max(times_s)],
        "tokens_per_s": tokens / step_s,
    }


def keep_all(row: dict[str, Any], setting: Setting) -> None:
    """Fill the row of checkpointing only, all weights on this card."""
    row["context_bytes"] = 0 if DRY else limit_card(None)
    began = time.perf_counter()
    training = whole(setting, "whole")
    row["load_s"] = time.perf_counter() - began
    row |= measured(training)


def under_card(row: dict[str, Any], setting: Setting, case: Case, name: str, reference: dict[str, Any] | None) -> None:
    """Fill the row of a plan with all that a card holds."""
    assert setting.card_bytes is not None
    row["card_bytes"] = setting.card_bytes
    row["context_bytes"] = 0
    began = time.perf_counter()
    plan = case.place(vram_bytes=setting.card_bytes)
    plan.save(setting.plans / f"{name}.json")
    row["place_s"] = time.perf_counter() - began
    if not DRY:
        row["context_bytes"] = limit_card(setting.card_bytes)
    began = time.perf_counter()
    training = planned(setting, name)
    row["load_s"] = time.perf_counter() - began
    row |= measured(training)
    row |= compared(row)
    if reference is not None and "step_s" in reference:
        count = min(len(row["losses"]), len(reference["losses"]))
        row["of_whole"] = row["step_s"] / reference["step_s"]
        row["losses_equal"] = row["losses"][:count] == reference["losses"][:count]


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """Return what was predicted beside what was measured. Peaks are with the process's context, as a plan's are."""
    found: dict[str, Any] = {
        "over_bound": row["step_s"] / row["bound_s"] - 1,
        "step_error": row["predicted_s"] / row["step_s"] - 1,
        "allocated_of_card": row["device_peak_bytes"] + row["context_bytes"],
    }
    found["peak_error"] = row["predicted_peak_bytes"] / found["allocated_of_card"] - 1
    if "reserved_peak_bytes" in row:
        found["reserved_of_card"] = row["reserved_peak_bytes"] + row["context_bytes"]
        found["reserved_peak_error"] = row["predicted_peak_bytes"] / found["reserved_of_card"] - 1
        found["within_card"] = found["reserved_of_card"] <= row["card_bytes"]
    return found


def card_bytes(gib: int, case: Case) -> int:
    return int(case.whole_vram_bytes() * DRY_SHARES[gib]) if DRY else gib << 30


def quantizer_missing(model: Model) -> str | None:
    """Return why a model cannot be had here, or None."""
    if not model.nf4:
        return None
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a library of another CUDA fails in its own ways
        return f"nf4 needs bitsandbytes, which cannot be imported here: {type(error).__name__}: {error}"[:300]
    return None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", choices=("bf16", "nf4"), required=True)
    options.add_argument("--seconds", type=float, default=1e9, help="after which no row begins")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    if DRY:
        torch.set_num_threads(1)
    model = model_of(given.model)
    rows = Rows(f"cards-{given.model}", given.seconds, model=model.name)
    if (missing := quantizer_missing(model)) is not None:
        print(f"skipped: {missing}", file=sys.stderr)
        rows.about["skipped"] = missing
        return rows.end()
    _, rows.about["checkpoint_s"] = checkpoint_of(model)
    for tokens in LENGTHS:
        _rows_of(model, tokens, rows)
    shutil.rmtree(setting_of(model, 1, "cards").scratch, ignore_errors=True)
    return rows.end()


def _rows_of(model: Model, tokens: int, rows: Rows) -> None:
    """Fill the rows of a length."""
    name = f"{tokens} tokens, checkpointing only"
    setting = setting_of(model, tokens, "cards")
    with rows.turn(name) as row:
        if row is not None:
            keep_all(row, setting)
    free_card()
    reference = rows.rows.get(name)
    waiting = [gib for gib in CARDS_GIB if f"{tokens} tokens, {gib} GiB" not in rows.rows]
    if not waiting:
        return
    if not DRY:
        limit_card(None)
    began = time.perf_counter()
    case, failure = None, None
    try:
        case, prices = priced(setting)
        rows.about[f"{tokens} tokens"] = {**prices, "analyze_and_time_s": time.perf_counter() - began}
    except Exception as error:  # each of the rows says so
        failure = error.with_traceback(None)
    free_card()
    for gib in waiting:
        with rows.turn(f"{tokens} tokens, {gib} GiB") as row:
            if row is not None and case is None:
                assert failure is not None
                raise failure
            if row is not None and case is not None:
                card = dataclasses.replace(setting, card_bytes=card_bytes(gib, case))
                under_card(row, card, case, plan_name(model, tokens, gib), reference)
        left = free_card()
        if row is not None:
            row["left_allocated_bytes"] = left


if __name__ == "__main__":
    sys.exit(main())
