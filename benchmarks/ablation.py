"""What each generator of the search gains and costs: each is left out in turn (``benchmarks.place --ablate``).

Kinds of cases: ``real``, the 504 of ``benchmarks.place`` in one arena; ``elastic``, some of them in an elastic one;
``disk``, some with RAM for a half to a tenth of the blocks; ``lists``, random unequal blocks (``benchmarks.unequal``),
few of them in every other one; ``whole lists``, such that may not be split; ``disk lists``, these where RAM has room
for a tenth to a half and a slower disk for the rest, on the CPU. A generator is applicable in a case where it proposes
anything; ``gain``: how much longer a pass is without it, of those cases. ``coarse_grid`` is what the others begin from,
so it is never left out; ``split``: blocks are not split. Solver times are of the process.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from msgspec.structs import replace

from benchmarks import unequal
from benchmarks.about import about, keep
from benchmarks.place import CARDS, MODELS, RAM_BYTES, SHAPES, SHARES, graph_of, least_and_whole, without_offload
from memplan.cost.build import cost_table
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.hardware import profile as profiles
from memplan.place import generators, solve
from memplan.place.evaluator import Evaluator
from memplan.program.schema import STAGING_BYTES, Budgets, Workload
from memplan.units import MIB

LISTS = 120
MATTERS = 1e-3
"""A gain from which on a generator matters in a case."""


class Case(NamedTuple):
    """One that is placed."""

    kind: str
    name: str
    table: CostTable
    budgets: Budgets
    options: dict[str, Any]


def cases(graphs: Path | None, only: str = "") -> Iterator[Case]:
    """Yield every case. ``graphs``: where analyses are kept; ``only``: models whose name and dtype hold this."""
    turn = 0
    for model, kinds in MODELS.items():
        for quantization in kinds:
            for shape in SHAPES if only in f"{model} {quantization or 'bf16'}" else ():
                graph = graph_of(model, quantization, shape, graphs)
                work = Workload(
                    batch={"input_ids": shape}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="LoRA"
                )
                for card in CARDS:
                    table = without_offload(cost_table(graph, profiles.load(card)))
                    names = {"model": model, "fingerprint": graph.fingerprint, "workload": work, "hardware": card}
                    turn += 1
                    name = f"{model} {quantization or 'bf16'} {graph.tokens} {card}"
                    yield from _of_table(name, table, names, thirds=turn % 3)
    rng = random.Random(1)
    for turn in range(0 if only else LISTS):
        table, vram_bytes = unequal.random_list(rng, *((3, 6) if turn % 2 else (8, 14)))
        within = Budgets(vram_bytes=vram_bytes, ram_bytes=RAM_BYTES, disk_bytes=0)
        whole = turn % 4 > 1
        options = unequal.NAMES | {"pieces": not whole, "elastic": False}
        yield Case("whole lists" if whole else "lists", f"list {turn}", table, within, options)
        if whole:
            held = sum(block.size_bytes for block in table.blocks)
            both = replace(within, ram_bytes=STAGING_BYTES + held * rng.randint(1, 5) // 10, disk_bytes=None)
            slower = replace(table, device="cpu", disk_bytes_per_s=table.disk_bytes_per_s * rng.uniform(0.2, 1))
            yield Case("disk lists", f"list {turn}", slower, both, options)


def _of_table(name: str, table: CostTable, names: dict[str, Any], thirds: int) -> Iterator[Case]:
    least, whole = least_and_whole(table)
    held = sum(block.size_bytes for block in table.blocks)
    for share in SHARES:
        vram = int(least + share * (whole - least))
        within = Budgets(vram_bytes=vram, ram_bytes=RAM_BYTES, disk_bytes=0)
        yield Case("real", f"{name} {share}", table, within, {"elastic": False, **names})
        if thirds == 0 and share in (0.0, 0.25):
            yield Case("elastic", f"{name} {share}", table, within, {"elastic": True, **names})
    for share, ram, device in ((0.0, 0.1, "cuda"), (0.1, 0.5, "cuda"), (0.25, 0.25, "cpu")) if thirds == 1 else ():
        vram = int(1.02 * least + share * (whole - least))
        within = Budgets(vram_bytes=vram, ram_bytes=int(ram * held) + 64 * MIB, disk_bytes=None)
        yield Case(
            "disk", f"{name} {share} {ram} {device}", replace(table, device=device), within, {"elastic": False, **names}
        )


def placed(case: Case, left_out: str | None = None) -> dict[str, Any]:
    """Return the pass in s (None where nothing fits), the solver's time, and how much each generator proposed."""
    proposed: Counter[str] = Counter()

    def counting(generator: generators.CandidateGenerator) -> generators.CandidateGenerator:
        def count(evaluator: Evaluator) -> generators.Candidates:
            inner, found = generator(evaluator), None
            while True:
                try:
                    candidate = inner.send(found)
                except StopIteration:
                    return
                proposed[generator.__name__] += 1
                found = yield candidate

        return count

    options = case.options | ({"pieces": False} if left_out == "split" else {})
    run = tuple(counting(one) for one in generators.GENERATORS if one.__name__ != left_out)
    with patch.object(generators, "GENERATORS", run):
        began = time.process_time()
        try:
            plan = solve.place(case.table, case.budgets, **options)
        except DoesNotFitError:
            plan = None
        took = time.process_time() - began
    if plan is not None and len(plan.table.blocks) > len(case.table.blocks):
        proposed["split"] += 1
    return {"pass_s": plan and plan.prediction.pass_s, "solved_s": took, "proposed": dict(proposed)}


def ablate(graphs: Path | None, only: str, state: Path, every: int, *, kept: bool) -> None:
    """Print the table. ``state``: a file of lines in which each result is kept, so that a run may go on where one
    ended; ``every``: of the cases of models every so many-th alone.
    """
    rows: dict[str, dict[str, Any]] = {}
    if state.is_file():
        rows = {row["of"]: row for row in map(json.loads, state.read_text().splitlines())}

    def known(case: Case, left_out: str | None = None) -> dict[str, Any]:
        of = f"{case.kind} {case.name} {left_out or 'all'}"
        if of not in rows:
            rows[of] = {"of": of, **placed(case, left_out)}
            with state.open("a") as file:
                file.write(json.dumps(rows[of]) + "\n")
        return rows[of]

    names = [one.__name__ for one in generators.GENERATORS if one is not generators.coarse_grid] + ["split"]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    count: Counter[str] = Counter()
    for turn, case in enumerate(cases(graphs, only)):
        if turn % every and "lists" not in case.kind:
            continue
        count[case.kind] += 1
        whole = known(case)
        for name in names:
            if whole["proposed"].get(name):
                without = known(case, name)
                found.setdefault(case.kind, {}).setdefault(name, []).append({"all": whole, "without": without})
    table = {
        kind: {name: _summary(pairs) for name, pairs in of.items()} for kind, of in sorted(found.items(), reverse=True)
    }
    result = {"benchmark": "place-ablation", "every": every, "cases": dict(count), "table": table}
    text = as_markdown(result)
    print(text)
    if kept:
        path, by = keep(result, "place-ablation"), about()
        head = f"{by['date']}, commit {by['commit']}, {by['processor']}, {by['cpus']} CPUs. "
        path.with_suffix(".md").write_text(f"{head}{text}\n")
        print(path)


def _summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    both = [pair for pair in pairs if pair["all"]["pass_s"] and pair["without"]["pass_s"]]
    gains = [pair["without"]["pass_s"] / pair["all"]["pass_s"] - 1 for pair in both]
    total: Callable[[str], float] = lambda of: sum(pair[of]["solved_s"] for pair in pairs)  # noqa: E731
    return {
        "applicable": len(pairs), "matters": sum(gain > MATTERS for gain in gains),
        "gain_median": statistics.median(gains), "gain_mean": statistics.fmean(gains), "gain_worst": max(gains),
        "gain_least": min(gains), "no_longer_fit": sum(not pair["without"]["pass_s"] for pair in pairs),
        "solved_s": total("all"), "solved_without_s": total("without"),
    }  # fmt: skip


def as_markdown(result: dict[str, Any]) -> str:
    """Return the table for people."""
    counts = ", ".join(f"{count} {kind}" for kind, count in result["cases"].items())
    lines = [
        f"Of every {result['every']} cases of models one: {counts}. A gain: how much longer a pass is without.",
        "",
        "| cases | generator | applicable | matters (> 0.1%) | gain, median | mean | most | least | no longer fit "
        "| solver, all | without |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, of in result["table"].items():
        for name, row in of.items():
            gains = " | ".join(f"{row[f'gain_{what}']:.2%}" for what in ("median", "mean", "worst", "least"))
            lines.append(
                f"| {kind} | {name} | {row['applicable']} | {row['matters']} | {gains} | {row['no_longer_fit']} "
                f"| {row['solved_s']:.1f} s | {row['solved_without_s']:.1f} s |"
            )
    return "\n".join(lines)
