"""Predicted peaks of memory and times of a step against measured ones: real training of small models, whole, on this
machine.

    python -m benchmarks.truth [--only TEXT] [--few] [--times] [--seconds N] [--keep]

Six architectures by batch, sequence, checkpointing, dtype, adapter, attention and quantization. Each model is predicted
from its configuration alone, then made with random weights and trained for two AdamW steps; measured is the greatest
number of bytes in live storages in the second. On CUDA the allocator's own figures stand beside it. ``--times``: the
time of a step too, as ``memplan plan --measure`` predicts it and as the machine's measured rates do, in turns with the
steps themselves; only on a quiet machine. ``--few``: two cases of each architecture. A table for people; the last line
is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan.errors import type_and_line
from memplan.hardware.calibrate import current
from memplan.hardware.profile import HardwareProfile

WIDTH, INNER, LAYERS, HEADS = 128, 352, 4, 4
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt2", "t5", "mixtral")
TARGETS: dict[str, dict[str, list[str]]] = {
    "all": {
        "gpt2": ["c_attn", "c_proj", "c_fc"],
        "t5": ["q", "k", "v", "o", "wi", "wo"],
        "mixtral": ["q_proj", "v_proj"],
    },
    "attention": {"gpt2": ["c_attn"], "t5": ["q", "v"]},
}
MEDIAN, WORST, UNDER = 0.01, 0.03, 0.01
"""Limits of the relative error: in the median, at worst, and of what is predicted less than measured."""
TIME_MEDIAN, TIME_WORST = 0.10, 0.25
"""The same of the time of a step."""
TURNS, TURN_S = 3, 0.7
"""How often steps and predictions take turns, and how long the steps of a turn take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training."""

    architecture: str
    batch: int = 2
    sequence: int = 64
    vocabulary: int = 512
    checkpointing: bool = False
    dtype: str = "float32"
    adapter: str = "lora"
    """``lora`` on all linear layers, ``attention`` only, ``dora``, ``dropout``."""
    attention: str = "sdpa"
    quantization: str = ""
    layers: int = LAYERS

    @property
    def name(self) -> str:
        parts = {key: value for key, value in asdict(self).items() if key != "architecture" and value != DEFAULTS[key]}
        return " ".join([self.architecture, *(f"{key}={value}" for key, value in parts.items())])


BASE = Case(architecture="")
DEFAULTS = asdict(BASE)


def cases() -> list[Case]:
    """Return the grid: each architecture at a base point, each factor moved from there, and some moved together."""
    found = []
    for architecture in ARCHITECTURES:
        # transformers' Gemma 2 has no attention but its own.
        base = Case(architecture=architecture, attention="eager" if architecture == "gemma2" else "sdpa")
        moved: list[dict[str, Any]] = [
            {},
            {"batch": 4, "sequence": 32},
            {"sequence": 192, "batch": 1},
            {"vocabulary": 8192},
            {"checkpointing": True},
            {"checkpointing": True, "sequence": 192, "vocabulary": 8192},
            {"dtype": "bfloat16"},
            {"dtype": "bfloat16", "checkpointing": True},
            {"adapter": "attention"},
            {"adapter": "dropout"},
            {"attention": "eager", "sequence": 128},
        ]
        if architecture == "llama":
            moved.append({"layers": 12})  # of which a few are measured for all
        if architecture != "mixtral":
            moved.append({"adapter": "dora"})
        if architecture in ("llama", "qwen3", "t5"):
            moved += [{"quantization": "nf4"}, {"quantization": "int8", "checkpointing": True}]
        if architecture in ("t5", "gemma2"):
            moved = [point for point in moved if point.get("attention") != "eager"]
        found += [replace(base, **point) for point in moved]
    return found


def few(all_cases: list[Case]) -> list[Case]:
    """Return of each architecture the base point and the one in bfloat16 with checkpointing, base points first."""
    base = [
        case for case in all_cases if case == replace(BASE, architecture=case.architecture, attention=case.attention)
    ]
    recomputed = [replace(case, dtype="bfloat16", checkpointing=True) for case in base]
    return [*base, *recomputed]


def configuration(case: Case) -> Any:
    """Return transformers' configuration of a case."""
    import transformers

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": case.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "vocab_size": case.vocabulary,
        "max_position_embeddings": 512,
        "use_cache": False,
        **tokens,
    }
    if case.architecture == "gpt2":
        return transformers.GPT2Config(
            n_embd=WIDTH,
            n_layer=case.layers,
            n_head=HEADS,
            vocab_size=case.vocabulary,
            n_positions=512,
            use_cache=False,
            **tokens,
        )
    if case.architecture == "t5":
        return transformers.T5Config(
            d_model=WIDTH, d_kv=32, d_ff=INNER, num_layers=case.layers, num_decoder_layers=case.layers, num_heads=HEADS,
            vocab_size=case.vocabulary, decoder_start_token_id=0, use_cache=False, dropout_rate=0.1,
        )  # fmt: skip
    if case.architecture == "mixtral":
        return transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
    if case.architecture == "gemma2":
        return transformers.Gemma2Config(**common, head_dim=32)
    kind = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[case.architecture]
    return kind(**common, **({"head_dim": 32} if case.architecture == "qwen3" else {}))


def adapter(case: Case) -> Any:
    """Return PEFT's configuration of a case."""
    from peft import LoraConfig

    where = "attention" if case.adapter == "attention" else "all"
    targets = TARGETS[where].get(case.architecture, "all-linear" if where == "all" else ["q_proj", "v_proj"])
    return LoraConfig(
        r=8,
        target_modules=targets,
        use_dora=case.adapter == "dora",
        lora_dropout=0.1 if case.adapter == "dropout" else 0.0,
        fan_in_fan_out=case.architecture == "gpt2",
    )


def predicted_bytes(case: Case) -> int:
    """Return the peak that is predicted for the whole model on the device, the process's context apart."""
    from memplan.analyze.inputs.prepare import prepare
    from memplan.analyze.trace.trace import analyze
    from memplan.cost.build import cost_table
    from memplan.hardware.profile import load

    model = prepare(
        configuration(case),
        adapter=adapter(case),
        dtype=case.dtype,
        attention=case.attention,
        quantization=case.quantization or None,
    ).model
    checkpointed(case, model)
    graph = analyze(model, (case.batch, case.sequence))
    table = cost_table(graph, load("t4"))  # of its figures the context alone matters, which is taken off
    weights = sum(tensor.size_bytes for block in graph.blocks for tensor in block.tensors)
    context = sum(row.size_bytes for row in table.fixed if row.kind == "context")
    return weights + max(table.device_bytes_at(index, {}) for index in range(len(table.accesses))) - context


def made(case: Case) -> Any:
    """Return the model of a case with its adapter, on the device, with random weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig

    config = configuration(case)
    automatic = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    base = automatic.from_config(config, dtype=getattr(torch, case.dtype), attn_implementation=case.attention)
    if case.quantization:
        import tempfile

        how = {
            "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }
        with tempfile.TemporaryDirectory() as folder:
            base.save_pretrained(folder)
            base = automatic.from_pretrained(
                folder, quantization_config=how[case.quantization], dtype=torch.float32, device_map=str(device())
            )
    model: Any = get_peft_model(base, adapter(case)).train()
    checkpointed(case, model)
    return model.to(device()) if not case.quantization else model


def checkpointed(case: Case, model: Any) -> None:
    """Turn on the model's own checkpointing where the case has it."""
    if case.checkpointing:
        base = model.get_base_model()
        turn_on = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        turn_on({"use_reentrant": False})
        model.enable_input_require_grads()


def measured_bytes(case: Case) -> dict[str, int]:
    """Train for two steps; return the peak of the second by live storages, on CUDA also the allocator's."""
    from memplan.model.live_storages import StorageLedger

    model = made(case)
    step, optimizer, batch = training(case, model)
    step()
    gc.collect()
    found = {}
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    with StorageLedger.of_training(model, optimizer, *batch.values()) as ledger:
        step()
    ledger.finish()
    return {"live_bytes": ledger.peak_bytes, **found}


def training(case: Case, model: Any) -> tuple[Callable[[], None], torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """Return a training step of a case, and what it uses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(1, case.vocabulary, (case.batch, case.sequence), device=device())
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer, batch


def times(case: Case, profile: HardwareProfile) -> dict[str, float]:
    """Return the seconds of a step: as they are, as they are predicted by measuring blocks, and by rates alone.

    The first two are taken in turns; ``measured_s`` is the median step, ``predicted_s`` that times the median of the
    turns' ratios, so that a machine that grows slower meanwhile tells on both.
    """
    from memplan.analyze.blocks import measure as measuring
    from memplan.analyze.inputs.prepare import prepare
    from memplan.analyze.trace.trace import analyze
    from memplan.cost.build import cost_table

    model = made(case)
    step, _, _ = training(case, model)
    if case.quantization:
        planned, short = model, False
    else:
        prepared = prepare(
            configuration(case), adapter=adapter(case), dtype=case.dtype, attention=case.attention, buffers=True
        )
        planned, short = prepared.model, prepared.short
        checkpointed(case, planned)
    shape = (case.batch, case.sequence)
    graph = analyze(planned, shape, short=short)

    def clocked() -> float:
        start = time.perf_counter()
        step()
        if device().type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def predicted() -> float:
        found = measuring.measure(
            planned, shape, graph, device=device().type, room_bytes=int(profile.device_bytes.value) // 2, short=short
        )
        return sum(row.time_s for row in cost_table(graph, profile, found).accesses)

    measuring.ENOUGH_S = TURN_S / 2
    once = min(clocked() for _ in range(3))
    steps, ratios = [], []
    for _ in range(TURNS):
        turn = [clocked() for _ in range(max(5, int(TURN_S / once)))]
        steps += turn
        ratios.append(predicted() / statistics.median(turn))
    measured_s = statistics.median(steps)
    by_rates_s = sum(row.time_s for row in cost_table(graph, profile).accesses)
    return {
        "measured_s": measured_s,
        "predicted_s": statistics.median(ratios) * measured_s,
        "predicted_by_rates_s": by_rates_s,
    }


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def error_of(row: dict[str, Any]) -> float:
    """Return the relative error of a row's prediction; positive where more was predicted."""
    return float(row["predicted_bytes"]) / float(row["measured"]["live_bytes"]) - 1


def time_error_of(row: dict[str, Any], which: str = "predicted_s") -> float:
    """Return the relative error of a row's predicted time; positive where more was predicted."""
    return float(row["times"][which]) / float(row["times"]["measured_s"]) - 1


def verdict(errors: list[float]) -> dict[str, float]:
    """Return the figures that the limits are for."""
    return {
        "median": statistics.median(abs(error) for error in errors),
        "worst": max(abs(error) for error in errors),
        "most_under": max(0.0, -min(errors)),
    }


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="cases whose name holds this")
    options.add_argument("--times", action="store_true", help="the time of a step too, on a quiet machine")
    options.add_argument("--few", action="store_true", help="two cases of each architecture")
    options.add_argument("--seconds", type=float, default=float("inf"), help="no case begins that might end later")
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    given = options.parse_args()
    table = Table("case", "predicted", "measured", "error", "step", "predicted", "by rates", box=None)
    began, longest_s = time.monotonic(), 0.0
    profile = current.measured_now() if given.times else None
    rows, failures, untried = [], [], []
    for case in few(cases()) if given.few else cases():
        if given.only not in case.name:
            continue
        case_began = time.monotonic()
        if case_began - began + longest_s > given.seconds:
            untried.append(case.name)
            continue
        try:
            with _calm():
                row = {"case": asdict(case), "predicted_bytes": predicted_bytes(case), "measured": measured_bytes(case)}
                if profile is not None:
                    row["times"] = times(case, profile)
        except Exception as error:  # a library that is not there, a card that is full: the others go on
            failures.append({"case": asdict(case), "error": type_and_line(error)})
            print(case.name, failures[-1]["error"], file=sys.stderr, flush=True)
            gc.collect()
            continue
        longest_s = max(longest_s, time.monotonic() - case_began)
        rows.append(row)
        live = row["measured"]["live_bytes"]
        cells = [f"{row['predicted_bytes']:,}", f"{live:,}", f"{error_of(row):+.2%}"]
        if profile is not None:
            cells += [f"{row['times']['measured_s'] * 1e3:.1f} ms", f"{time_error_of(row):+.1%}"]
            cells.append(f"{time_error_of(row, 'predicted_by_rates_s'):+.1%}")
        table.add_row(case.name, *cells)
        print(case.name, *cells, file=sys.stderr, flush=True)
        if given.seconds < float("inf"):  # who ends this in its middle has what there is
            print(json.dumps({**about(), "benchmark": "truth", "rows": rows, "ended": False}), flush=True)
        gc.collect()
    Console().print(table)
    result: dict[str, Any] = {"benchmark": "truth", "device": device().type, "cases": len(rows), "rows": rows}
    if failures:
        result["failures"] = failures
    if untried:
        result["untried"] = untried
    if not rows:
        print(json.dumps({**about(), **result}))
        return 1
    found = verdict([error_of(row) for row in rows])
    result |= found
    failed = bool(failures) or found["median"] > MEDIAN or found["worst"] > WORST or found["most_under"] > UNDER
    if profile is not None:
        result["time"] = verdict([time_error_of(row) for row in rows])
        result["time_by_rates"] = verdict([time_error_of(row, "predicted_by_rates_s") for row in rows])
        failed |= result["time"]["median"] > TIME_MEDIAN or result["time"]["worst"] > TIME_WORST
    if given.keep:
        print(keep(result, "truth"))
    print(json.dumps({**about(), **result}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
