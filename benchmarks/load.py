"""How much memory and time ``memplan.load`` takes, beside reading the files once.

    python -m benchmarks.load [--gib 3] [--pairs 3] [--folder DIR] [--keep]

A Llama of 3 GiB in shards. Each load is a process of its own; its peak of resident memory is counted from the imports
on. Two plans: one with 500 MB of RAM (most blocks stay in the checkpoint's files), and one with room for all of it in
RAM, so that every byte is read. The floor: the same files read once by four threads, in turn with the loads. Both read
past the page cache (O_DIRECT); it is neither filled nor asked. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep

MIB, GIB = 2**20, 2**30
SLACK = 150 * MIB
TIME_LIMIT = 1.15
HIDDEN, INTERMEDIATE, VOCABULARY = 2048, 5632, 8192
ADAPTER = {"rank": 8, "targets": "all-linear"}
PIECE = 4 * MIB


def write_checkpoint(folder: Path, size_bytes: int) -> int:
    """Write shards of a layer each; return their bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    layer_bytes = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    layers = (size_bytes - 8 * VOCABULARY * HIDDEN) // layer_bytes
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=VOCABULARY, max_position_embeddings=512, dtype="float32",
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}

    def write(shard: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {name: torch.randn(*shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, shard))

    for index in range(layers):
        p = f"model.layers.{index}."
        shapes: dict[str, tuple[int, ...]] = {p + f"self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {p + f"mlp.{n}_proj.weight": (INTERMEDIATE, HIDDEN) for n in ("gate", "up")}
        shapes[p + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {p + f"{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        write(f"model-{index:05d}.safetensors", shapes)
    rest: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN)
    )
    write("model-rest.safetensors", rest | {"model.norm.weight": (HIDDEN,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read_once(folder: Path) -> float:
    """Read all shards by four threads past the page cache; return the seconds."""
    buffers = [mmap.mmap(-1, PIECE) for _ in range(4)]
    work = [
        (path, start) for path in sorted(folder.glob("*.safetensors")) for start in range(0, path.stat().st_size, PIECE)
    ]
    files = {path: os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for path, _ in work}

    def read(turn: int) -> None:
        for path, start in work[turn::4]:
            os.preadv(files[path], [buffers[turn]], start)

    began = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    took = time.perf_counter() - began
    for file in files.values():
        os.close(file)
    return took


def make_plans(folder: Path) -> dict[str, Path]:
    import memplan

    found = {}
    for name, vram, ram in (("500 MB of RAM", "900MB", "500MB"), ("all in RAM", "900MB", "8GiB")):
        plan = memplan.plan(folder, (1, 64), vram=vram, ram=ram, adapter=ADAPTER)
        found[name] = folder / f"{ram}.plan.json"
        plan.save(found[name])
    return found


CHILD = """
import json, sys, time
from pathlib import Path
import torch, transformers, peft, accelerate
import memplan, memplan.trainers.loading.load
from transformers import LlamaForCausalLM
from memplan.program.schema import Plan
torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
plan = Plan.load(sys.argv[2])
before = peak()
began = time.perf_counter()
model = memplan.load(sys.argv[1], plan, adapter=json.loads(sys.argv[3]), progress=False)
took = time.perf_counter() - began
rise = peak() - before
memplan.handle_of(model).detach()
print(json.dumps({"load_s": took, "rise_bytes": rise}))
"""


def load_once(folder: Path, plan: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(plan), json.dumps(ADAPTER)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def judge(name: str, found: list[dict[str, float]], budget: dict[str, Any], read_s: float) -> dict[str, Any]:
    """The case's figures beside its limits."""
    load_s = statistics.median(one["load_s"] for one in found)
    rise_bytes = max(one["rise_bytes"] for one in found)
    limit_bytes = budget["arenas_bytes"] + SLACK
    holds = rise_bytes <= limit_bytes and load_s <= TIME_LIMIT * read_s
    figures = {"load_s": load_s, "ratio": load_s / read_s, "rise_bytes": rise_bytes, "limit_bytes": limit_bytes}
    return {"plan": name, **figures, "holds": holds, **budget}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gib", type=float, default=3.0)
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument("--folder", type=Path, help="where the checkpoint is written (default: the temporary folder)")
    options.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    given = options.parse_args()
    from memplan.program.schema import Plan

    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size_bytes = write_checkpoint(folder, int(given.gib * GIB))
        plans = make_plans(folder)
        reads: list[float] = []
        loads: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
        for _ in range(given.pairs):
            for name, plan in plans.items():
                reads.append(read_once(folder))
                loads[name].append(load_once(folder, plan))
        budgets = {}
        for name, path in plans.items():
            plan = Plan.load(path)
            homes = {
                tier: sum(i.size_bytes for i in plan.items if i.home == tier) for tier in ("device", "host", "disk")
            }
            arenas = sum(arena.size_bytes for arena in plan.arenas)
            budgets[name] = {
                "homes_bytes": homes,
                "arenas_bytes": arenas,
                "ram_bytes": plan.budgets.ram_bytes,
                "vram_bytes": plan.budgets.vram_bytes,
            }
    read_s = statistics.median(reads)
    result = {"benchmark": "load", "checkpoint_bytes": size_bytes, "read_once_s": read_s, "reads_s": reads}
    result |= {"cases": [judge(name, found, budgets[name], read_s) for name, found in loads.items()]}
    table = Table(title=f"{size_bytes / GIB:.2f} GiB of shards, read once in {read_s:.2f} s")
    for column in ("plan", "load", "÷ reading once", "rise of peak RSS", "limit", "holds"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for case in result["cases"]:
        figures = (f"{case['load_s']:.2f} s", f"{case['ratio']:.2f}")
        memory = (f"{case['rise_bytes'] / MIB:.0f} MiB", f"{case['limit_bytes'] / MIB:.0f} MiB")
        table.add_row(case["plan"], *figures, *memory, "yes" if case["holds"] else "no")
    Console().print(table)
    if given.keep:
        print(keep(result, "load"))
    print(json.dumps({**about(), **result}))
    return 0 if all(case["holds"] for case in result["cases"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
