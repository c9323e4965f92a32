"""A Trainer that exists, and one that is built while the model is placed: whole, wrapped and placed agree byte for
byte.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from accelerate.utils import DynamoBackend
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import memplan
from memplan.errors import CheckpointError, DoesNotFitError, InputError
from memplan.run.handle import handle_of
from memplan.trainers.hf_trainer import plan_for
from memplan.trainers.loading.mapped_weights import is_mapped
from memplan.units import MIB
from tests.support.fingerprint import assert_same, fingerprint
from tests.support.training import CPU
from tests.trainers.forked import clean
from tests.trainers.small import align, save_small_llama

ROWS, LENGTH = 12, 24


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = torch.randint(1, 96, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index], "attention_mask": torch.ones(LENGTH)}


class Exact(Trainer):
    """Keeps each loss as it is; the log rounds it."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("exact", []).append(loss.item())
        return loss


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_small_llama(folder)
    align(folder)  # [Note: alignment changes bits]
    return folder


def build(checkpoint, out, **arguments):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(6)
    lora = LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    args = TrainingArguments(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=7, logging_steps=1, **arguments,
    )  # fmt: skip
    return Exact(model=adapted, args=args, train_dataset=Rows(), eval_dataset=Rows())


def finish(trainer, out):
    trainer.train()
    trainer.model.save_pretrained(str(out))
    return trainer.exact, (out / "adapter_model.safetensors").read_bytes()


def budget(checkpoint, out, **arguments):
    """A vram between the least and all."""
    trainer = build(checkpoint, out, **arguments)
    with pytest.raises(DoesNotFitError) as caught:
        memplan.wrap(trainer, vram=1, ram="1GiB", hardware=CPU)
    return caught.value.least_vram_bytes + MIB // 2


CHECKPOINTING = (  # transformers 5.23 has another name for it
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
CASES = [
    pytest.param({}, marks=pytest.mark.full),
    {"gradient_accumulation_steps": 2},
    pytest.param({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}, marks=pytest.mark.full),
    pytest.param({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, marks=pytest.mark.full),
    pytest.param({"eval_strategy": "steps", "eval_steps": 2}, marks=pytest.mark.full),
    pytest.param({"bf16": True}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(
    "arguments", CASES, ids=["plain", "accumulation", "checkpointing", "reentrant", "evaluation", "autocast"]
)
def test_whole_wrapped_and_placed_agree(checkpoint, tmp_path, arguments):
    whole = finish(build(checkpoint, tmp_path / "whole", **arguments), tmp_path / "whole")
    vram = budget(checkpoint, tmp_path / "budget", **arguments)

    trainer = build(checkpoint, tmp_path / "wrapped", **arguments)
    assert memplan.wrap(trainer, vram=vram, ram="1GiB", hardware=CPU, checked=True) is trainer
    assert finish(trainer, tmp_path / "wrapped") == whole
    record = trainer.memplan.record
    assert record.loads > 0
    assert record.passes == 4 * arguments.get("gradient_accumulation_steps", 1)

    with memplan.placing(vram=vram, ram=0 + 17 * MIB, hardware=CPU, checked=True):
        trainer = build(checkpoint, tmp_path / "placed", **arguments)
    assert finish(trainer, tmp_path / "placed") == whole
    assert handle_of(trainer.model) is trainer.memplan


@pytest.mark.parametrize("max_steps", [-1, pytest.param(3, marks=pytest.mark.full)])
def test_the_plan_knows_how_many_steps_the_trainer_does(checkpoint, tmp_path, max_steps):
    trainer = build(checkpoint, tmp_path, gradient_accumulation_steps=4, num_train_epochs=1.5)
    trainer.args.max_steps = max_steps
    plan = plan_for(trainer, vram="1GiB", ram="1GiB", hardware=CPU)
    assert plan.workload.optimizer == trainer.args.optim
    trainer.train()
    assert plan.workload.steps == trainer.state.global_step == 3


@pytest.mark.full
def test_under_autocast_the_prediction_is_what_is_measured(checkpoint, tmp_path):
    """The trainer wraps the model in autocast only once training starts; the plan is made as if it had."""
    trainer = build(checkpoint, tmp_path / "wrapped", bf16=True)
    forward = trainer.model.forward
    pins = {f"layers.{index}": "host" for index in range(6)}
    memplan.wrap(trainer, vram="1GiB", ram="1GiB", hardware=CPU, pins=pins)
    assert trainer.model.forward == forward
    with trainer.memplan.watch_memory():
        trainer.train()
    plan, record = trainer.memplan.plan, trainer.memplan.record
    assert any(row.weight_copy_bytes for row in plan.table.accesses)
    assert any("casts to bfloat16" in note for note in plan.notes)
    assert record.vram_peak_bytes <= plan.prediction.peaks.vram_bytes
    assert plan.prediction.peaks.vram_bytes == pytest.approx(record.vram_peak_bytes, rel=0.05)


@pytest.mark.full
def test_placed_from_the_disk_alone(checkpoint, tmp_path):
    """No RAM but the staging ring: every streamed block comes from the checkpoint's own files."""
    whole = finish(build(checkpoint, tmp_path / "whole"), tmp_path / "whole")
    pins = {f"layers.{index}": "disk" for index in range(6)}
    with memplan.placing(vram="1GiB", ram="16MiB", hardware=CPU, pins=pins, checked=True):
        trainer = build(checkpoint, tmp_path / "placed")
    plan = trainer.memplan.plan
    assert [item.home for item in plan.items].count("disk") == 6
    assert plan.budgets.disk_bytes is None
    assert finish(trainer, tmp_path / "placed") == whole


@pytest.mark.full
def test_layers_that_are_put_elsewhere_keep_their_weights(checkpoint, tmp_path, monkeypatch):
    """A mapped weight stands for what it was loaded as, not for what now has its name."""
    load = AutoModelForCausalLM.from_pretrained

    def reordered(folder):
        model = load(folder)
        model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (0, 2, 1, 3, 5, 4))
        return model

    plain = finish(build(checkpoint, tmp_path / "plain"), tmp_path / "plain")
    vram = budget(checkpoint, tmp_path / "budget")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reordered)
    whole = finish(build(checkpoint, tmp_path / "whole"), tmp_path / "whole")
    assert whole != plain
    with memplan.placing(vram=vram, ram="1GiB", hardware=CPU, checked=True):
        trainer = build(checkpoint, tmp_path / "placed")
    assert finish(trainer, tmp_path / "placed") == whole


@pytest.mark.parametrize("same", [True, False])
def test_weights_that_are_stored_twice_though_tied(checkpoint, tmp_path, same):
    """Equal ones are one; of different ones none is taken for the other."""
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    if same:
        model.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with memplan.placing(vram="1GiB", ram="1GiB", hardware=CPU):
        if same:
            tied = LlamaForCausalLM.from_pretrained(tmp_path / "model")
            assert tied.lm_head.weight is tied.model.embed_tokens.weight
        else:
            with pytest.raises(CheckpointError, match="different weights for"):
                LlamaForCausalLM.from_pretrained(tmp_path / "model")


def test_the_adapter_loads_in_stock_peft(checkpoint, tmp_path):
    vram = budget(checkpoint, tmp_path / "budget")
    with memplan.placing(vram=vram, ram="1GiB", hardware=CPU):
        trainer = build(checkpoint, tmp_path / "placed")
    finish(trainer, tmp_path / "placed")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path / "placed")
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in loaded.named_parameters():
        if name in trained:
            assert torch.equal(parameter, trained[name])


def test_nothing_is_left_of_placing(checkpoint, tmp_path):
    from transformers import PreTrainedModel

    before = PreTrainedModel.__dict__["from_pretrained"], Trainer.__init__
    with pytest.raises(DoesNotFitError), memplan.placing(vram=1, hardware=CPU):
        build(checkpoint, tmp_path)
    assert (PreTrainedModel.__dict__["from_pretrained"], Trainer.__init__) == before


def test_a_failed_wrap_leaves_the_trainer_as_it_was(checkpoint, tmp_path):
    whole = finish(build(checkpoint, tmp_path / "whole"), tmp_path / "whole")
    trainer = build(checkpoint, tmp_path / "again")
    with pytest.raises(DoesNotFitError):
        memplan.wrap(trainer, vram=1, ram="1GiB", hardware=CPU)
    with pytest.raises(InputError, match="is not a size"):
        memplan.wrap(trainer, vram="12 apples", hardware=CPU)
    assert "memplan" not in trainer.__dict__
    assert not trainer.accelerator._dataloaders
    assert finish(trainer, tmp_path / "again") == whole


@pytest.mark.parametrize("by", ["the arguments", "accelerate"])
def test_a_trainer_that_would_compile_the_model_is_refused(checkpoint, tmp_path, monkeypatch, by):
    trainer = build(checkpoint, tmp_path)
    if by == "the arguments":
        trainer.args.torch_compile = True
    else:
        monkeypatch.setattr(trainer.accelerator.state.dynamo_plugin, "backend", DynamoBackend.INDUCTOR)
    with pytest.raises(InputError, match=r"asked to compile.*layer\.compile\(\)"):
        memplan.wrap(trainer, hardware=CPU)
    assert handle_of(trainer.model) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: next(iter(sorted(folder.glob("*.safetensors")))).unlink(), "cannot be read"),
        (lambda folder: truncate(sorted(folder.glob("*.safetensors"))[-1]), "truncated"),
        (lambda folder: rename(folder), "holds no tensor"),
    ],
    ids=["missing shard", "truncated shard", "missing tensor"],
)
def test_bad_checkpoints(checkpoint, tmp_path, spoil, message):
    import shutil

    folder = tmp_path / "bad"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    with memplan.placing(vram="1GiB", hardware=CPU), pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename(folder):
    import json

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    from safetensors.torch import load_file, save_file

    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if tensors.pop("model.norm.weight", None) is not None:
            save_file(tensors, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_options_that_placing_does_not_serve(checkpoint):
    with memplan.placing(vram="1GiB", hardware=CPU):
        with pytest.raises(InputError, match="device_map"):
            AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"model": "cpu", "lm_head": "disk"})
        with pytest.raises(InputError, match="trust_remote_code"):
            LlamaForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
        assert is_mapped(AutoModelForCausalLM.from_pretrained(checkpoint, device_map="auto"))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda trainer: setattr(trainer.args, "_n_gpu", 2), "several devices"),
        (lambda trainer: setattr(trainer, "is_fsdp_enabled", True), "DeepSpeed or FSDP"),
    ],
)
def test_a_model_that_others_place_is_refused(checkpoint, tmp_path, spoil, why):
    trainer = build(checkpoint, tmp_path)
    spoil(trainer)
    with pytest.raises(InputError, match=why):
        memplan.wrap(trainer, vram="1GiB", ram="1GiB", hardware=CPU)
    assert handle_of(trainer.model) is None


@pytest.mark.full
def test_one_of_several_processes_is_refused(checkpoint, tmp_path):
    """Each of two, before anything is placed."""
    script = tmp_path / "two.py"
    script.write_text(SEVERAL)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        env=clean(),
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines())[-2:] == ["refused 0", "refused 1"]


SEVERAL = """
import sys
from transformers import AutoModelForCausalLM, Trainer
import memplan
from tests.trainers.test_placing import Rows, adapted, args_for
args = args_for(sys.argv[2])
with memplan.placing(vram="64MiB", ram="64MiB"):
    try:
        Trainer(model=adapted(sys.argv[1]), args=args, train_dataset=Rows())
    except memplan.InputError as error:
        assert "one of several" in str(error), error
        sys.stdout.write(f"refused {args.process_index}\\n")
"""


@pytest.mark.full
def test_a_step_that_runs_out_of_memory_is_done_over(checkpoint, tmp_path):
    """Twice, with accumulation: the losses and the adapter's file are the whole run's."""
    arguments = {"gradient_accumulation_steps": 2}
    whole = finish(build(checkpoint, tmp_path / "a", **arguments), tmp_path / "a")
    trainer = build(checkpoint, tmp_path / "b", **arguments)
    memplan.wrap(trainer, vram="3MiB", ram="1GiB", hardware=CPU)
    calls = []

    def full(module, args, output):
        calls.append(1)
        if len(calls) in (2, 6):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.get_base_model().model.layers[3].mlp.register_forward_hook(full)
    assert finish(trainer, tmp_path / "b") == whole
    assert trainer.memplan.record.recoveries == 2


def test_a_look_leaves_model_and_collator_as_they_were(checkpoint, tmp_path):
    class Collator:
        def __init__(self):
            self.calls, self.generator = 0, torch.Generator().manual_seed(1)

        def __call__(self, rows):
            self.calls += 1
            torch.rand(1, generator=self.generator)
            return torch.utils.data.default_collate(rows)

    trainer = build(checkpoint, tmp_path)
    trainer.data_collator = Collator()
    before = fingerprint(trainer.model, trainer.data_collator)
    plan_for(trainer, vram="1GiB", ram="1GiB", hardware=CPU)
    assert_same(before, fingerprint(trainer.model, trainer.data_collator))
