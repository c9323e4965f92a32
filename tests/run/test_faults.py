"""Every failure is an error in the training thread, and afterwards the model can be had back and trained."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading

import pytest
import torch

from memplan.errors import InputError, TransferError
from memplan.run import transfer
from memplan.run.attach import attach
from memplan.run.disk import DiskReader
from tests.run.test_parity import plan_for
from tests.training import assert_equal, assert_only_whole_blocks, make, train

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


def sweep(monkeypatch, tmp_path, target, name, errors):
    """Fail each call of one pass in turn: the error is heard, detach gives the model back, training then is a whole run's."""
    expected = train(make("plain"), "plain", steps=1)
    model = make("plain")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_for(model, "plain", share=0.2)
    failed = at = 0
    heard = set()
    while True:
        at += 1
        threads = threading.active_count()
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
        assert threading.active_count() == threads
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
    assert_equal(train(make("plain"), "plain"), train(model, "plain"))


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
