"""Options of a plan reach it from each way in: through ``wrap``, ``placing``, Lightning's callback and ``memplan
run``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch

import memplan
from memplan.errors import DoesNotFitError, InputError
from memplan.trainers.lightning import Placement
from memplan.units import MIB
from tests.support.training import CPU
from tests.trainers.forked import clean
from tests.trainers.test_transformers import Rows, build, checkpoint  # noqa: F401

ASKED = {"activations": "recompute", "elastic": False, "optimizer_state": "host", "page_lock": "3MiB"}
WORDS = ["--activations", "recompute", "--no-elastic", "--optimizer-state", "host", "--page-lock", "3MiB"]
SCRIPT = """
import sys
from pathlib import Path
import memplan
from tests.trainers.test_transformers import build
folder, out = map(Path, sys.argv[1:])
trainer = build(folder, out)
trainer.train()
memplan.handle_of(trainer.model).plan.save(out / "plan.json")
"""


def assert_asked(plan):
    assert set(plan.asked.values()) == {"recompute"}
    assert plan.budgets.page_lock_bytes == 3 * MIB
    assert plan.elastic is False
    assert plan.optimizer_state == "host"


@pytest.fixture(scope="module")
def vram(checkpoint, tmp_path_factory):  # noqa: F811
    """A little more than the least, in bytes."""
    with pytest.raises(DoesNotFitError) as caught:
        memplan.wrap(build(checkpoint, tmp_path_factory.mktemp("least")), vram=1, ram="1GiB", hardware=CPU, **ASKED)
    return caught.value.least_vram_bytes + MIB // 4


def test_wrap(checkpoint, vram, tmp_path):  # noqa: F811
    trainer = build(checkpoint, tmp_path)
    memplan.wrap(trainer, vram=vram, ram="1GiB", hardware=CPU, **ASKED)
    assert_asked(trainer.memplan.plan)
    assert trainer.memplan.plan.workload.steps == 4
    assert trainer.memplan.plan.gains == ()


def test_what_is_given_goes_before_what_the_trainer_says(checkpoint, vram, tmp_path):  # noqa: F811
    trainer = build(checkpoint, tmp_path, gradient_accumulation_steps=2)
    more = {"steps": 9, "accumulation": 3, "optimizer": "sgd", "gains": True, "autocast": "bf16"}
    memplan.wrap(trainer, vram=vram + MIB, ram="1GiB", hardware=CPU, **more)
    plan = trainer.memplan.plan
    assert (plan.workload.steps, plan.workload.accumulation, plan.workload.optimizer) == (9, 3, "sgd")


def test_what_makes_no_sense_for_a_model_that_is_there_is_refused_as_by_plan(checkpoint, tmp_path):  # noqa: F811
    trainer = build(checkpoint, tmp_path)
    given = {"vram": "1GiB", "ram": "1GiB", "hardware": CPU}
    for options, message in (
        ({"dtype": "bf16"}, "dtype and attention were given with a model that is built already"),
        ({"quantization": "int8"}, "quantization was given with a PeftModel.* that is built already"),
        ({"kbit": True}, "kbit was given with a PeftModel.* that is built already"),
        ({"qlora": True}, "qlora was given with a PeftModel.* that is built already"),
    ):
        with pytest.raises(InputError, match=message):
            memplan.wrap(trainer, **given, **options)
    assert "memplan" not in trainer.__dict__


def test_placing(checkpoint, vram, tmp_path):  # noqa: F811
    with memplan.placing(vram=vram, ram="1GiB", hardware=CPU, **ASKED):
        trainer = build(checkpoint, tmp_path)
    assert_asked(trainer.memplan.plan)


@pytest.mark.filterwarnings("ignore")
def test_lightning(checkpoint, vram, tmp_path):  # noqa: F811
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build(checkpoint, tmp_path).model

        def training_step(self, batch, index):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    callback = Placement(vram=vram, ram="1GiB", hardware=CPU, accumulation=2, **ASKED)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(Rows(), batch_size=2))
    assert_asked(callback.handle.plan)
    assert callback.handle.plan.workload.accumulation == 2


@pytest.mark.full
def test_run(checkpoint, vram, hardware, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = ["--vram", f"{vram}B", "--ram", "1GiB", "--hardware", str(hardware), "--steps", "9", *WORDS]
    command = [sys.executable, "-m", "memplan", "run", *given, "--", sys.executable, script, checkpoint, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = memplan.Plan.load(Path(tmp_path / "plan.json"))
    assert_asked(plan)
    assert plan.workload.steps == 9


@pytest.mark.full
def test_a_step_that_is_too_long_ends_the_script_as_the_command_plan(checkpoint, vram, hardware, tmp_path):  # noqa: F811
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = ["--vram", f"{vram}B", "--ram", "1GiB", "--hardware", str(hardware), "--max-step-s", "1e-9"]
    command = [sys.executable, "-m", "memplan", "run", *given, "--", sys.executable, script, checkpoint, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=clean(), timeout=200, check=False)
    assert done.returncode == 1
    assert "memplan: a step was to take at most 1 ns, but takes" in done.stderr
    assert "Traceback" not in done.stderr
