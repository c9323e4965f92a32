"""Every failure is an error in the training thread, and afterwards the model can be had back and trained."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from memplan.errors import InputError, RunError, TransferError
from memplan.run.attach import attach, attach_on
from memplan.run.handle import handle_of
from memplan.run.memory.disk import DiskReader
from memplan.run.transfer import transfer
from memplan.run.transfer.interrupts import defer_sigint
from tests.run.test_parity import plan_for
from tests.support.leftovers import started_since, threads
from tests.support.training import assert_equal, assert_only_whole_blocks, make, train, whole_run

pytestmark = pytest.mark.timeout(120)


def failing(of, at):
    """Return ``of``, but its call number ``at`` fails as a disk does, and how often it was called."""
    calls = [0]
    lock = threading.Lock()

    def call(*args, **options):
        with lock:
            calls[0] += 1
            now = calls[0]
        if now == at:
            raise OSError(5, "Input/output error")
        return of(*args, **options)

    return call, calls


def sweep(monkeypatch, tmp_path, target, name, errors, **options):
    """Fail each call of one pass in turn: the error is heard, detach gives the model back, training then is a whole
    run's.
    """
    expected = whole_run("plain", steps=1)
    model = make("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, "plain", share=0.2, **options)
    failed = at = 0
    heard = set()
    while True:
        at += 1
        alive = threads()
        handle = attach(model, plan, cache=tmp_path)
        with monkeypatch.context() as patch:
            call, calls = failing(getattr(target, name), at)
            patch.setattr(target, name, call)
            try:
                train(model, "plain", steps=1)
            except errors as error:
                failed += 1
                heard.add("Input/output error" in str(error))
                ended = False
            else:
                ended = calls[0] < at
        try:
            handle.detach()
        except TransferError:  # the last load that was under way failed with nobody left to wait for it
            pass
        assert not started_since(alive)
        assert_only_whole_blocks(tmp_path)
        model.load_state_dict({key: value for key, value in before.items() if "lora" in key}, strict=False)
        model.zero_grad()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        if ended:
            break
    assert heard == {True}
    assert_equal(train(model, "plain", steps=1), expected)
    return failed


def test_each_read_from_the_disk_fails_once(monkeypatch, tmp_path):
    original = DiskReader._piece
    assert sweep(monkeypatch, tmp_path, DiskReader, "_piece", TransferError) >= 2
    assert DiskReader._piece is original


def test_each_copy_from_the_host_fails_once(monkeypatch, tmp_path):
    assert sweep(monkeypatch, tmp_path, transfer, "copy_bytes", OSError) >= 2


def test_each_copy_of_offloaded_activations_fails_once(monkeypatch, tmp_path):
    kept = sweep(monkeypatch, tmp_path, transfer, "copy_bytes", OSError)
    assert sweep(monkeypatch, tmp_path, transfer, "copy_bytes", OSError, offload="all") >= kept + 4


@pytest.mark.full
def test_each_allocation_fails_once(monkeypatch, tmp_path):
    """Of attach and of a pass: an error, and the model is as it was."""
    expected = whole_run("plain", steps=1)
    model = make("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, "plain", share=0.2, offload="all")
    original, at, ended = torch.empty, 0, False
    where, heard = set(), set()
    while not ended:
        at += 1
        calls, handle, alive = 0, None, threads()

        def empty(*args, at=at, **options):
            nonlocal calls
            name = sys._getframe(1).f_globals["__name__"]
            if name.startswith("memplan.run"):
                calls += 1
                if calls == at:
                    where.add(name)
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            try:
                handle = attach(model, plan, cache=tmp_path)
                train(model, "plain", steps=1)
            except RuntimeError as error:
                heard.add("allocate memory" in str(error))
            else:
                ended = calls < at
        if handle is not None:
            handle.detach()
        assert not started_since(alive)
        assert_only_whole_blocks(tmp_path)
        model.load_state_dict({key: value for key, value in before.items() if "lora" in key}, strict=False)
        model.zero_grad()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert heard == {True}
    assert where == {
        "memplan.run.memory.arena",
        "memplan.run.access.dispatched",
        "memplan.run.modules.offloaded_activations",
    }
    assert_equal(train(model, "plain", steps=1), expected)


def test_an_arena_that_cannot_be_had_says_so(tmp_path):
    model = make("plain")
    plan = plan_for(model, "plain", share=0.2)
    arenas = tuple(
        replace(arena, segments=(replace(arena.segments[0], size_bytes=1 << 60),)) if arena.tier == "device" else arena
        for arena in plan.arenas
    )
    with pytest.raises(RunError, match=r"TiB of memory for the plan's blocks could not be had .* smaller budget"):
        attach_on(model, replace(plan, arenas=arenas), torch.device("cpu"), cache=tmp_path)


# ---- Ctrl-C
# -------------------------------------------------------------------------------------------------------------


# One that comes while Python collects garbage is swallowed there, with a warning.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_time(tmp_path):
    """It comes as it would, attach leaves the model as it was, a handle gives it back, and training can go on under
    it.
    """
    expected = whole_run("plain")
    model = make("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, "plain", share=0.1, offload=["layers.0", "layers.1", "layers.2", "layers.4"])
    began = time.perf_counter()
    attach(model, plan, cache=tmp_path).detach()
    attach_s = time.perf_counter() - began
    phases = Counter()
    gc.collect()  # what others left
    for turn in range(120):
        alive, handle, phase = threads(), None, "attach"
        delay_s = attach_s * turn / 40 if turn < 40 else attach_s + 0.0007 * (turn - 40)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(delay_s, 1e-5))
                handle = attach(model, plan, cache=tmp_path, checked=turn % 3 == 0)
                phase = "train"
                train(model, "plain", steps=50)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            phases[phase] += 1
        assert phase == "train" or torch.is_grad_enabled()
        torch.set_grad_enabled(True)  # torch's own optimizers may leave it off: a no_grad is not proof against a Ctrl-C
        handle = handle or handle_of(model)  # it may come between the end of attach and the assignment
        model.load_state_dict({key: value for key, value in before.items() if "lora" in key}, strict=False)
        model.zero_grad()
        if handle is not None:
            if turn % 2:
                assert_equal(train(model, "plain"), expected)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0001 * (turn % 7 + 1))
                handle.detach()
                time.sleep(0.01)
            except KeyboardInterrupt:
                phases["detach"] += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            handle.detach()  # it may have come before that one had begun
            model.load_state_dict({key: value for key, value in before.items() if "lora" in key}, strict=False)
            model.zero_grad()
        assert torch.is_grad_enabled()
        assert not started_since(alive)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert_only_whole_blocks(tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert min(phases[phase] for phase in ("attach", "train", "detach")) >= 3, phases
    assert_equal(train(model, "plain"), expected)


@pytest.fixture(autouse=True)
def alarm():
    """An alarm presses Ctrl-C: a real signal, at any bytecode of the main thread."""

    def press(*_):
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, press)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_hooks_that_stayed_hand_on_what_they_get_and_are_dropped(tmp_path, monkeypatch):
    """As after a Ctrl-C in the moment in which they come off."""
    expected = whole_run("plain", steps=1)
    model = make("plain")
    handle = attach(model, plan_for(model, "plain", share=0.2, offload="all"), cache=tmp_path, checked=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch._C._autograd, "_pop_saved_tensors_default_hooks", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, "plain", steps=1)
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(True) is not None
    assert_equal(train(make("plain"), "plain", steps=1), expected)
    model.load_state_dict(make("plain").state_dict())
    model.zero_grad()
    assert_equal(train(model, "plain", steps=1), expected)
    assert top(True) is None
    handle.detach()


def test_a_second_ctrl_c_does_not_wait():
    reached = []

    def pressed():
        with defer_sigint():
            for turn in range(2):
                signal.raise_signal(signal.SIGINT)
                reached.append(turn)

    with pytest.raises(KeyboardInterrupt):
        pressed()
    assert reached == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- the end of the process ------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from memplan.run.attach import attach, attach_on
from memplan.program.schema import Plan
from tests.support.training import make, train, loss_of, batch_of
model = make("plain")
handle = attach(model, Plan.load(sys.argv[1]), cache=sys.argv[2])
train(model, "plain", steps=1)
loss = loss_of(model(**batch_of("plain")))
{end}
"""


@pytest.mark.parametrize(("end", "code"), [pytest.param("", 0, marks=pytest.mark.full), ("raise ValueError", 1)])
def test_the_interpreter_ends_while_attached(end, code, tmp_path):
    """In mid-step, loads under way, no detach: it ends, with its own code and nothing said."""
    plan_for(make("plain"), "plain", share=0.2, offload="all").save(tmp_path / "plan.json")
    command = [sys.executable, "-c", SCRIPT.format(end=end), str(tmp_path / "plan.json"), str(tmp_path / "cache")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == code, done.stderr
    for word in ("memplan/run", "Fatal", "Exception ignored"):
        assert word not in done.stderr
    assert_only_whole_blocks(tmp_path / "cache")


def test_a_disk_that_fills_while_blocks_are_packed(monkeypatch, tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = make("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, "plain", share=0.2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"layers\.\d.* No space left on device; free some room"):
            attach(model, plan, cache=tmp_path)
    assert_only_whole_blocks(tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_equal(whole_run("plain"), train(model, "plain"))


def test_a_load_that_hangs_is_heard(monkeypatch, tmp_path):
    model = make("plain")
    release = threading.Event()
    original = transfer.copy_bytes
    handle = attach(model, plan_for(model, "plain", share=0.2), cache=tmp_path)
    train(model, "plain", steps=1)
    monkeypatch.setattr(transfer, "DEADLINE_S", 0.2)
    monkeypatch.setattr(transfer, "copy_bytes", lambda *args: (release.wait(60), original(*args)))
    with pytest.raises(TransferError, match=r"has not come within 0\.2 s"):
        train(model, "plain", steps=2)
    release.set()
    handle.detach()
    assert_equal(train(model, "plain"), train(trained_once(), "plain"))


def test_what_comes_too_late_is_waited_for_before_anything_else_is_loaded(monkeypatch, tmp_path):
    """Else it would write to a slot that another block has come into since."""
    model, seen, release = make("plain"), [], threading.Event()
    copy, load = transfer.copy_bytes, transfer.CpuTransfers.load
    with attach(model, plan_for(model, "plain", share=0.2), cache=tmp_path):
        train(model, "plain", steps=1)

        def late(*args):
            release.wait(60)
            copy(*args)
            seen.append("written")

        with monkeypatch.context() as patch:
            patch.setattr(transfer, "DEADLINE_S", 0.2)
            patch.setattr(transfer, "copy_bytes", late)
            with pytest.raises(TransferError, match=r"has not come within 0\.2 s"):
                train(model, "plain", steps=2)
        monkeypatch.setattr(transfer.CpuTransfers, "load", lambda *args: (seen.append("loaded"), load(*args))[1])
        threading.Timer(0.3, release.set).start()
        assert_equal(train(model, "plain"), train(trained_once(), "plain"))
    assert "loaded" in seen
    assert seen[0] == "written"
    assert "written" not in seen[seen.index("loaded") :]


def trained_once():
    model = make("plain")
    train(model, "plain", steps=1)
    return model


def test_a_forked_process_takes_nothing_away(tmp_path):
    """A data loader's worker, or a fork of one's own: when it ends, training stays as it is."""
    whole, model = make("plain"), make("plain")
    plan = plan_for(model, "plain", share=0.2)
    with attach(model, plan, cache=tmp_path) as handle:
        train(whole, "plain", steps=1)
        train(model, "plain", steps=1)
        child = os.fork()
        if child == 0:
            try:
                del handle, model
                gc.collect()
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert_equal(train(whole, "plain"), train(model, "plain"))


def test_a_killed_process_leaves_no_files(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            model = make("plain")
            attach(model, plan_for(model, "plain", share=0.2), cache=tmp_path)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert_only_whole_blocks(tmp_path)
