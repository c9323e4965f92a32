"""Ranks read files together, each byte once, as long as they do alike; else each its own, and right in any case. Here
they are forks of one process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import numpy as np
import pytest

from memplan.ranks import shared_reads
from memplan.ranks.shared_reads import SharedReads
from memplan.run.memory.disk import DiskReader, Extent
from memplan.units import MIB

RING_BYTES = MIB
SIZE = 8 * MIB + 12_345
"""Several rings of all ranks together."""


@pytest.fixture
def file(tmp_path):
    held = np.random.default_rng(3).integers(0, 256, SIZE, np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(held.tobytes())
    return path, held


def blocks(path, count=9):
    step = SIZE // count
    sizes = [step] * (count - 1) + [SIZE - step * (count - 1)]
    return [Extent(path=str(path), file_offset_bytes=i * step, size_bytes=size) for i, size in enumerate(sizes)]


def right(reader, held, extent):
    room = np.empty(extent.size_bytes, np.uint8)
    reader.read([(extent, room)], "the block", shared=True)
    begin = extent.file_offset_bytes
    return np.array_equal(room, held[begin : begin + extent.size_bytes])


def together(*acts, timeout_s=60.0):
    """Have each act be done in a fork with its reader, all of one ring; return what each has read from the file, how
    it ended, and how long all took.
    """
    ranks = len(acts)
    size = shared_reads._control_bytes(ranks) + ranks * RING_BYTES
    descriptor = os.memfd_create("memplan")
    os.ftruncate(descriptor, size)
    meet, begin = os.pipe()
    children, answers, began = [], [], time.monotonic()
    for place, act in enumerate(acts):
        answer, tell = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                reader = DiskReader()
                reader.share(SharedReads(descriptor, size, place=place, ranks=ranks), 15 * MIB)
                os.close(begin)
                os.write(tell, b"r")
                os.read(meet, 1)  # until all are there
                assert act(reader)
                os.write(tell, str(reader.read_bytes).encode())
                reader.close()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
        os.close(tell)
        assert os.read(answer, 1) == b"r"
        answers.append(answer)
    os.close(begin)
    codes, read = [None] * ranks, []
    while None in codes and time.monotonic() - began < timeout_s:
        time.sleep(0.005)
        for place, child in enumerate(children):
            if codes[place] is None and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[place] = os.waitstatus_to_exitcode(found[1])
    seconds = time.monotonic() - began
    for child, code in zip(children, codes, strict=True):
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    for answer in answers:
        read.append(int(os.read(answer, 20) or 0))
        os.close(answer)
    os.close(meet)
    os.close(descriptor)
    return read, codes, seconds


def reads(file, *passes, pause_s=0.0):
    """Return an act that reads blocks in turn, pass by pass, and says whether all were right."""
    path, held = file

    def act(reader):
        reader.open(blocks(path))
        found = True
        for blocks_of in passes:
            for index in blocks_of:
                time.sleep(pause_s)
                found = right(reader, held, blocks(path)[index]) and found
        return found

    return act


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_all_read_alike_is_read_once(file, ranks):
    passes = range(9), range(8, -1, -1), range(9)
    acts = [reads(file, *passes, pause_s=0.002 * (place == 1)) for place in range(ranks)]
    read, codes, _ = together(*acts)
    assert codes == [0] * ranks
    one, _, _ = together(reads(file, *passes))
    assert sum(read) <= one[0]  # less where the last of a pass are the first of the next
    assert sum(read) >= SIZE


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([[]], id="nothing"),
        pytest.param([range(8, -1, -1)] * 3, id="the other way round"),
        pytest.param([[0, 2, 4, 6, 8]] * 3, id="some"),
        pytest.param([range(9)], id="fewer passes"),
    ],
)
def test_who_does_otherwise_is_not_waited_for(file, other, monkeypatch):
    monkeypatch.setattr(shared_reads, "_PATIENCE_NS", 500_000_000)
    read, codes, seconds = together(reads(file, *[range(9)] * 3), reads(file, *other))
    assert codes == [0, 0]
    assert seconds < 8
    assert sum(read) <= SIZE * (3 + len(other)) + 9 * 8192


def stays(file, count):
    """Return an act that reads some blocks, then nothing for a while, and does not leave."""

    def act(reader):
        done = reads(file, range(count))(reader)
        time.sleep(3)
        return done

    return act


def test_who_stays_behind_is_waited_for_once(file, monkeypatch):
    monkeypatch.setattr(shared_reads, "_PATIENCE_NS", 500_000_000)

    def act(reader):
        began = time.monotonic()
        done = reads(file, *[range(9)] * 4)(reader)
        assert time.monotonic() - began < 2.5  # 0.5 s, and what reading takes
        return done

    _, codes, _ = together(act, stays(file, 2))
    assert codes == [0, 0]


def kills(file, where):
    """Return an act in which this rank is killed in the middle of a read, with the lock in hand, or as it copies."""

    def act(reader):
        ring = reader._shared

        def die(*args):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "reading":
            reader._first = die
        elif where == "with the lock":
            ring._take = die
        else:
            fill = ring._has_come
            ring._has_come = lambda entry: fill(entry) and die()
        return reads(file, *[range(9)] * 3, pause_s=0.003)(reader)

    return act


@pytest.mark.parametrize("where", ["reading", "with the lock", "copying"])
def test_who_is_killed_leaves_no_wait_and_no_wrong_bytes(file, where):
    read, codes, seconds = together(
        reads(file, *[range(9)] * 3, pause_s=0.02 * (where == "reading")), kills(file, where)
    )
    assert codes[0] == 0
    assert codes[1] == -signal.SIGKILL
    assert seconds < 20
    assert read[0] >= SIZE


def test_who_is_stopped_with_the_lock_is_done_without(file, monkeypatch):
    monkeypatch.setattr(shared_reads, "_LOCK_DEADLINE_S", 0.3)

    def stops(reader):
        with reader._shared._locked():
            time.sleep(1.5)
        return True

    def act(reader):
        time.sleep(0.2)
        return reads(file, range(9))(reader) and reader.read_bytes >= SIZE

    _, codes, seconds = together(act, stops)
    assert codes == [0, 0]
    assert seconds < 10


def test_a_read_that_fails_is_an_error_of_who_reads_alone(file):
    path, held = file

    def fails(reader):
        reader.open(blocks(path))
        fetch, count = reader._fetch, [0]

        def once(*args):
            count[0] += 1
            if count[0] == 1:
                raise OSError("the disk is at fault")
            fetch(*args)

        reader._fetch = once
        with contextlib.suppress(Exception):
            right(reader, held, blocks(path)[0])
        assert count[0] >= 1
        return all(right(reader, held, block) for block in blocks(path))

    _, codes, seconds = together(fails, reads(file, range(9), pause_s=0.1))
    assert codes == [0, 0]
    assert seconds < 10
