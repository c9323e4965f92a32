"""One model, one process a contender: whole on the device, memplan at shares of its bytes, FSDP2 with CPU offload.

    python benchmarks/versus.py [--small] [--steps 6] [--tokens 1024 4096]

Same shapes, adapter, optimizer, seeds and precision for all; random weights, nothing downloaded. ``--small`` is a
model for a machine without a GPU, so that the harness itself is tested. A contender that cannot run is listed with its
error. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 2048},
}  # fmt: skip
CONTENDERS = ("whole", "memplan-50", "memplan-25", "memplan-least", "fsdp2-offload")


def build(small: bool, device: str) -> Any:
    """Return the LoRA model with random weights on ``device``, made tensor by tensor on the compute device."""
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    dtype = torch.float32 if small else torch.bfloat16
    config = LlamaConfig(**SHAPES["small" if small else "8b"], dtype=dtype, use_cache=False)
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    compute = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(compute).manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            made = torch.empty(parameter.shape, dtype=dtype, device=compute)
            made = made.fill_(1.0) if made.ndim == 1 else made.normal_(0, 0.02, generator=generator)
            module._parameters[name] = torch.nn.Parameter(made.to(device), requires_grad=False)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(compute)
    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=False).train()


def contend(name: str, small: bool, tokens: int, steps: int) -> dict[str, Any]:
    """Train a few steps as the contender ``name`` and return what was measured."""
    import torch

    compute = "cuda" if torch.cuda.is_available() else "cpu"
    batch = {"input_ids": torch.randint(0, 2048, (1, tokens), generator=torch.Generator().manual_seed(2))}
    batch["labels"] = batch["input_ids"].clone()
    batch = {key: value.to(compute) for key, value in batch.items()}
    found: dict[str, Any] = {"name": name, "tokens": tokens}
    handle = None
    if name == "whole":
        model = build(small, compute)
    elif name == "fsdp2-offload":
        from torch.distributed import HashStore, init_process_group
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        backend = "cpu:gloo,cuda:nccl" if compute == "cuda" else "gloo"
        init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        model = build(small, "cpu")
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, offload_policy=CPUOffloadPolicy())
        fully_shard(model, offload_policy=CPUOffloadPolicy())
    else:
        import memplan

        model = build(small, "cpu")
        share = name.removeprefix("memplan-")
        roomy = memplan.plan(model, batch, vram="4TiB", ram="4TiB", disk="4TiB")
        frozen = sum(block.size_bytes for block in roomy.table.blocks)
        if share == "least":
            try:
                memplan.plan(model, batch, vram=1, ram="4TiB")
            except memplan.DoesNotFitError as error:
                vram = error.least_vram_bytes or 0
        else:
            vram = roomy.prediction.peaks.vram_bytes - frozen + frozen * int(share) // 100
        plan = memplan.plan(model, batch, vram=vram, ram="4TiB")
        handle = memplan.attach(model, plan)
        found |= {
            "vram_bytes": vram,
            "predicted_step_s": plan.prediction.step_s,
            "predicted_peak_bytes": plan.prediction.peaks.vram_bytes,
            "bound_s": plan.prediction.bound_s,
            "recomputed": sum(policy.activations == "recompute" for policy in plan.activations),
        }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if compute == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(steps + 1):
        began = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # synchronises: once a step, for every contender alike
        times.append(time.perf_counter() - began)
    if compute == "cuda":
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["gpu"] = torch.cuda.get_device_name()
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found |= {
        "losses": losses,
        "step_s": statistics.median(times[1:]),
        "tokens_per_s": tokens / statistics.median(times[1:]),
    }
    if handle is not None:
        record = handle.record
        found |= {"stall_s": record.stall_s, "misses": record.misses, "loads": record.loads}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seconds", type=int, default=100, help="limit of one contender")
    parser.add_argument("--only")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(contend(options.only, options.small, options.tokens[0], options.steps)))
        return
    from rich.console import Console
    from rich.table import Table

    results = []
    for tokens in options.tokens:
        for name in CONTENDERS:
            command = [sys.executable, __file__, "--only", name, "--tokens", str(tokens), "--steps", str(options.steps)]
            command += ["--small"] if options.small else []
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=options.seconds, env=os.environ)
                lines = done.stdout.strip().splitlines()
                with contextlib.suppress(ValueError, IndexError):
                    results.append(json.loads(lines[-1]))
                    continue
                error = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            except subprocess.TimeoutExpired:
                error = [f"over {options.seconds} s"]
            results.append({"name": name, "tokens": tokens, "error": error[0][:500]})
    table = Table(title="random weights, LoRA r=16 on all linear layers, AdamW, batch 1")
    for column in ("tokens", "contender", "step s", "x whole", "peak GiB", "RSS GiB", "same losses"):
        table.add_column(column, justify="right")
    whole = {row["tokens"]: row for row in results if row["name"] == "whole" and "error" not in row}
    for row in results:
        if "error" in row:
            continue
        base = whole.get(row["tokens"])
        row["ratio"] = row["step_s"] / base["step_s"] if base else None
        row["same_losses"] = row["losses"] == base["losses"] if base else None
        table.add_row(
            str(row["tokens"]),
            row["name"],
            f"{row['step_s']:.3f}",
            f"{row['ratio']:.2f}" if base else "",
            f"{row['peak_allocated_bytes'] / 2**30:.2f}" if "peak_allocated_bytes" in row else "-",
            f"{row['peak_rss_bytes'] / 2**30:.2f}",
            str(row["same_losses"]),
        )
    console = Console()
    console.print(table)
    for row in results:
        if "error" in row:
            console.print(f"{row['name']} at {row['tokens']} tokens could not run: {row['error']}", markup=False)
    print(json.dumps({"benchmark": "versus", "small": options.small, "results": results}))


if __name__ == "__main__":
    main()
