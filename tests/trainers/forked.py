"""Runs scripts as they stand, many from one Python that has imported the libraries once, which takes longer than they
do.

``python -m tests.trainers.forked`` reads jobs from its standard input, one JSON object a line, runs each in a fork, and
answers with its exit code. What goes backward in a script is told to the last bit: its losses.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "peft.peft_model",
    "transformers.trainer",
    "transformers.trainer_seq2seq",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "accelerate",
    "datasets",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.reward_trainer",
)


class Forked:
    """Such a Python. ``before``: what its command begins with."""

    def __init__(self, folder: Path, *before: str, libraries: tuple[str, ...] = LIBRARIES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = 0
        self._log = (folder / "log.txt").open("w")
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.trainers.forked", *libraries],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=clean(), cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip

    def run(
        self, script: Path, *arguments: object, timeout_s: float = 200, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script. Raises TimeoutError, and ends all, where it takes longer."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{kind}" for kind in ("out", "err"))
        argv = [str(script), *map(str, arguments)]
        job = {"argv": argv, "out": str(out), "err": str(err), "environment": environment}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        answer = self._process.stdout.readline() if ready else ""
        if not answer:
            self.close()
            raise TimeoutError(f"{argv}: {(self._folder / 'log.txt').read_text()[-2000:]}{err.read_text()[-2000:]}")
        return subprocess.CompletedProcess(argv, int(answer), out.read_text(), err.read_text())

    def close(self) -> None:
        """End it, and a script that it still runs."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


def clean(path: str = "") -> dict[str, str]:
    """Return an environment in which a script finds memplan, and one thread."""
    paths = filter(None, [str(ROOT), path, os.environ.get("PYTHONPATH", "")])
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed}


def tell_losses() -> None:
    """Print what goes backward."""
    import torch

    backward = torch.Tensor.backward

    def told(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if not sys._getframe(1).f_globals["__name__"].startswith("memplan"):  # a trace
            print("loss", tensor.item().hex(), flush=True)
        backward(tensor, *args, **kwargs)

    torch.Tensor.backward = told  # type: ignore[method-assign]


def run_as_child(job: dict[str, Any]) -> NoReturn:
    """Become the script."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking apart all that was imported takes longer than most scripts


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    tell_losses()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_as_child(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
