"""Who else streams a frozen base, on the case and the emulated card that memplan meets first: one process each.

    python -m benchmarks.gpu.peers [--seconds N]

Checkpointing only on the whole card first, whose losses and gradients the others' are compared with; then memplan; then
the peers. Who cannot run here has a row with the reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from benchmarks.gpu.visit import CARDS_GIB, DRY, LENGTHS, Rows, checkpoint_of, folder, model_of, plan_name, setting_of
from benchmarks.versus.harness import compare, import_all
from benchmarks.versus.streamers import missing
from benchmarks.versus.worker import Worker

STEPS = 4
PEERS = (
    "trainstream", "block-streamer", "ramtorch", "fsdp2-offload", "diffusers-group", "accelerate-cpu", "deepspeed-cpu",
    "streamft",
)  # fmt: skip


def run(row: dict[str, Any], contender: str, card_bytes: int | None, left_s: float) -> dict[str, np.ndarray]:
    """Fill a contender's row; return its gradients. Each answer may take half of what is left."""
    setting = setting_of(model_of("bf16"), LENGTHS[0], contender, card_bytes)
    worker = Worker(contender, setting)
    patience_s = max(20.0, left_s / 2)
    try:
        row |= worker.ask("begin", seconds=patience_s)
        row |= worker.ask("first", seconds=patience_s)
        gradients = load_file(worker.ask("gradients", seconds=patience_s))
        times_s = worker.ask("train", STEPS, seconds=patience_s)
        row |= worker.ask("figures", seconds=patience_s)
    finally:
        worker.close()
    row["step_s"] = statistics.median(times_s)
    row["tokens_per_s"] = LENGTHS[0] / row["step_s"]
    return gradients


def plan_of(gib: int, left_s: float) -> str:
    """Return the name of memplan's plan for the case, made now where no part before has made it."""
    model = model_of("bf16")
    name = plan_name(model, LENGTHS[0], gib)
    if (folder() / "plans" / f"{name}.json").is_file():
        return name
    if DRY:
        raise RuntimeError("dry, the plan is that of the part before (cards-bf16)")
    worker = Worker("plans", setting_of(model, LENGTHS[0], "plans", gib << 30))
    try:
        found = worker.ask("plans", ("memplan-card",), None, seconds=max(20.0, left_s / 2))
    finally:
        worker.close()
    if found["plan_errors"]:
        raise RuntimeError(found["plan_errors"]["memplan-card"])
    return "memplan-card"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=1e9, help="after which no contender begins")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    gib, model = CARDS_GIB[0], model_of("bf16")
    rows = Rows("peers", given.seconds, model=model.name, tokens=LENGTHS[0], card_gib=gib)
    _, rows.about["checkpoint_s"] = checkpoint_of(model)
    if DRY:
        import_all([name for name in PEERS if missing(name) is None and name != "diffusers-group"])  # they are forked
    whole_file = folder() / "whole-gradients.npz"
    whole: dict[str, np.ndarray] = {}
    if "whole" in rows.rows and whole_file.is_file():
        whole = dict(np.load(whole_file))
    elif "whole" in rows.rows:  # what others are compared with is gone: once more
        del rows.rows["whole"]
    with rows.turn("whole") as row:
        if row is not None:
            whole = run(row, "whole", None, rows.left_s())
            np.savez(whole_file, **whole)  # type: ignore[arg-type, unused-ignore]
    for name in ("memplan", *PEERS):
        with rows.turn(name) as row:
            if row is None:
                continue
            if (why := missing(name)) is not None:
                row["error"] = why
                print(f"{name}: {why}", file=sys.stderr)
                continue
            contender = plan_of(gib, rows.left_s()) if name == "memplan" else name
            gradients = run(row, contender, None if DRY else gib << 30, rows.left_s())
            if whole:
                row |= compare(whole, gradients)
                reference = rows.rows["whole"]
                count = min(len(row["losses"]), len(reference["losses"]))
                row["losses_equal"] = row["losses"][:count] == reference["losses"][:count]
                row["of_whole"] = row["step_s"] / reference["step_s"]
    return rows.end()


if __name__ == "__main__":
    sys.exit(main())
