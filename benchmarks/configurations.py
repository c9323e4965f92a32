"""Configurations of models of today: each is planned the first time, or refused with a sentence that says what is
missing.

    python -m benchmarks.configurations [--folder DIR] [--only TEXT] [--keep] [--resume FILE]

By transformers' own classes with their defaults, whose documentation names a repository of the hub; with ``--folder``
also by directories that hold a ``config.json``. Counted are parameters, the seconds that a first plan takes, and of
those what the processor worked. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan.errors import MemplanError

MOST_S = 15.0
"""A first plan takes no longer."""

MODELS = {
    "afmoe": "arcee-ai/Trinity-Mini", "apertus": "swiss-ai/Apertus-8B-Instruct-2509", "arcee": "arcee-ai/AFM-4.5B",
    "bitnet": "microsoft/bitnet-b1.58-2B-4T", "cwm": "facebook/cwm", "deepseek_v2": "deepseek-ai/DeepSeek-V2-Lite",
    "dots1": "rednote-hilab/dots.llm1.base", "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "ernie4_5_moe": "baidu/ERNIE-4.5-21B-A3B-PT", "exaone4": "LGAI-EXAONE/EXAONE-4.0-32B",
    "falcon_h1": "tiiuae/Falcon-H1-1.5B-Deep-Instruct", "flex_olmo": "allenai/FlexOlmo-7x7B-1T",
    "gemma3_text": "google/gemma-3-4b-it", "gemma3n_text": "google/gemma-3n-E4B", "glm4": "zai-org/GLM-4-9B-0414",
    "glm4_moe": "zai-org/GLM-4.5", "gpt_oss": "openai/gpt-oss-20b",
    "granitemoehybrid": "ibm-granite/granite-4.0-tiny", "helium": "kyutai/helium-1-2b",
    "hunyuan_v1_dense": "tencent/Hunyuan-7B-Instruct", "hunyuan_v1_moe": "tencent/Hunyuan-A13B-Instruct",
    "internlm3": "internlm/internlm3-8b-instruct", "jais2": "inceptionai/Jais-2-8B-Chat",
    "lfm2": "LiquidAI/LFM2-1.2B", "lfm2_moe": "LiquidAI/LFM2-8B-A1B", "minicpm3": "openbmb/MiniCPM3-4B",
    "minimax": "MiniMaxAI/MiniMax-Text-01-hf", "ministral": "mistralai/Ministral-8B-Instruct-2410",
    "ministral3": "mistralai/Ministral-3-8B-Base-2512", "nanochat": "karpathy/nanochat-d32",
    "olmo3": "allenai/Olmo-3-7B-Instruct", "olmo_hybrid": "allenai/Olmo-Hybrid-7B",
    "phi4_multimodal": "microsoft/Phi-4-multimodal-instruct",
    "qwen3": "Qwen/Qwen3-8B", "qwen3_5_text": "Qwen/Qwen3.5-27B", "qwen3_moe": "Qwen/Qwen3-30B-A3B",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct", "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Instruct",
    "smollm3": "HuggingFaceTB/SmolLM3-3B", "solar_open": "upstage/Solar-Open-100B",
    "vaultgemma": "google/vaultgemma-1b", "youtu": "tencent/Youtu-LLM-2B", "zamba2": "Zyphra/Zamba2-2.7B",
}  # fmt: skip
"""By the model's type, the repository that the documentation of its configuration names; released in 2025 and 2026, or
by then in transformers."""

LEFT_OUT: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {
        "layer_types": ["full_attention" if layer in (2, 6, 10, 14, 18, 21) else "conv" for layer in range(24)],
        "num_hidden_layers": 24,
    },
    "ministral": {"head_dim": 128},
}
"""What transformers cannot build a model of a type without, and its defaults leave out."""


def planned(model: Any, shape: Any) -> dict[str, Any]:
    """Return what a first plan comes to, or the sentence that refuses it."""
    import memplan

    began, worked = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {}
    try:
        plan = memplan.plan(model, shape, adapter={"rank": 16}, dtype="bfloat16", hardware="h200", ram="16TiB")
        sizes = (tensor.size_bytes for block in plan.table.blocks for tensor in block.tensors)
        found |= {"frozen_bytes": sum(sizes), "vram_bytes": plan.prediction.peaks.vram_bytes}
    except MemplanError as error:
        found["refused"] = str(error)
    except Exception as error:
        found["failed"] = f"{type(error).__name__}: {error}"[:400]
    found["first_s"] = round(time.perf_counter() - began, 1)
    found["worked_s"] = round(time.process_time() - worked, 1)
    return found


def parameters(config: Any) -> int:
    """Return the parameters of the model of a configuration."""
    import torch

    from memplan.analyze.inputs.prepare import prepare

    with torch.device("meta"):
        model = prepare(config, dtype="bfloat16").model
    return sum(parameter.numel() for parameter in model.parameters())


def cases(folder: Path | None) -> list[tuple[str, str, Any, Any]]:
    """Return name, source, configuration and shape of each case."""
    from transformers import CONFIG_MAPPING

    found: list[tuple[str, str, Any, Any]] = []
    for kind, hub in MODELS.items():
        if kind in CONFIG_MAPPING:
            config = CONFIG_MAPPING[kind](**LEFT_OUT.get(kind, {}))
            found.append((kind, f"transformers' {type(config).__name__}, defaults; {hub}", config, (1, 512)))
    for path in sorted(folder.iterdir()) if folder else ():
        held = json.loads((path / "config.json").read_text())
        shape: Any = {"batch": 1, "height": 1024, "width": 1024} if "_class_name" in held else (1, 512)
        if "3D" in held.get("_class_name", ""):
            shape = {"batch": 1, "height": 480, "width": 832, "frames": 17}
        found.append((path.name, f"{path.name}/config.json", str(path), shape))
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, help="directories with a config.json each")
    options.add_argument("--only", default="", help="those whose name holds this")
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    options.add_argument("--resume", type=Path, help="a file of cases that are known already, to which more are added")
    given = options.parse_args()
    known: dict[str, dict[str, Any]] = {}
    if given.resume and given.resume.exists():
        known = {row["name"]: row for row in map(json.loads, given.resume.read_text().splitlines())}
    rows = []
    table = Table("configuration", "parameters", "frozen GiB", "first plan", "of it work", "refused", box=None)
    for name, source, config, shape in cases(given.folder):
        if given.only not in name:
            continue
        row = known.get(name)
        if row is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = {"name": name, "source": source, **planned(config, shape)}
                try:
                    row["parameters"] = parameters(config)
                except Exception:
                    row["parameters"] = None  # the sentence says why
            if given.resume:
                with given.resume.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
        count = row["parameters"]
        table.add_row(
            name, f"{count / 1e9:.2f}B" if count else "", f"{row.get('frozen_bytes', 0) / 2**30:.1f}",
            f"{row['first_s']} s", f"{row['worked_s']} s", row.get("refused", row.get("failed", ""))[:80],
        )  # fmt: skip
    Console(width=160, soft_wrap=True).print(table)
    result = {
        "benchmark": "configurations", "cases": len(rows), "planned": sum("frozen_bytes" in row for row in rows),
        "refused": sum("refused" in row for row in rows), "failed": sum("failed" in row for row in rows),
        "slow": [row["name"] for row in rows if row["worked_s"] > MOST_S], "rows": rows,
    }  # fmt: skip
    if given.keep:
        keep(result, "configurations")
    short = {key: result[key] for key in ("benchmark", "cases", "planned", "refused", "failed", "slow")}
    print(json.dumps({**short, **{key: about()[key] for key in ("date", "commit", "torch", "transformers")}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
