"""``memplan.placing``: true weights from the start, whatever is done to them before the trainer; other models stay
whole.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import memplan
from memplan.errors import DoesNotFitError, InputError, ModelError
from memplan.run.handle import handle_of
from memplan.run.memory.arena import Placeholders
from memplan.trainers.loading.mapped_weights import is_mapped
from tests.support.training import CPU
from tests.trainers.small import align
from tests.trainers.test_transformers import Exact, Rows

IDS = torch.tensor([[3, 4, 5]])
VRAM = "2500KiB"


def args_for(out, **more):
    return TrainingArguments(
        output_dir=str(out), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, save_strategy="no",
        report_to=[], disable_tqdm=True, use_cpu=True, seed=7, **more,
    )  # fmt: skip


def adapted(folder, change=lambda model: model, **lora):
    torch.manual_seed(6)
    model = change(AutoModelForCausalLM.from_pretrained(folder))
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **lora}))


def outcome(trainer):
    """Train, and return the losses and what was learned."""
    trainer.train()
    return trainer.exact, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in other[1].values())


def cast(model):
    return model.to(torch.bfloat16)


def resized(model):
    model.resize_token_embeddings(101)
    return model


def written(model):
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[-1, -1] += 0.5
    return model


CHANGES = [copy.deepcopy, cast, resized, written]
BEGINNINGS = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
]


@pytest.mark.quick("deepcopy")
@pytest.mark.parametrize(
    "change", [pytest.param(c, marks=[] if c in (copy.deepcopy, cast) else pytest.mark.full) for c in CHANGES]
)
def test_whatever_is_done_to_the_model_before_it_is_trained(checkpoint, tmp_path, change):
    def build():
        return Exact(model=adapted(checkpoint, change), args=args_for(tmp_path), train_dataset=Rows())

    whole = outcome(build())
    with memplan.placing(vram="1200KiB" if change is cast else VRAM, ram="64MiB", hardware=CPU, checked=True):
        trainer = build()
    assert_same(whole, outcome(trainer))
    assert trainer.memplan.record.loads > 0


@pytest.mark.parametrize(
    "lora", [pytest.param(b, marks=[] if "use_dora" in b else pytest.mark.full) for b in BEGINNINGS], ids=str
)
def test_adapters_that_begin_with_the_models_weights(checkpoint, tmp_path, lora):
    def build():
        return Exact(model=adapted(checkpoint, **lora), args=args_for(tmp_path), train_dataset=Rows())

    whole = outcome(build())
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU, checked=True):
        trainer = build()
    assert_same(whole, outcome(trainer))
    assert trainer.memplan.record.loads > 0


def test_what_no_trainer_is_built_for_is_whole(checkpoint, tmp_path):
    whole = outcome(Exact(model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows()))
    expected = LlamaForCausalLM.from_pretrained(checkpoint)(IDS).logits
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU):
        teacher = LlamaForCausalLM.from_pretrained(checkpoint)
        assert is_mapped(teacher)
        assert torch.equal(teacher(IDS).logits, expected)
        later = adapted(checkpoint)
    assert torch.equal(teacher(IDS).logits, expected)
    assert torch.equal(
        teacher.bfloat16()(IDS).logits, LlamaForCausalLM.from_pretrained(checkpoint).bfloat16()(IDS).logits
    )
    trainer = Exact(model=later, args=args_for(tmp_path), train_dataset=Rows())
    assert_same(whole, outcome(trainer))
    assert handle_of(later) is None
    assert not any("_call_impl" in module.__dict__ or "_apply" in module.__dict__ for module in later.modules())


def test_detached_it_is_whole(checkpoint, tmp_path):
    expected = {name: p.detach().clone() for name, p in adapted(checkpoint).named_parameters()}
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU):
        trainer = Exact(model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows())
    trainer.memplan.detach()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.fixture
def other(checkpoint, tmp_path):
    """The checkpoint of a model of the same shape."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    align(folder)
    return folder


@pytest.mark.full
def test_trainers_of_one_context_share_its_budget(checkpoint, other, tmp_path):
    """The first gives way to the second."""

    def build(folder):
        return Exact(model=adapted(folder), args=args_for(tmp_path), train_dataset=Rows())

    expected = [outcome(build(folder)) for folder in (checkpoint, other)]
    with memplan.placing(vram="3MiB", ram="4MiB", hardware=CPU):
        trainers = [build(checkpoint)]
        alone = trainers[0].memplan.plan.prediction.peaks
        trainers.append(build(other))
    handles = [trainer.memplan for trainer in trainers]
    peaks = [handle.plan.prediction.peaks for handle in handles]
    assert peaks[0].vram_bytes < alone.vram_bytes
    assert sum(peak.vram_bytes for peak in peaks) <= 3 << 20 < alone.vram_bytes + peaks[1].vram_bytes
    assert sum(peak.ram_bytes for peak in peaks) <= 4 << 20
    for trainer, whole in zip(trainers, expected, strict=True):
        assert_same(whole, outcome(trainer))
    assert all(handle.record.loads > 0 for handle in handles)


@pytest.mark.full
def test_trainers_that_do_not_fit_together_are_refused(checkpoint, other, tmp_path):
    def build(folder):
        return Exact(model=adapted(folder), args=args_for(tmp_path), train_dataset=Rows())

    whole = outcome(build(other))
    with memplan.placing(vram="1000KiB", ram="64MiB", hardware=CPU):
        kept = build(checkpoint)
        with pytest.raises(DoesNotFitError) as refused:
            build(other)
        assert handle_of(kept.model) is kept.memplan
    assert str(checkpoint) in str(refused.value)
    assert str(other) in str(refused.value)
    assert refused.value.least_vram_bytes > 1000 << 10
    with memplan.placing(vram=refused.value.least_vram_bytes, ram="64MiB", hardware=CPU):
        trainers = [build(folder) for folder in (checkpoint, other)]
    assert_same(whole, outcome(trainers[1]))


def test_the_same_model_for_a_second_trainer_keeps_its_plan(checkpoint, tmp_path):
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU):
        one = Exact(model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows())
        two = Exact(model=one.model, args=args_for(tmp_path), train_dataset=Rows())
    assert two.memplan is one.memplan
    two.train()
    assert one.memplan.record.loads > 0


class Slow(Exact):
    """Not all there when its parent's constructor is done."""

    def __init__(self, **more):
        super().__init__(**more)
        assert "memplan" not in self.__dict__
        self.weight = 2.0

    def compute_loss(self, model, inputs, **more):
        return self.weight * super().compute_loss(model, inputs, **more)


class Prompts(Exact):
    """Its data is lists, of which it makes what it calls the model with as it trains."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(
            inputs
            if isinstance(inputs, dict)
            else {name: torch.stack([row[name] for row in inputs]) for name in inputs[0]}
        )


def prompts(folder, out):
    return Prompts(model=adapted(folder), args=args_for(out), train_dataset=Rows(), data_collator=list)


def test_it_is_wrapped_when_its_own_constructor_is_done(checkpoint, tmp_path):
    def build():
        return Slow(model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows())

    whole = outcome(build())
    before = Slow.__dict__["__init__"], Exact.__dict__.get("__init__"), Trainer.__init__
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU):
        trainer = build()
        assert trainer.memplan.is_attached

        class Later(Slow):
            def __init__(self, **more):
                super().__init__(**more)
                assert "memplan" not in self.__dict__

        later = Later(model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows(), callbacks=[])
        assert later.memplan.is_attached
    assert_same(whole, outcome(trainer))
    assert (Slow.__dict__["__init__"], Exact.__dict__.get("__init__"), Trainer.__init__) == before
    assert "__init_subclass__" not in Trainer.__dict__


def test_data_that_does_not_say_what_the_model_is_called_with(checkpoint, tmp_path):
    whole = outcome(prompts(checkpoint, tmp_path))
    with pytest.raises(InputError, match=r"the data of Prompts comes as list.*batch="):
        memplan.wrap(prompts(checkpoint, tmp_path), vram=VRAM, ram="64MiB", hardware=CPU)
    with memplan.placing(vram=VRAM, ram="64MiB", hardware=CPU):
        trainer = prompts(checkpoint, tmp_path)
        assert "memplan" not in trainer.__dict__
    assert_same(whole, outcome(trainer))
    assert trainer.memplan.record.loads > 0
    with memplan.placing(vram="100KiB", ram="64MiB", hardware=CPU):
        trainer = prompts(checkpoint, tmp_path)
    with pytest.raises(DoesNotFitError):
        trainer.train()


class Distilled(Exact):
    """With a teacher, which nobody places."""

    def __init__(self, teacher, **more):
        super().__init__(**more)
        self.teacher = teacher

    def compute_loss(self, model, inputs, **more):
        with torch.no_grad():
            wanted = self.teacher(inputs["input_ids"]).logits
        return (model(**inputs).logits - wanted).square().mean()


def test_a_teacher_is_whole_and_takes_its_part(checkpoint, other, tmp_path):
    def build():
        teacher = AutoModelForCausalLM.from_pretrained(other)
        return Distilled(teacher, model=adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows())

    whole = outcome(build())
    with memplan.placing(vram="1500KiB", ram="4MiB", hardware=CPU):
        trainer = build()
    teacher = trainer.teacher
    taken = sum(t.numel() * t.element_size() for t in (*teacher.parameters(), *teacher.buffers()))
    assert trainer.memplan.plan.budgets.ram_bytes == (4 << 20) - taken
    assert str(other) in trainer.memplan.plan.notes[-1]
    assert_same(whole, outcome(trainer))
    assert trainer.memplan.record.loads > 0


def test_a_trainer_that_makes_its_model_anew_is_refused(checkpoint, tmp_path):
    def build():
        return Trainer(model_init=lambda: adapted(checkpoint), args=args_for(tmp_path), train_dataset=Rows())

    with memplan.placing(vram=VRAM, hardware=CPU), pytest.raises(InputError, match="model_init"):
        build()
    with pytest.raises(InputError, match="model_init"):
        memplan.wrap(build(), vram=VRAM, hardware=CPU)


def test_a_trainer_without_data_leaves_its_model_whole(checkpoint, tmp_path, capsys):
    expected = adapted(checkpoint)(IDS).logits
    with memplan.placing(vram=VRAM, hardware=CPU):
        trainer = Trainer(model=adapted(checkpoint), args=args_for(tmp_path))
    assert torch.equal(trainer.model(IDS).logits, expected)
    assert "Trainer has no data to train on: its model stays whole" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["placeholder", "cast", "copied"])
def test_a_trained_weight_that_is_not_there_is_never_attached(checkpoint, lost):
    model = adapted(checkpoint, modules_to_save=["lm_head"])
    batch = {"input_ids": IDS, "labels": IDS}
    plan = memplan.plan(model, batch, vram="64MiB", ram="64MiB", hardware=CPU)
    weight = model.get_base_model().lm_head.modules_to_save["default"].weight
    away = Placeholders(torch.device("cpu")).of(tuple(weight.shape), torch.float32)
    weight.data = {"placeholder": away, "cast": away.to(torch.bfloat16).float(), "copied": away.clone()}[lost]
    with pytest.raises(ModelError, match=r"lm_head.* is trained, but holds no weights"):
        memplan.attach(model, plan)
    assert handle_of(model) is None
