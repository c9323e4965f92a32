"""A part, from its checkpoint to its rows: contenders in turn, round by round."""

from __future__ import annotations

import importlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.versus.contenders import CARD, PLANNED
from benchmarks.versus.parts import Part
from benchmarks.versus.training import Setting
from benchmarks.versus.worker import Worker, WorkerError

OVER_BOUND = 0.03
"""A row farther than this from its bound is looked at with torch's profiler, where that is asked for."""
PROFILE_SHARE = 1 / 6
"""Of a part's time that is left for that."""
NO_TURN = "had no turn before the part's time was over"


class Rounds:
    """The contenders of a part and what came of each."""

    def __init__(self, part: Part, folder: Path) -> None:
        """``folder``: for checkpoints, which stay there, and everything else, which goes."""
        self.part = part
        self.folder = folder
        self.began = time.monotonic()
        self.names = list(part.contenders)
        self.rows: dict[str, dict[str, Any]] = {name: {"contender": name} for name in self.names}
        self.gradients: dict[str, dict[str, np.ndarray]] = {}
        self._workers: dict[str, Worker] = {}
        self._times: dict[str, list[list[float]]] = {}
        """Seconds of each step, by contender and round."""

    # ---- the whole
    # -----------------------------------------------------------------------------------------------------

    def run(self, *, profile: bool) -> dict[str, Any]:
        """Return the part's result. A contender that fails has a row with its error; what it began has ended."""
        found: dict[str, Any] = {}
        try:
            found |= self._prepare()
            spare_s = self.part.seconds * PROFILE_SHARE if profile else 0.0
            for turn in range(self.part.rounds):
                # Each begins a round once: what the machine does meanwhile falls on all of them.
                order = self.names[turn % len(self.names) :] + self.names[: turn % len(self.names)]
                for name in order:
                    if self._left_s() > spare_s:
                        self._turn(name)
            if profile:
                self._look_closer()
        finally:
            for worker in self._workers.values():
                worker.close()
            shutil.rmtree(self.folder / "plans", ignore_errors=True)
        return {**self._described(), **found, "rows": self._finished()}

    def _prepare(self) -> dict[str, Any]:
        """Write the checkpoint where it is not there yet; time the whole model; make the plans."""
        done = self._setting("checkpoint").checkpoint / "complete"
        found: dict[str, Any] = {}
        if not done.is_file():
            try:
                self._alone("checkpoint", "checkpoint")
            except WorkerError as error:
                for name in self.names:
                    self._drop(name, f"no checkpoint could be made: {error}")
                return found
            done.touch()
        whole_s = None
        if "whole" in self.names:
            self._turn("whole")  # round zero: the times of its steps are for the plans alone
            times = self._times.pop("whole", None)
            whole_s = statistics.median(times[0]) if times else None
        planned = tuple(name for name in self.names if name in (*PLANNED, *CARD))
        if planned:
            try:
                found = self._alone("plans", "plans", planned, whole_s)
            except WorkerError as error:
                found = {"plan_errors": dict.fromkeys(planned, str(error))}
            for name, error in found.pop("plan_errors").items():
                self._drop(name, error)
        return found

    def _alone(self, name: str, what: str, *args: Any) -> Any:
        """Have a process of its own do one thing."""
        worker = Worker(name, self._setting(name))
        try:
            return worker.ask(what, *args, seconds=self._patience_s())
        finally:
            worker.close()

    # ---- one contender
    # ---------------------------------------------------------------------------------------------------

    def _turn(self, name: str) -> None:
        """Have a contender train its steps of a round; drop it where it cannot."""
        row = self.rows[name]
        if "error" in row:
            return
        try:
            worker = self._workers.get(name)
            if worker is None:
                worker = self._workers[name] = Worker(name, self._setting(name))
                row |= worker.ask("begin", seconds=self._patience_s())
                first = worker.ask("first", seconds=self._patience_s())
                if name not in self.gradients:
                    row |= first
                    self.gradients[name] = _read(worker.ask("gradients", seconds=self._patience_s()))
            times = worker.ask("train", self.part.steps, seconds=self._patience_s())
            self._times.setdefault(name, []).append(times)
            row |= worker.ask("figures", seconds=self._patience_s())
            if not self._stay():
                self._close(name)
        except WorkerError as error:
            self._drop(name, str(error))
        print(
            f"{self.part.name} {name} {row.get('error', self._times.get(name, [[]])[-1])}", file=sys.stderr, flush=True
        )

    def _look_closer(self) -> None:
        for name in self.names:
            row = self.rows[name]
            if "error" in row or row.get("over_bound") is None or row["over_bound"] <= OVER_BOUND:
                continue
            if self._left_s() <= 0:
                row["profile"] = {"error": "no time was left for it"}
                continue
            try:
                worker = self._workers.get(name)
                if worker is None:
                    worker = self._workers[name] = Worker(name, self._setting(name))
                    worker.ask("begin", seconds=self._patience_s())
                    worker.ask("first", seconds=self._patience_s())
                row["profile"] = worker.ask("profile", seconds=self._patience_s())
            except WorkerError as error:
                row["profile"] = {"error": str(error)}
            if not self._stay():
                self._close(name)

    def _drop(self, name: str, error: str) -> None:
        self.rows[name]["error"] = error
        self._close(name)

    def _close(self, name: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            worker.close()

    def _stay(self) -> bool:
        """Whether contenders wait for their next round: on the CPU; a card holds one at a time."""
        return self.part.device == "cpu"

    # ---- what is needed for it
    # -------------------------------------------------------------------------------------------

    def _setting(self, name: str) -> Setting:
        part = self.part
        plans = self.folder / "plans"
        plans.mkdir(parents=True, exist_ok=True)
        return Setting(
            model=part.model, shape=part.shape, checkpoint=self.folder / part.model.name, plans=plans,
            scratch=self.folder / f"{name}.scratch", device=part.device, checkpointing=part.checkpointing,
            card_bytes=None if part.card_gib is None else part.card_gib << 30,
        )  # fmt: skip

    def _left_s(self) -> float:
        return self.part.seconds - (time.monotonic() - self.began)

    def _patience_s(self) -> float:
        """Return how long one answer may take: what is left of the part, shared by two; once that is gone, a little."""
        return max(20.0, self._left_s() / 2)

    # ---- what came of it
    # ---------------------------------------------------------------------------------------------------

    def _described(self) -> dict[str, Any]:
        part = self.part
        return {
            "part": part.name,
            "device": part.device,
            "model": part.model.name,
            "shape": part.shape,
            "tokens": part.tokens,
            "dtype": part.model.dtype,
            "card_gib": part.card_gib,
            "peers_checkpointing": part.checkpointing,
            "steps_of_a_round": part.steps,
            "took_s": time.monotonic() - self.began,
            "load": os.getloadavg()[0],
        }

    def _finished(self) -> list[dict[str, Any]]:
        """Return the rows with what follows from the whole model's beside them."""
        whole = self._times.get("whole", [])
        losses = self.rows.get("whole", {}).get("losses")
        for name, row in self.rows.items():
            times = self._times.get(name)
            if "error" in row or not times:
                row.setdefault("error", NO_TURN)
                continue
            step_s = statistics.median(time_s for turn in times for time_s in turn)
            row |= {"rounds": len(times), "step_s": step_s, "tokens_per_s": self.part.tokens / step_s}
            pairs = list(zip(times, whole, strict=False))
            if pairs:
                row["of_whole"] = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
            if row.get("bound_s"):
                row["over_bound"] = step_s / row["bound_s"] - 1
            if losses is not None:
                count = min(len(losses), len(row["losses"]))
                row["losses_equal"] = losses[:count] == row["losses"][:count]
                row["losses_compared"] = count
            if "whole" in self.gradients and name in self.gradients:
                row |= compare(self.gradients["whole"], self.gradients[name])
        return list(self.rows.values())


def compare(whole: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return how far gradients are from those of the whole model: the greatest difference beside the greatest gradient.

    A gradient that is missing counts as zeros.
    """
    greatest = max(float(np.abs(one).max()) for one in whole.values())
    off = 0.0
    equal = whole.keys() == other.keys()
    for name, one in whole.items():
        two = other.get(name)
        difference = np.abs(one if two is None else one - two).max()
        off = max(off, float(difference) if np.isfinite(difference) else float("inf"))
        equal = equal and two is not None and one.tobytes() == two.tobytes()
    return {"gradient_error": off / greatest, "gradients_equal": equal}


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def import_all(names: Sequence[str]) -> None:
    """Import what contenders on the CPU use, once for all that are forked."""
    used = ["accelerate", "peft", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
    used += [f"transformers.models.{kind}.modeling_{kind}" for kind in ("mixtral", "t5")]
    used += [
        f"memplan.{name}"
        for name in ("analyze.inputs.prepare", "analyze.blocks.measure", "analyze.trace.trace", "place.solve")
    ]
    used += ["memplan.trainers.loading.load", "benchmarks.versus.planning"]
    used += ["diffusers.hooks"] if "diffusers-group" in names else []
    for name in used:
        importlib.import_module(name)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
