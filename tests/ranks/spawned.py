"""Runs a script in several processes that are ranks of each other, from one Python that has imported the libraries
once.

``python -m tests.ranks.spawned`` reads jobs as ``tests.trainers.forked`` does, forks one process a rank for each, and
answers with their exit codes and how long each took after the first had ended. As torchrun does, it ends the others
once one has failed, unless ``alone`` is asked for.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.trainers.forked import LIBRARIES, ROOT, clean, tell_losses


@dataclass(frozen=True)
class Ran:
    """What became of each rank."""

    codes: list[int]
    seconds: list[float]
    """When each ended, from the beginning."""
    stdout: list[str]
    stderr: list[str]


class Spawned:
    """Such a Python. ``before``: what its command begins with."""

    def __init__(self, folder: Path, *before: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0
        self._log = (folder / "log.txt").open("w")
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.ranks.spawned"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=clean(), cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip

    def run(
        self,
        script: Path,
        *arguments: object,
        ranks: int = 2,
        timeout_s: float = 90,
        alone: bool = False,
        nodes: Nodes | None = None,
        **env: str,
    ) -> Ran:
        """Run a script; with ``nodes`` each rank on one of them. Raises TimeoutError, and ends all, where it takes
        longer.
        """
        self._count += 1
        base = str(self._folder / str(self._count))
        argv = [str(script), *map(str, arguments)]
        job = {"argv": argv, "base": base, "environment": env, "ranks": ranks, "alone": alone, "timeout_s": timeout_s}
        job |= {"networks": [], "address": "127.0.0.1"}
        if nodes is not None:
            job |= {"networks": nodes.networks, "address": nodes.address}
            job["environment"] = env | {"GLOO_SOCKET_IFNAME": nodes.link}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s + 60)
        answer = self._process.stdout.readline() if ready else ""
        read = [[Path(f"{base}.{rank}.{kind}") for rank in range(ranks)] for kind in ("out", "err")]
        texts = [[file.read_text() if file.exists() else "" for file in files] for files in read]
        if not answer:
            self.close()
            raise TimeoutError(f"{argv}: {(self._folder / 'log.txt').read_text()[-2000:]}{texts[1]}")
        codes, seconds = json.loads(answer)
        if None in codes:
            raise TimeoutError(f"{argv}: {codes} {[text[-3000:] for text in texts[1]]}")
        return Ran(codes, seconds, *texts)

    def close(self) -> None:
        """End it, and what it still runs."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._log.close()


@dataclass(frozen=True)
class Nodes:
    """Network namespaces that are joined by a link, which has the same name in each. ``address``: of the first."""

    networks: list[str]
    link: str
    address: str


def _enter(network: str) -> None:
    """Be in a network namespace, and the first process of a process namespace: a fork is, and this one waits for it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{network}", os.O_RDONLY)
    if libc.setns(descriptor, _NEW_NETWORK) or libc.unshare(_NEW_PROCESSES):
        raise OSError(ctypes.get_errno(), "no namespaces")
    os.close(descriptor)
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os._exit(1 if os.waitpid(child, 0)[1] else 0)
    libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL)


_NEW_NETWORK, _NEW_PROCESSES = 0x40000000, 0x20000000
_DIES_WITH_PARENT = 1


def _become(job: dict[str, Any], rank: int, environment: dict[str, str]) -> NoReturn:
    """Become the script on one rank."""
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{job['base']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    if job["networks"]:
        _enter(job["networks"][rank])
    os.environ.update(environment)
    sys.argv = job["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _ranks(job: dict[str, Any]) -> tuple[list[int | None], list[float]]:
    size, began = job["ranks"], time.monotonic()
    port = _port()
    children = []
    for rank in range(size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        env = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": job["address"]} | job["environment"]
        child = os.fork()
        if child == 0:
            _become(job, rank, env)
        children.append(child)
    codes: list[int | None] = [None] * size
    seconds = [0.0] * size
    ended = False
    while None in codes and time.monotonic() - began < job["timeout_s"]:
        time.sleep(0.02)
        for rank, child in enumerate(children):
            if codes[rank] is None and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                seconds[rank] = time.monotonic() - began
        if any(codes) and not job["alone"] and not ended:
            ended = True
            time.sleep(1)  # as torchrun's agent looks now and then
            for rank, child in enumerate(children):
                if codes[rank] is None:
                    os.kill(child, signal.SIGTERM)
    for rank, child in enumerate(children):
        if codes[rank] is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return codes, seconds


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    tell_losses()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(_ranks(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
