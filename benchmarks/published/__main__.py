"""Predicted reserved memory, seconds a step and tokens a second beside what other people published for their cards.

    python -m benchmarks.published [--only TEXT] [--keep]

Each row of ``rows.csv`` that has its settings is planned as it was run, whole on the card. Published figures are
torch's own, without the CUDA context. ``allocated`` rows are held to the predicted peak of live bytes, ``reserved``
ones to that and the lines of ``memplan.cost.reserved``. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from benchmarks.published.runs import Run, rows, runs
from memplan.errors import type_and_line

MEMORY_MEDIAN, MEMORY_WORST, TIME_MEDIAN = 0.04, 0.15, 0.25
"""Limits of the relative errors; of memory, for rows of stock libraries."""
GIB = 2**30


def predicted(run: Run) -> dict[str, Any]:
    """Return what is predicted for a run: bytes by lines, seconds of a step, trained parameters."""
    from memplan.cost.reserved import rounding_bytes
    from memplan.hardware.profile import load

    hardware = load(run.card)
    with _as_it_was(run) as kept_bytes:
        graph, table, trained = _priced(run, run.shape, hardware, run.head_tokens)
        graph_timed, timed = graph, table
        if run.timed_shape or run.head_tokens:
            graph_timed, timed, _ = _priced(run, run.timed_shape or run.shape, hardware)
    context = sum(row.size_bytes for row in table.fixed if row.kind == "context")
    weights = sum(tensor.size_bytes for block in graph.blocks for tensor in block.tensors)
    before = run.before_bytes + max(kept_bytes().values(), default=0)
    peak = max(
        size_bytes + (before if access.kind == "forward" else 0)
        for access, size_bytes in zip(table.accesses, table.device_bytes({}), strict=True)
    )
    live = weights + peak - context + run.besides_bytes
    lines = {line.what: line.size_bytes for line in table.reserved}
    lines["rounding of weights"] = rounding_bytes(
        tensor.size_bytes for block in graph.blocks for tensor in block.tensors
    )
    total = live + sum(lines.values())
    found: dict[str, Any] = {
        "trainable": trained,
        "weights_bytes": weights,
        "live_bytes": live,
        "before_bytes": before,
        "lines": lines,
        "reserved_bytes": total,
        "predicted_bytes": live if run.measure == "allocated" else total,
        "predicted_s": sum(row.time_s for row in timed.accesses),
    }
    names = ("flops", "float32_flops", "matmul_bytes", "other_bytes", "kernels")
    found["work"] = {name: sum(getattr(access, name) for access in graph_timed.accesses) for name in names}
    return found


def _priced(run: Run, shape: Any, hardware: Any, head_tokens: int = 0) -> tuple[Any, Any, int]:
    """``head_tokens``: for how many tokens at a time there are logits; 0 for all at once."""
    from memplan.analyze.inputs.prepare import prepare
    from memplan.analyze.trace.trace import analyze
    from memplan.cost.build import cost_table
    from memplan.model.adapters import with_adapter

    if callable(run.model):
        model, short = run.model(), False
        ids = torch.zeros(shape, dtype=torch.long, device="meta")
        batch: Any = {"input_ids": ids, "labels": ids}
    elif isinstance(shape, dict):  # of diffusers, whose checkpointing memplan does not turn on by name
        model, short, batch = prepare(run.model, dtype="bfloat16").model, False, shape
        if run.checkpointing:
            model.enable_gradient_checkpointing()
        model = with_adapter(model, run.adapter() if run.adapter else None)
    else:
        prepared = prepare(
            run.model,
            adapter=None if run.adapter is None else run.adapter(),
            dtype="bfloat16",
            quantization=run.quantization or None,
            kbit=run.kbit,
            gradient_checkpointing=run.checkpointing or None,
        )
        model, short, batch = prepared.model, prepared.short, shape
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if run.adapter_dtype:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, run.adapter_dtype))
    loss = None
    if head_tokens:
        ids = torch.zeros(shape, dtype=torch.long, device="meta")
        batch = {"input_ids": ids, "logits_to_keep": torch.arange(head_tokens)}
        loss = _loss_of_some
    elif run.shifts_logits:
        batch, loss = {"input_ids": torch.zeros(shape, dtype=torch.long, device="meta")}, _loss_of_shifted
    graph = analyze(model, batch, short=short, optimizer=run.optimizer, loss=loss, device=hardware.device)
    return graph, cost_table(graph, hardware), trained


def _loss_of_shifted(output: Any) -> torch.Tensor:
    """Copy the logits in float32 to leave the last out, as transformers did until December 2024, and hold the output,
    with the logits in float32, while backward runs, as fsdp_qlora's loop does (``train.py``: ``output = None`` after).
    """
    output.logits = output.logits.float()
    shifted = output.logits[..., :-1, :].contiguous().flatten(0, 1)
    loss: Any = torch.nn.functional.cross_entropy(shifted, shifted.new_zeros(len(shifted), dtype=torch.long))
    loss.output = output
    return loss  # type: ignore[no-any-return]


def _loss_of_some(output: Any) -> torch.Tensor:
    logits = output.logits[:1].flatten(0, 1).float()  # tokens of the whole batch go through the head in turns
    return torch.nn.functional.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@contextlib.contextmanager
def _as_it_was(run: Run) -> Iterator[Callable[[], dict[int, int]]]:
    """Have bitsandbytes multiply as it did when a run was made, and keep what it kept: the input of each 4-bit product,
    as an attribute.

    A weight is dequantized whole to the dtype that it was quantized from, and converted. Autograd does not let go of an
    attribute as backward goes by, and LitGPT's loop holds the logits of one micro-batch, and so its graph, until those
    of the next are there: inputs of two are alive in each forward. Yields what gives the bytes of the former, by trace.
    """
    kept: dict[int, dict[int, int]] = {}
    if not run.keeps_inputs:
        yield dict
        return
    from bitsandbytes.autograd._functions import MatMul4Bit
    from bitsandbytes.functional import dequantize_4bit

    modes = []

    def forward(ctx: Any, given: Any, packed: Any, out: Any = None, bias: Any = None, quant_state: Any = None) -> Any:
        packed = packed.view(-1, 1)
        weight = dequantize_4bit(packed, quant_state).to(given.dtype)
        ctx.is_empty, ctx.state, ctx.tensors = False, quant_state, (None, packed)
        ctx.dtype_A, ctx.dtype_B, ctx.dtype_bias = given.dtype, packed.dtype, None if bias is None else bias.dtype
        if any(ctx.needs_input_grad[:2]):
            ctx.tensors = (given, packed)
            mode = getattr(given, "fake_mode", None)
            modes.append(mode)  # lest its id is another's later
            storage = given.untyped_storage()
            kept.setdefault(id(mode), {})[storage._cdata] = storage.nbytes()
        return torch.nn.functional.linear(given, weight, bias)

    with patch.object(MatMul4Bit, "forward", staticmethod(forward)):
        yield lambda: {mode: sum(sizes.values()) for mode, sizes in kept.items()}


def row_of(run: Run) -> dict[str, Any]:
    """Return a run's published figures beside the predicted ones."""
    began = time.perf_counter()
    found: dict[str, Any] = {
        "row": run.row, "source": run.source, "name": run.name, "measure": run.measure, "stock": run.stock,
        "card": run.card, "published_bytes": run.published_bytes, "published_s": run.published_s or None,
        "causes": list(run.causes),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found |= predicted(run)
    if run.trainable and found["trainable"] != run.trainable:
        found["causes"].append(f"{found['trainable']:,} parameters are trained here, {run.trainable:,} were published")
    found["memory_error"] = found["predicted_bytes"] / run.published_bytes - 1
    found["time_error"] = found["predicted_s"] / run.published_s - 1 if run.published_s else None
    if run.tokens and run.published_s:
        found["published_tokens_per_s"] = run.tokens / run.published_s
        found["predicted_tokens_per_s"] = run.tokens / found["predicted_s"]
    found["planned_s"] = round(time.perf_counter() - began, 1)
    return found


def verdict(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return number, median and worst of the errors by source, and of all rows of stock libraries together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["source"], []).append(row)
    groups["stock libraries"] = [row for row in found if row["stock"]]
    groups["all"] = found
    said: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        said[name] = {}
        for what in ("memory", "time"):
            errors = [row[f"{what}_error"] for row in members if row[f"{what}_error"] is not None]
            if errors:
                said[name][what] = {
                    "rows": len(errors),
                    "median": statistics.median(abs(error) for error in errors),
                    "worst": max(errors, key=abs),
                }
    return said


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="rows whose source and name hold this")
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    options.add_argument("--resume", type=Path, help="a file of rows that are known already, to which more are added")
    given = options.parse_args()
    planned, left_out = runs()
    known: dict[int, dict[str, Any]] = {}
    if given.resume and given.resume.exists():
        known = {row["row"]: row for row in map(json.loads, given.resume.read_text().splitlines())}
    found, failures = [], []
    for run in planned:
        if given.only not in f"{run.source} {run.name}":
            continue
        try:
            row = known.get(run.row) or row_of(run)
        except Exception as error:
            failures.append({"row": run.row, "name": f"{run.source}: {run.name}", "error": type_and_line(error)})
            print(f"{run.source} {run.name}: {type_and_line(error)}", file=sys.stderr, flush=True)
            continue
        if given.resume and run.row not in known:
            with given.resume.open("a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{row['source']} {row['name']}: {row['memory_error']:+.1%}", file=sys.stderr, flush=True)
        found.append(row)
    said = verdict(found)
    _show(found, said)
    result = {
        "benchmark": "published", "published_rows": len(rows()), "planned": len(found), "verdict": said, "rows": found,
        "failures": failures, "left_out": {str(number): why for number, why in left_out.items()},
    }  # fmt: skip
    if given.keep:
        keep(result, "published")
    short = {key: result[key] for key in ("benchmark", "published_rows", "planned", "verdict")}
    print(json.dumps({**short, **{key: about()[key] for key in ("date", "commit", "torch", "transformers", "peft")}}))
    return 0


def _show(found: list[dict[str, Any]], said: dict[str, dict[str, Any]]) -> None:
    console = Console(width=130, soft_wrap=True)
    table = Table("row", "GiB", "predicted", "error", "s/step", "predicted", "error", "tokens/s", "predicted", box=None)
    for row in found:
        time_s = row["published_s"]
        tokens = row.get("published_tokens_per_s")
        table.add_row(
            f"{row['source']}: {row['name']}",
            f"{row['published_bytes'] / GIB:.2f}", f"{row['predicted_bytes'] / GIB:.2f}", f"{row['memory_error']:+.1%}",
            f"{time_s:.3f}" if time_s else "", f"{row['predicted_s']:.3f}" if time_s else "",
            f"{row['time_error']:+.0%}" if time_s else "", f"{tokens:,.0f}" if tokens else "",
            f"{row['predicted_tokens_per_s']:,.0f}" if tokens else "",
        )  # fmt: skip
    console.print(table)
    for name, of in said.items():
        texts = [
            f"{what}: {at['rows']} rows, {at['median']:.1%} in the median, {at['worst']:+.1%} at worst"
            for what, at in of.items()
        ]
        console.print(f"{name}: {'; '.join(texts)}")


if __name__ == "__main__":
    sys.exit(main())
