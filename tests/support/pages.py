"""Runs the code of a page: its files are written, its Python and its commands run, in order, in one folder.

A block of Python is a file (``<!-- file: NAME -->`` before it), a program of its own (``<!-- run -->``), or lines that
continue what a reader has (``<!-- with: NAME -->``, one of ``BEFORE``). Of ``console`` each line after ``$`` is run;
``bash`` is what no test can do here: installing, and programs of others. Names and sizes are swapped for small ones.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>run|file: [\w.]+|with: \w+) -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_MODEL = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
torch.manual_seed(0)
ids = torch.randint(3, 96, (8, 24), generator=torch.Generator().manual_seed(0))
"""
_TRAINER = f"""{_MODEL}
dataset = [{{"input_ids": row, "labels": row}} for row in ids]
args = TrainingArguments(
    "out", max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True)
"""
_LOOP = f"""{_MODEL}
import memplan
lora = LoraConfig(r=16, target_modules="all-linear")
model = get_peft_model(AutoModelForCausalLM.from_pretrained("path/to/model"), lora).train()
loader = [{{"input_ids": ids[at : at + 2], "labels": ids[at : at + 2]}} for at in (0, 2)]
batch = loader[0]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
"""
_TRL = """
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
rows = Dataset.from_list([{"text": f"a block of weights lies on the device {n}"} for n in range(16)])
config = SFTConfig("out", per_device_train_batch_size=2, max_steps=2, max_length=24, bf16=False, use_cpu=True,
    report_to="none", save_strategy="no")
"""
BEFORE = {
    "trainer": _TRAINER,
    "trl": _TRL,
    "rows": _TRL + "rows = rows.select(range(8))\n",
    "loop": _LOOP,
    "attached": _LOOP + "handle = memplan.attach(model, memplan.plan(model, batch, vram='8GiB'))\n"
    "model(**batch).loss.backward()\n",
    "checkpoint": f"""{_MODEL}
import memplan
lora = {{"rank": 16, "targets": "all-linear"}}
plan = memplan.plan("path/to/model", (2, 24), vram="8GiB", ram="1GiB", adapter=lora)
""",
    "lightning": f"""{_LOOP}
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, index):
        return self.model(**batch).loss
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])
module = Module()
arguments = {{"max_steps": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False}}
loader = torch.utils.data.DataLoader([{{"input_ids": row, "labels": row}} for row in ids], batch_size=2)
""",
}
"""What comes before lines that continue something, by name."""


class Block(NamedTuple):
    """A block of code, and how it is marked."""

    mark: str
    language: str
    text: str


class Ran(NamedTuple):
    """A command of a page, and what it printed."""

    command: str
    output: str


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks, in their order."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(mark=match["mark"] or "", language=match["language"], text=match["text"]) for match in found]


def run(
    page: Path,
    folder: Path,
    swaps: Mapping[str, str],
    *,
    python: str = sys.executable,
    inside: Callable[[list[str]], int] | None = None,
    **environment: str,
) -> list[Ran]:
    """Run all of a page in ``folder``; return what its commands printed. Raises AssertionError where one fails.

    ``swaps``: texts in place of others. ``inside``: runs memplan's own commands in this process, which is quicker.
    """
    where = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **environment}

    def process(command: list[str], what: str) -> Ran:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=where, timeout=600, check=False)
        assert done.returncode == 0, f"{what}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return Ran(what, done.stdout + done.stderr)

    def swapped(text: str) -> str:
        for old, new in swaps.items():
            text = text.replace(old, new)
        return text

    ran = []
    for block in blocks(page):
        text = swapped(block.text)
        kind, _, name = block.mark.partition(": ")
        if kind == "file":
            (folder / name).write_text(text, encoding="utf-8")
        elif block.language == "python":
            assert kind, f"{page.name}: nothing says how this is run:\n{text}"
            before = swapped(BEFORE[name]) if kind == "with" else ""
            ran.append(process([python, "-W", "error::DeprecationWarning:__main__", "-c", before + text], text))
        for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE) if block.language == "console" else ():
            words = shlex.split(line)
            if words[0] == "memplan" and words[1] != "run" and inside is not None:
                assert inside(words[1:]) == 0, line
                ran.append(Ran(line, ""))
                continue
            words = [python if word == "python" else word for word in words]
            ran.append(process([python, "-m", *words] if words[0] == "memplan" else words, line))
    return ran


def docs_script(stem: str) -> ModuleType:
    """Return a script of the documents' folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{stem}", ROOT / "docs" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def tutorial_swaps(model: Path, folder: Path) -> dict[str, str]:
    """Return a small model's name and sizes in place of the tutorial's; all other words stay."""
    return {
        "Qwen/Qwen3-8B": str(model),
        "--seq 512": "--seq 24",
        "max_length=512": "max_length=24",
        "memplan run --vram 7GiB --ram 24GiB": f"memplan run --vram 2800KiB --ram 1GiB --hardware '{folder}/cpu.json'",
    }
