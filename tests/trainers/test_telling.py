"""What memplan measures, where the trainer logs: nothing else changes."""

from __future__ import annotations

import re

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from msgspec.structs import replace
from transformers import TrainerCallback

import memplan
from memplan.program.record import RunRecord
from memplan.run.verify.scalars import Scalars
from memplan.show.glyphs import PLAIN
from memplan.show.log_lines import begin_lines, end_lines, step_line
from memplan.trainers.lightning import Placement
from memplan.units import MIB, format_bytes
from tests.show.plans import make_record, solve_plan
from tests.support.training import CPU
from tests.trainers.test_transformers import Rows, budget, build, checkpoint, finish  # noqa: F401

NAMES = {"memplan/pass_s", "memplan/stall_share", "memplan/loaded_gib_per_s"}


class Seen(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.full
def test_scalars_are_logged_and_lines_said(checkpoint, tmp_path, capsys):  # noqa: F811
    whole = finish(build(checkpoint, tmp_path / "whole"), tmp_path / "whole")
    vram = budget(checkpoint, tmp_path / "budget")
    trainer = build(checkpoint, tmp_path / "told")
    seen = Seen()
    trainer.add_callback(seen)
    memplan.wrap(trainer, vram=vram, ram="1GiB", hardware=CPU, log=True, lines=True)
    capsys.readouterr()
    assert finish(trainer, tmp_path / "told") == whole
    told = [logs for logs in seen.logs if "loss" in logs]
    assert len(told) == 4
    assert all(logs.keys() >= NAMES for logs in told)
    assert all(0 <= logs["memplan/stall_share"] <= 1 for logs in told)
    assert all(logs["memplan/loaded_gib_per_s"] > 0 for logs in told[1:])
    lines = re.findall(r"^memplan: step (\d): pass .*, waiting .*%, loading .*/s$", capsys.readouterr().err, re.M)
    assert lines == ["1", "2", "3", "4"]


def record(**fields):
    names = ("loads", "misses", "out_of_order", "offloaded_bytes", "offload_skipped", "recoveries", "ram_peak_bytes")
    empty = dict.fromkeys(names, 0) | {"pass_s": 0.0, "stall_s": 0.0, "vram_peak_bytes": 0, "blocks": ()}
    return RunRecord(schema_version=1, fingerprint="", device="cpu", **(empty | fields))


def test_scalars_are_of_what_came_since():
    scalars = Scalars()
    assert scalars.take(record(passes=2, wall_s=4.0, loaded_bytes=1 << 32)) == {
        "memplan/pass_s": 2.0, "memplan/stall_share": 0.0, "memplan/loaded_gib_per_s": 1.0,
    }  # fmt: skip
    found = scalars.take(record(passes=4, wall_s=5.0, loaded_bytes=3 << 32, vram_peak_bytes=1 << 30))
    assert found["memplan/pass_s"] == 0.5
    assert found["memplan/loaded_gib_per_s"] == 8.0
    assert found["memplan/vram_peak_gib"] == 1.0
    again = scalars.take(record(passes=1, wall_s=1.0, loaded_bytes=0))  # out of memory: a smaller plan, a new record
    assert again["memplan/pass_s"] == 1.0
    assert scalars.take(record(passes=1, wall_s=1.0, loaded_bytes=0))["memplan/stall_share"] == 0.0


def test_four_lines_begin_and_four_end_a_training():
    plan = solve_plan()
    peaks, budgets, said = plan.prediction.peaks, plan.budgets, plan.prediction
    begun = begin_lines(plan)
    assert len(begun) == 4
    assert f"{format_bytes(peaks.vram_bytes)} of {format_bytes(budgets.vram_bytes)} vram" in begun[1]
    assert f"{PLAIN.seconds(said.step_s)} per step, " in begun[2]
    assert f"{format_bytes(said.loaded_bytes_per_pass)} loaded per micro-batch" in begun[3]
    measured = make_record(plan, pass_s=1.2, extra_bytes=5 << 20)
    vram, reserved = (
        size + said.vram_parts["context"] for size in (measured.vram_peak_bytes, measured.vram_reserved_bytes)
    )
    ended = end_lines(plan, measured, "report.txt")
    assert len(ended) == 4 + (vram > budgets.vram_bytes)
    assert f", {format_bytes(reserved)} reserved by torch, ram peak" in ended[2]
    assert ended[1].startswith(f"micro-batch 1.20 s (predicted {PLAIN.seconds(said.pass_s)}, ")
    assert f"vram peak {format_bytes(vram)} of {format_bytes(budgets.vram_bytes)}" in ended[2]
    assert ended[-1].endswith("the report is in report.txt.")
    assert end_lines(plan, measured, None)[-1].endswith("add --report FILE.")
    scalars = {"memplan/pass_s": 1.5, "memplan/stall_share": 0.25, "memplan/loaded_gib_per_s": 2.0}
    assert step_line(7, scalars) == "step 7: micro-batch 1.50 s, waiting 25.0%, loading 2.00 GiB/s"
    scalars |= {"memplan/vram_peak_gib": 3.0, "memplan/vram_reserved_gib": 4.0}
    assert step_line(7, scalars).endswith(", vram peak 3.00 GiB, reserved 4.00 GiB")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning asks torch by an old name
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training:UserWarning")
def test_lightning_logs_them_too(checkpoint, tmp_path):  # noqa: F811
    """Beside the module's own, and the losses are those of a whole run."""

    def fitted(**options):
        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = build(checkpoint, tmp_path).model
                self.losses = []

            def on_train_start(self):
                self.train()

            def training_step(self, batch, index):
                loss = self.model(**batch).loss
                self.losses.append(loss.item())
                return loss

            def configure_optimizers(self):
                return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

        module, callback = Module(), Placement(**options) if options else None
        trainer = lightning.Trainer(
            max_steps=3, accelerator="cpu", logger=CSVLogger(tmp_path), log_every_n_steps=1, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False, callbacks=[callback] if callback else [],
        )  # fmt: skip
        torch.manual_seed(3)
        trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=2))
        return module.losses, trainer.logged_metrics

    whole, _ = fitted()
    losses, logged = fitted(vram=budget(checkpoint, tmp_path), ram="1GiB", hardware=CPU, log=True)
    assert losses == whole
    assert logged.keys() >= NAMES


def test_what_is_reserved_beyond_vram_and_margin_is_told():
    plan = solve_plan()
    for margin, told in ((0, 3 * MIB), (2 * MIB, MIB), (3 * MIB, 0)):
        budgets = replace(plan.budgets, margin_bytes=margin)
        context = plan.prediction.vram_parts["context"]
        record = make_record(plan, pass_s=1.2, vram_reserved_bytes=budgets.vram_bytes + 3 * MIB - context)
        lines = [line for line in end_lines(replace(plan, budgets=budgets), record, None) if "fragmentation" in line]
        assert len(lines) == bool(told)
        assert not told or f"torch reserved {format_bytes(told)} beyond it" in lines[0]
