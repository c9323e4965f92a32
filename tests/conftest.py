"""What holds for every test: who may be skipped, what is left out without a CUDA device, and whose cache is used."""

from __future__ import annotations

import fnmatch
import gc
import os
import signal
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_ALLOWED_SKIPS = Path(__file__).with_name("skips.txt")
_unlisted = pytest.StashKey[dict[str, str]]()


def pytest_configure(config: pytest.Config) -> None:
    # The user's own cache stays as it is. Subprocesses inherit this.
    os.environ.setdefault("MEMPLAN_CACHE", str(_ROOT / ".cache" / "memplan"))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background; children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks at it once, at its first product
    config.stash[_unlisted] = {}
    config.pluginmanager.register(_SkipGuard(config, allowed_skips(_ALLOWED_SKIPS.read_text())), "memplan-skips")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked ``gpu`` where there is no CUDA device: they are not there, so they are not skipped."""
    _thin_out(items, are_picked=any("::" in argument for argument in config.args))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_collection_finish() -> None:
    """What the libraries hold stays to the end: the collector need not look at it again, hundreds of times."""
    gc.collect()
    gc.freeze()


def _thin_out(items: list[pytest.Item], *, are_picked: bool) -> None:
    """Of tests marked ``each_value`` leave the fewest cases to the quick suite that have each value of each parameter
    once.
    """
    cases: dict[str, list[pytest.Function]] = {}
    named: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (quick := item.get_closest_marker("quick")) is not None:
            named.setdefault(item.nodeid.split("[")[0], []).append(item)
            if _case(item) not in quick.args:
                item.add_marker(pytest.mark.full)
        marks = {mark.name for mark in item.iter_markers()}
        if isinstance(item, pytest.Function) and "each_value" in marks and "full" not in marks:
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for name, all_cases in named.items():
        missing = {*all_cases[0].get_closest_marker("quick").args} - {_case(item) for item in all_cases}
        if missing and not are_picked:
            raise ValueError(f"{name} has no such cases as its mark names: {sorted(missing)}")
    for found in cases.values():
        values = {item.nodeid: {(name, repr(value)) for name, value in item.callspec.params.items()} for item in found}
        missing = set().union(*values.values())
        chosen: set[str] = set()
        while missing:
            best = max(values, key=lambda name: len(values[name] & missing))
            missing -= values[best]
            chosen.add(best)
        for item in found:
            if item.nodeid not in chosen:
                item.add_marker(pytest.mark.full)


def _case(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[2].removesuffix("]")


def allowed_skips(text: str) -> tuple[str, ...]:
    """Return the patterns of a skips file. Raises ValueError for a line that gives no reason."""
    patterns = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, _, reason = (part.strip() for part in line.partition("|"))
        if not pattern or not reason:
            raise ValueError(f"skips.txt, line {number}: give a pattern, a bar and a reason, not {line!r}")
        patterns.append(pattern)
    return tuple(patterns)


class _SkipGuard:
    """Fails the run for skips that are not listed. Under xdist the controller sees all reports and judges alone."""

    def __init__(self, config: pytest.Config, allowed: tuple[str, ...]) -> None:
        self._config = config
        self._allowed = allowed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        name = report.nodeid.split("[")[0]
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in self._allowed):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._config.stash[_unlisted][report.nodeid] = reason

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        on_worker = hasattr(session.config, "workerinput")
        if self._config.stash[_unlisted] and not on_worker and session.exitstatus in (0, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        unlisted = self._config.stash[_unlisted]
        if unlisted:
            terminalreporter.section("skips that tests/skips.txt does not list", red=True, bold=True)
            for name, reason in sorted(unlisted.items()):
                terminalreporter.line(f"{name}: {reason}")


def _has_cuda() -> bool:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # torch takes a second or two to say so
        return False
    import torch

    return torch.cuda.is_available()
