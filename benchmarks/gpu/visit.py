"""What the parts of a visit share: models, lengths and cards, the checkpoints' folder, and rows that outlive a limit.

``GPU_DRY=cpu`` has every part run through on a CPU with tiny shapes: what is measured then means nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.versus.models import Model, known, small, write_checkpoint
from benchmarks.versus.training import Setting

DRY = os.environ.get("GPU_DRY") == "cpu"
DEVICE = "cpu" if DRY else "cuda"
LENGTHS = (64, 32) if DRY else (2048, 512)
CARDS_GIB = (8, 12, 4)
"""The one that the peers meet first."""
DRY_SHARES = {8: 0.6, 12: 0.9, 4: 0.02}
"""Dry, a card of so many GiB has this share of what the whole model takes; the last must not fit."""
AGAIN = 75
"""Exit code of a part whose time was over before all rows had a turn: it is run again (EX_TEMPFAIL)."""
STATE = Path(os.environ.get("GPU_STATE", ".gpu-dry" if DRY else ".gpu"))


def model_of(kind: str) -> Model:
    """Return the model of ``bf16`` or ``nf4``."""
    if not DRY:
        return known("llama-3.1-8b", nf4=kind == "nf4")
    tiny = small("llama", width=128, layers=4)
    return Model(name=f"dry-{kind}", config=tiny.config, dtype="bfloat16", nf4=kind == "nf4")


def folder() -> Path:
    """Return the folder of checkpoints and plans."""
    found = Path(os.environ.get("CHECKPOINTS", STATE / "checkpoints"))
    found.mkdir(parents=True, exist_ok=True)
    return found


def checkpoint_of(model: Model) -> tuple[Path, float | None]:
    """Return the folder of a model's checkpoint, written now where it is not there, and the seconds that took."""
    path = folder() / model.name
    if (path / "complete").is_file():
        return path, None
    began = time.perf_counter()
    write_checkpoint(model, path, torch.device(DEVICE))
    (path / "complete").touch()
    return path, time.perf_counter() - began


def setting_of(model: Model, tokens: int, name: str, card_bytes: int | None = None) -> Setting:
    """Return what a run of ``name`` needs. All but memplan recompute every layer."""
    plans, scratch = folder() / "plans", folder() / f"{name}.scratch"
    plans.mkdir(exist_ok=True)
    scratch.mkdir(exist_ok=True)
    return Setting(
        model=model, shape=(1, tokens), checkpoint=folder() / model.name, plans=plans, scratch=scratch, device=DEVICE,
        checkpointing=True, card_bytes=card_bytes,
    )  # fmt: skip


def plan_name(model: Model, tokens: int, gib: int) -> str:
    return f"memplan-{model.name}-{tokens}-{gib}"


class Rows:
    """The rows of a part, printed as JSON whenever one is there: what a limit cuts short keeps those before it."""

    def __init__(self, part: str, seconds: float, **about: Any) -> None:
        """Begin with the rows of an earlier call with this code, where it had no turn for all."""
        self.part = part
        self.about: dict[str, Any] = {"dry": DRY, **about}
        self.rows: dict[str, dict[str, Any]] = {}
        self.untried: list[str] = []
        self._ends = time.monotonic() + seconds
        self._longest_s = 0.0
        kept = STATE / f"{part}.json"
        if kept.is_file():
            before = json.loads(kept.read_text())
            if before.get("commit") == commit() and before.get("result"):
                self.rows = {row["row"]: row for row in before["result"]["rows"]}

    def left_s(self) -> float:
        return self._ends - time.monotonic()

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[dict[str, Any] | None]:
        """A row to fill, or None where it is there or no time is left. What fails is the row's ``error``."""
        if name in self.rows:
            yield None
            return
        if self.left_s() < max(2.0, self._longest_s):
            self.untried.append(name)
            yield None
            return
        row: dict[str, Any] = {"row": name}
        began = time.monotonic()
        try:
            yield row
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            row["error"] = f"{type(error).__name__}: {lines[0]}"[:400]
        row["took_s"] = time.monotonic() - began
        self._longest_s = max(self._longest_s, row["took_s"])
        self.rows[name] = row
        print(json.dumps(self.result()), flush=True)

    def result(self, *, ended: bool = False) -> dict[str, Any]:
        return {**self.about, "rows": list(self.rows.values()), "untried": self.untried, "ended": ended}

    def end(self) -> int:
        """Print the whole; return the exit code: 75 where rows had no turn, 1 where all failed."""
        print(json.dumps(self.result(ended=True)), flush=True)
        if self.untried:
            return AGAIN
        return int(bool(self.rows) and all("error" in row for row in self.rows.values()))


def commit() -> str:
    from benchmarks.about import about

    return str(about()["commit"])
