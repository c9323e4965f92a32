"""One model, one process a contender: whole, under memplan, and with what else offloads weights.

    python -m benchmarks.versus --cpu [--keep]
    python -m benchmarks.versus --list
    python -m benchmarks.versus --part NAME [--part NAME ...] [--out FOLDER] [--profile]

Contenders: the whole model on the device; memplan with 50, 25 and 12.5% of the frozen bytes there and with the least
that works; the best published policy (evenly spread in equal slots, every layer recomputed) as a plan; FSDP2 and
DeepSpeed ZeRO-3 with offload; accelerate's offload and device map; diffusers' group offload. The same random weights,
batch, LoRA, AdamW and precision for all. They take turns, a few steps each, in rounds whose order moves on; figures are
medians of steps, ratios medians of rounds. A contender that cannot run is a row with its error.

On a CPU, device and host are the same memory. memplan's loads are throttled there to a link that is made up (half of
the whole model's step for all frozen bytes), one thread computes, and the peers copy nothing: so their times say what
their Python and the rest of their machinery cost, not what a link would; their memory is told as RAM alone. What is
true of both: losses and gradients.

``--out``: where each part's result lies; parts that lie there are not run again, and of one whose time was over before
all had a turn, the rest are run, beside the whole model again. ``--keep``: in ``benchmarks/results``, always run.
``--profile``: rows more than 3% over their bound are looked at with torch's profiler. Checkpoints lie in a temporary
folder (``--folder`` for another, where they stay). CUDA is unproven here: no GPU has run it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.about import RESULTS, about, keep
from benchmarks.versus import parts
from benchmarks.versus.harness import NO_TURN, Rounds, import_all
from benchmarks.versus.table import write


def kept(name: str, folder: Path) -> Path | None:
    """Return the last result of a part in a folder, or None."""
    return max(folder.glob(f"*-versus-{name}.json"), default=None)


def failed(result: dict[str, Any]) -> bool:
    """Whether a part has no row but errors: it is run again next time."""
    return all("error" in row for row in result["rows"])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cpu", action="store_true", help="all parts for the CPU")
    options.add_argument("--part", action="append", default=[], choices=list(parts.ALL), metavar="NAME")
    options.add_argument("--list", action="store_true", help="name all parts")
    options.add_argument("--only", nargs="+", help="contenders")
    options.add_argument("--rounds", type=int, help="in place of the part's own")
    options.add_argument("--seconds", type=int, help="after which no turn begins, in place of the part's own")
    options.add_argument("--out", type=Path, help="folder of results; what lies there is not run again")
    options.add_argument("--keep", action="store_true", help="keep results in benchmarks/results")
    options.add_argument("--folder", type=Path, help="where checkpoints are written and stay")
    options.add_argument("--profile", action="store_true", help="look closer at rows over their bound")
    given = options.parse_args()
    if given.list:
        for part in parts.ALL.values():
            print(f"{part.name}: {part.device}, no turn begins after {part.seconds} s")
        return 0
    chosen = [part.name for part in parts.CPU] * given.cpu + given.part
    if not chosen:
        options.error("give --cpu, --part or --list")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as a Ctrl-C: contenders end, files go
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = RESULTS if given.keep else given.out
    with tempfile.TemporaryDirectory(prefix="versus-") as temporary:
        folder = given.folder or Path(temporary)
        os.environ.setdefault("MEMPLAN_CACHE", str(Path(temporary) / "cache"))
        results = [_one(parts.ALL[name], given, out, folder, chosen[index + 1 :]) for index, name in enumerate(chosen)]
    console = Console(width=None if sys.stdout.isatty() else 180)
    for result in results:
        write(result, console)
    print(json.dumps({**about(), "benchmark": "versus", "parts": results}))
    return int(any(failed(result) for result in results))


def _one(part: parts.Part, given: Any, out: Path | None, folder: Path, to_come: list[str]) -> dict[str, Any]:
    """Return a part's result, from before where it lies in ``--out``; what had no turn then has one now."""
    wanted = tuple(name for name in part.contenders if given.only is None or name in given.only)
    before: dict[str, Any] = {"rows": []}
    if out is not None and not given.keep and (path := kept(part.name, out)) is not None:
        found: dict[str, Any] = json.loads(path.read_text())
        waiting = {row["contender"] for row in found["rows"] if row.get("error") == NO_TURN}
        if not waiting:
            return found
        here = about()
        if all(found.get(key) == value for key, value in here.items() if key != "date"):
            before = {key: value for key, value in found.items() if key not in here}
            wanted = tuple(name for name in wanted if name == "whole" or name in waiting)
    part = replace(part, contenders=wanted, rounds=given.rounds or part.rounds, seconds=given.seconds or part.seconds)
    if part.device == "cpu":
        import_all(wanted)
    result = {"benchmark": "versus", **before, **Rounds(part, folder).run(profile=given.profile)}
    rows = {row["contender"]: row for row in (*before["rows"], *result["rows"])}
    result["rows"] = list(rows.values())
    if out is not None:
        print(keep(result, f"versus-{part.name}{'-failed' * failed(result)}", out), file=sys.stderr)
    if given.folder is None and all(parts.ALL[name].model != part.model for name in to_come):
        shutil.rmtree(folder / part.model.name, ignore_errors=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
