"""A long run as people have them: evaluation, generation, checkpoint and resume in between; the same adapters at the
end.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import memplan
from tests.run.test_parity import plan_for
from tests.support.training import batch_of, make

STEPS, EVERY, STOP = 200, 40, 120


class Texts(torch.utils.data.Dataset):
    """Rows of tokens; the same at every call."""

    def __init__(self, count: int, seed: int) -> None:
        self.rows = [{k: v[0] for k, v in batch_of("llama", seed=seed + i).items()} for i in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


class Generates(Trainer):
    """Generates after each evaluation."""

    def evaluate(self, *args, **kwargs):
        found = super().evaluate(*args, **kwargs)
        self.model.eval()
        with torch.no_grad():
            tokens = self.model.generate(
                input_ids=batch_of("llama")["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0
            )
        self.model.train()
        self.generated = [*getattr(self, "generated", []), tokens]
        return found


def trainer(folder, *, stop=STEPS):
    model = make("llama", dropout=0.1)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, eval_strategy="steps", eval_steps=EVERY, save_steps=EVERY, logging_steps=10, seed=5,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    built = Generates(model=model, args=arguments, train_dataset=Texts(64, 100), eval_dataset=Texts(6, 900))
    if stop < STEPS:
        from transformers import TrainerCallback

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step >= stop

        built.add_callback(Stop())
    return built


def adapters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(built):
    return [(e["step"], e.get("loss"), e.get("eval_loss")) for e in built.state.log_history if "train_loss" not in e]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_two_hundred_steps(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    plan = plan_for(whole.model, "llama", accumulation=2)

    first = trainer(tmp_path / "planned", stop=STOP)
    with memplan.attach(first.model, plan, cache=tmp_path / "cache"):
        first.train()
    assert first.state.global_step == STOP

    second = trainer(tmp_path / "planned")
    with memplan.attach(second.model, plan, cache=tmp_path / "cache") as handle:
        second.train(resume_from_checkpoint=str(tmp_path / "planned" / f"checkpoint-{STOP}"))
        assert handle.record.out_of_order > 0
    assert second.state.global_step == STEPS

    expected, found = adapters(whole.model), adapters(second.model)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    assert losses(whole) == losses(second)
    generated = first.generated + second.generated
    assert len(generated) == len(whole.generated) == STEPS // EVERY
    assert all(torch.equal(a, b) for a, b in zip(whole.generated, generated, strict=True))
