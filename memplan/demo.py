"""The main job on real parts: a Llama-style model, LoRA, real text, transformers' Trainer; whole, then under a plan.

The weights are random (nothing is downloaded), everything else is what a user has: sharded safetensors on disk, PEFT,
a Trainer. The two runs must be bit-identical.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from memplan import api
from memplan.errors import InputError
from memplan.hardware import machine
from memplan.hardware.calibrate import current
from memplan.model.live_storages import StorageLedger
from memplan.program.record import RunRecord
from memplan.program.schema import STAGING_BYTES, Plan
from memplan.run.handle import handle_of
from memplan.trainers.placing import placing
from memplan.units import align_up, format_bytes, format_seconds, parse_size

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 640, 1728, 20, 10, 8192
BATCH, SEQUENCE, STEPS, WATCHED_STEP, RANK = 2, 256, 5, 2, 16
ROUNDS = 2
"""Each trains the whole model, then under the plan, from the same start: a machine's speed drifts."""
SEED = 20
ABOUT = (
    f"memplan trains a small Llama ({LAYERS} layers, random weights, nothing is downloaded) with LoRA and "
    f"transformers' Trainer: {ROUNDS} times with the whole model in memory and {ROUNDS} times under a plan that "
    "gives the frozen weights a third of their bytes, in turns. Losses and adapters must be the same to the bit. This "
    "takes about two minutes on two cores.\n"
)
DIFFERS = 3
"""Exit code; 1 is that of a model that does not fit."""


@dataclass(slots=True)
class Outcome:
    """One training run."""

    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    """Of the steps that are neither the first (warming up) nor the watched one (slower)."""
    peak_bytes: int = 0
    adapter: Path = Path()
    plan: Plan | None = None
    record: RunRecord | None = None


def run(vram: str | None = None, steps: int | None = None, folder: Path | None = None, as_json: bool = False) -> int:
    """Run the demo; print what came of it. Return 0 where all runs are bit-identical and the budget was kept, else
    DIFFERS. ``steps``: of each run.
    """
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the demo trains with {package}, which is not installed: pip install memplan")
    given = None if vram is None else parse_size(vram, "vram")
    count = STEPS if steps is None else steps
    if count < WATCHED_STEP + 2:
        raise InputError(f"the demo was asked for {count} steps: give at least {WATCHED_STEP + 2}")
    if torch.cuda.is_available():  # cuBLAS looks at it once, at its first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    place = machine.cache_folder() / "demo" if folder is None else folder
    console = Console(stderr=as_json)
    console.print(ABOUT)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("making the model", total=2 * ROUNDS * count + 2)
        checkpoint = make_checkpoint(place)
        progress.update(task, advance=1, description="planning")
        plan = make_plan(checkpoint, given)
        progress.update(task, advance=1)
        wholes, planneds = list[Outcome](), list[Outcome]()
        for turn in range(1, ROUNDS + 1):
            progress.update(task, description=f"round {turn}, whole model")
            wholes.append(train(checkpoint, place / "whole", count, None, (progress, task), watched=turn == 1))
            progress.update(task, description=f"round {turn}, under the plan")
            planneds.append(train(checkpoint, place / "planned", count, plan, (progress, task), watched=turn == 1))
    whole, planned = wholes[0], planneds[0]
    whole_s, planned_s = (statistics.median(s for run in runs for s in run.step_s) for runs in (wholes, planneds))
    plan.save(place / "plan.json")
    if planned.record is not None:
        planned.record.save(place / "record.json")
    same_losses = all(run.losses == whole.losses for run in (*wholes, *planneds))
    same_adapters = adapters_identical(whole.adapter, planned.adapter)
    loads = loads_in_peft(checkpoint, planned.adapter)
    result = {
        "losses_identical": same_losses,
        "adapters_identical": same_adapters,
        "losses": planned.losses,
        "frozen_bytes": sum(block.size_bytes for block in plan.table.blocks),
        "vram_bytes": plan.budgets.vram_bytes,
        "peak_bytes": {
            "whole": whole.peak_bytes,
            "planned": planned.peak_bytes,
            "predicted": plan.prediction.peaks.vram_bytes,
        },
        "step_s": {"whole": whole_s, "planned": planned_s, "predicted": plan.prediction.step_s},
        "step_ratio": planned_s / whole_s,
        "homes": {tier: sum(item.home == tier for item in plan.items) for tier in ("device", "host", "disk")},
        "adapter": str(planned.adapter),
        "plan": str(place / "plan.json"),
        "record": str(place / "record.json"),
        "adapter_loads_in_peft": loads,
        "torch": torch.__version__,
        "device": plan.table.device,
    }
    if as_json:
        sys.stdout.write(json.dumps(result, sort_keys=True) + "\n")
    else:
        _print(console, whole, planned, result)
    fits = planned.peak_bytes <= plan.budgets.vram_bytes
    return 0 if same_losses and same_adapters and loads and fits else DIFFERS


def make_checkpoint(folder: Path) -> Path:
    """Write the demo's model (sharded safetensors, random weights) and tokenizer once; return their folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    target = folder / f"llama-{HIDDEN}x{LAYERS}"
    if (target / "complete").is_file():
        return target
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text()], vocab_size=VOCABULARY, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * SEQUENCE,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.save_pretrained(target, max_shard_size="100MB")
    tokenizer.save_pretrained(target)
    (target / "complete").touch()
    return target


def text() -> str:
    """Return the language reference that ships with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The text in pieces of one sequence each."""

    def __init__(self, checkpoint: Path, count: int) -> None:
        from transformers import PreTrainedTokenizerFast

        tokens = PreTrainedTokenizerFast.from_pretrained(checkpoint)(text()[: count * SEQUENCE * 8])["input_ids"]
        self._rows = torch.tensor(tokens[: len(tokens) // SEQUENCE * SEQUENCE]).view(-1, SEQUENCE)[:count]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self._rows[index]
        return {"input_ids": row, "labels": row.clone(), "attention_mask": torch.ones_like(row)}


def make_plan(checkpoint: Path, vram_bytes: int | None) -> Plan:
    """Plan from the configuration alone. By default the weights get a third of their bytes, a part of them on disk."""
    shapes = (BATCH, SEQUENCE)
    machine = current.current()
    vram = int(machine.device_bytes.value)
    roomy = api.plan(checkpoint, shapes, vram=vram, adapter=lora(), hardware=machine, gains=False)
    frozen = sum(block.size_bytes for block in roomy.table.blocks)
    if vram_bytes is None:
        vram_bytes = align_up(roomy.prediction.peaks.vram_bytes - frozen + frozen // 3)
    return api.plan(checkpoint, shapes, vram=vram_bytes, ram=frozen // 3 + STAGING_BYTES, adapter=lora(), measure=True)


def lora() -> Any:
    """Return the adapter's configuration, the same for the plan and for both runs."""
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def train(
    checkpoint: Path,
    folder: Path,
    steps: int,
    plan: Plan | None,
    progress: tuple[Progress, TaskID] | None = None,
    *,
    watched: bool = True,
) -> Outcome:
    """Train LoRA on the demo's model, whole or under ``plan``, and save the adapter. ``watched``: whether the memory of
    one step is counted.
    """
    import transformers
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
    transformers.logging.disable_progress_bar()
    outcome = Outcome(adapter=folder, plan=plan)
    on_cuda = torch.cuda.is_available()

    class Exact(Trainer):
        """Keeps each step's loss as it is; the log rounds it."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            outcome.losses.append(loss.item())
            return loss

    class Watch(TrainerCallback):
        """Times every step but the first, and counts the live device bytes of one."""

        began = 0.0
        counting: ExitStack | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if watched and state.global_step == WATCHED_STEP:
                self.counting = ExitStack()
                self.counting.enter_context(_counted(kwargs["model"], kwargs["optimizer"], outcome))
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_cuda:
                torch.cuda.synchronize()
            if self.counting is not None:
                self.counting.close()
                self.counting = None
            elif state.global_step > 1:
                outcome.step_s.append(time.perf_counter() - self.began)
            if progress is not None:
                progress[0].advance(progress[1])

    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
        use_cpu=not on_cuda,
    )
    samples = Samples(checkpoint, BATCH * steps)
    placed = nullcontext() if plan is None else placing(plan=plan)
    with placed:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if plan is None:
            align(model)
        torch.manual_seed(SEED)
        adapted = get_peft_model(model, lora())
        trainer = Exact(model=adapted, args=args, train_dataset=samples, callbacks=[Watch()])
    trainer.remove_callback(transformers.PrinterCallback)
    with deterministic() if on_cuda else nullcontext():
        trainer.train()
    adapted.save_pretrained(str(folder))
    if plan is not None:
        handle = handle_of(adapted)
        assert handle is not None
        outcome.record = handle.record
        handle.detach()
    del trainer, adapted, model
    gc.collect()
    return outcome


@contextmanager
def deterministic() -> Iterator[None]:
    """Have CUDA kernels give the same bits each time: attention's backward does not unless it is told to, and no
    less.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def align(model: torch.nn.Module) -> None:
    """Give each weight memory of its own. [Note: alignment changes bits]

    A tensor mapped from a safetensors file starts wherever the file has it, and some kernels round otherwise there.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@contextmanager
def _counted(model: torch.nn.Module, optimizer: Any, outcome: Outcome) -> Iterator[None]:
    """Note the peak of live device bytes inside: weights, adapters, gradients, optimizer state, activations."""
    handle = handle_of(model)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield
        outcome.peak_bytes = torch.cuda.max_memory_allocated()
    elif handle is not None:
        with handle.watch_memory(getattr(optimizer, "optimizer", optimizer)):
            yield
        outcome.peak_bytes = handle.record.vram_peak_bytes
    else:
        with StorageLedger.of_training(model, optimizer) as ledger:
            yield
        outcome.peak_bytes = ledger.peak_bytes


def adapters_identical(one: Path, other: Path) -> bool:
    """Whether two saved adapters hold the same tensors, byte for byte."""
    return (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def loads_in_peft(checkpoint: Path, adapter: Path) -> bool:
    """Whether stock PEFT loads the adapter onto the stock model, tensor for tensor."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), adapter)
    held, saved = get_peft_model_state_dict(loaded), load_file(adapter / "adapter_model.safetensors")
    return held.keys() == saved.keys() and all(torch.equal(held[name].cpu(), saved[name]) for name in saved)


def _print(console: Console, whole: Outcome, planned: Outcome, result: dict[str, Any]) -> None:
    assert planned.plan is not None
    peak, step = result["peak_bytes"], result["step_s"]
    is_same = result["losses_identical"] and result["adapters_identical"]
    console.print(
        f"[bold green]identical[/]: losses and adapters of all {2 * ROUNDS} runs are the same to the bit"
        if is_same
        else f"[bold red]NOT identical[/]: losses {_answer(result['losses_identical'])}, adapters "
        f"{_answer(result['adapters_identical'])}"
    )
    console.print(
        f"memory: {format_bytes(peak['planned'])} at the peak in place of {format_bytes(peak['whole'])} "
        f"(predicted {format_bytes(peak['predicted'])}, budget {format_bytes(result['vram_bytes'])})"
    )
    console.print(
        f"step: {format_seconds(step['planned'])}, {result['step_ratio']:.3f} times the whole model's "
        f"{format_seconds(step['whole'])} (predicted {format_seconds(step['predicted'])})"
    )
    console.print(
        f"adapter: {result['adapter']} (loads in stock PEFT: {_answer(result['adapter_loads_in_peft'])})\n",
        soft_wrap=True,
    )
    table = Table(title="losses", title_justify="left")
    for column in ("step", "whole model", "under the plan"):
        table.add_column(column, justify="right")
    for index, (one, other) in enumerate(zip(whole.losses, planned.losses, strict=True), start=1):
        table.add_row(str(index), repr(one), repr(other))
    console.print(table)
    console.print(f"\nThe whole report: memplan report {result['plan']} {result['record']}", soft_wrap=True)


def _answer(value: bool) -> str:
    return "yes" if value else "NO"
