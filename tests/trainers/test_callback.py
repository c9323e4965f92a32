"""A trainer that is built from a configuration, with memplan as one of its callbacks."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

import memplan
from memplan.errors import InputError
from memplan.run.handle import handle_of
from memplan.trainers.callback import MemplanCallback
from tests.support.training import CPU
from tests.trainers.test_transformers import budget, build, finish

CASES = [{"gradient_accumulation_steps": 2}, pytest.param({"bf16": True}, marks=pytest.mark.full)]


@pytest.mark.parametrize("arguments", CASES, ids=["accumulation", "autocast"])
def test_it_trains_as_without_it(checkpoint, tmp_path, arguments, capsys):
    whole = finish(build(checkpoint, tmp_path / "whole", **arguments), tmp_path / "whole")
    vram = budget(checkpoint, tmp_path / "budget", **arguments)
    trainer = build(checkpoint, tmp_path / "called", **arguments)
    callback = MemplanCallback(vram=vram, ram="1GiB", hardware=CPU, checked=True, lines=True)
    trainer.add_callback(callback)
    assert finish(trainer, tmp_path / "called") == whole
    assert handle_of(trainer.model) is callback.handle
    record = callback.handle.record
    assert record.loads > 0
    assert record.passes == 4 * arguments.get("gradient_accumulation_steps", 1)
    assert callback.handle.plan.workload.accumulation == arguments.get("gradient_accumulation_steps", 1)
    assert capsys.readouterr().err.count("memplan: step ") == 4
    callback.handle.detach()
    trainer.train()  # once more from the beginning: it is placed anew
    assert handle_of(trainer.model) is callback.handle
    assert callback.handle.record.passes == record.passes


def test_what_it_cannot_serve_is_refused_before_training(checkpoint, tmp_path):
    with pytest.raises(InputError, match="vrm"):
        MemplanCallback(vrm="1GiB")
    compiled = build(checkpoint, tmp_path, torch_compile=True)
    with pytest.raises(InputError, match="leave torch_compile out"):
        Trainer(compiled.model, compiled.args, callbacks=[MemplanCallback(vram="1GiB", hardware=CPU)])
    trainer = build(checkpoint, tmp_path)
    trainer.add_callback(MemplanCallback(vram=1, ram="1GiB", hardware=CPU))
    with pytest.raises(memplan.DoesNotFitError):
        trainer.train()
    assert handle_of(trainer.model) is None


def test_a_trainer_that_is_wrapped_is_left_alone(checkpoint, tmp_path):
    trainer = build(checkpoint, tmp_path)
    callback = MemplanCallback(vram=1, ram="1GiB", hardware=CPU)
    trainer.add_callback(callback)
    memplan.wrap(trainer, vram="1GiB", ram="1GiB", hardware=CPU)
    trainer.train()
    assert callback.handle is None
    assert handle_of(trainer.model) is trainer.memplan
    assert torch.isfinite(torch.tensor(trainer.exact)).all()
