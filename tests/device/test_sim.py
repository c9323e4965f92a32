"""The simulated device itself: what it computes is the CPU's, what it forgives is no more than a GPU would."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.device import backend
from tests.device.backend import peek, pending, present, waits
from tests.device.build import build
from tests.support import devices
from tests.support.training import assert_equal, make, train

ROOT = Path(__file__).parents[2]


def model_of(kind, attention):
    model = make(kind)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("t5", marks=pytest.mark.full), pytest.param("gpt2", marks=pytest.mark.full)]
)
def test_training_is_the_cpus_to_the_bit(kind, attention, policy):
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is not what a device without one takes
        whole = train(model_of(kind, attention), kind, steps=2)
        run = train(model_of(kind, attention).to("sim"), kind, steps=2, batches=devices.Apart("sim").batches)
    assert backend.operators_waited() == {}
    assert_equal(whole, devices.at_home(run))


def test_nothing_runs_before_somebody_waits(lazy):
    x = torch.ones(3, device="sim")
    y = x + 1
    assert pending() > 0
    assert not (peek(y) == 2).any()
    assert y.tolist() == [2, 2, 2]
    assert waits() == {"stream": 0, "event": 0, "device": 0, "copy": 1, "value": 0}


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_compute_that_does_not_wait_for_a_copy(is_waited_for, policy):
    """The copy comes too late where compute goes first; where copies go first the bug is not seen."""
    host = torch.full((4,), 7.0).pin_memory()
    slot = torch.zeros(4, device="sim")
    copies, loaded = torch.Stream("sim"), torch.Event("sim")
    copies.wait_stream(torch.sim.current_stream())
    with copies:
        slot.copy_(host, non_blocking=True)
    loaded.record(copies)
    if is_waited_for:
        loaded.wait()
    read = slot * 2
    right = is_waited_for or policy == "copies first"
    assert read.tolist() == [14.0 if right else 0.0] * 4


@pytest.mark.parametrize("is_waited_for", [True, False])
def test_a_copy_that_does_not_wait_for_compute(is_waited_for, policy):
    """A slot that is overwritten while it is still to be read: seen where copies go first."""
    host = torch.full((4,), 7.0).pin_memory()
    slot = torch.full((4,), 3.0, device="sim")
    torch.sim.synchronize()
    read = slot * 2
    copies, free = torch.Stream("sim"), torch.Event("sim")
    free.record()
    if is_waited_for:
        free.wait(copies)
    with copies:
        slot.copy_(host, non_blocking=True)
    right = is_waited_for or policy == "compute first"
    assert read.tolist() == [6.0 if right else 14.0] * 4


@pytest.mark.parametrize("is_recorded", [True, False])
def test_memory_that_is_freed_under_a_copy(is_recorded, policy):
    """It is its own stream's again at once, unless the copy's stream was recorded."""
    there = torch.full((4,), 5.0, device="sim")
    home = torch.zeros(4).pin_memory()
    copies = torch.Stream("sim")
    copies.wait_stream(torch.sim.current_stream())
    with copies:
        home.copy_(there, non_blocking=True)
    if is_recorded:
        there.record_stream(copies)
    del there
    other = torch.full((4,), 1.0, device="sim")
    torch.sim.current_stream().synchronize()
    copies.synchronize()
    assert other.tolist() == [1.0] * 4
    right = is_recorded or policy == "copies first"
    assert (home.tolist() == [5.0] * 4) == right


def test_who_reads_page_locked_memory_waits_for_the_copy():
    with present("compute first"):
        there, home = torch.full((4,), 5.0, device="sim"), torch.zeros(4).pin_memory()
        copies, stored = torch.Stream("sim"), torch.Event("sim")
        with copies:
            home.copy_(there, non_blocking=True)
        stored.record(copies)
        assert home.tolist() == [0.0] * 4
        stored.synchronize()
        assert home.tolist() == [5.0] * 4


def test_pageable_memory_is_taken_and_given_before_a_copy_returns(lazy):
    host = torch.full((4,), 7.0)
    there = host.to("sim", non_blocking=True)
    host.zero_()
    home = torch.zeros(4)
    home.copy_(there, non_blocking=True)
    assert home.tolist() == [7.0] * 4


_STRAY = """
import ctypes, resource, torch
from tests.device.backend import present
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
with present():
    there = torch.ones(4, device="sim")
    torch.sim.synchronize()
    print("reads", there.cpu().tolist(), flush=True)
    ctypes.string_at(there.data_ptr(), 4)
    print("survived")
"""


def test_a_stray_read_of_the_host_crashes():
    done = subprocess.run([sys.executable, "-c", _STRAY], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.stdout == "reads [1.0, 1.0, 1.0, 1.0]\n", done.stderr
    assert done.returncode == -signal.SIGSEGV


def test_what_nobody_has_written_is_nan(policy):
    assert torch.empty(5, device="sim").isnan().all().item()
    held = torch.zeros(5, device="sim")
    address = held.data_ptr()
    del held
    again = torch.empty(5, device="sim")
    assert again.data_ptr() == address
    assert again.isnan().all().item()


def test_a_view_of_freed_memory_reads_nan(policy):
    held = torch.zeros(1000, device="sim")
    view = held[:3]
    held.untyped_storage().resize_(0)
    held.untyped_storage().resize_(4000)
    assert view.isnan().all().item()
    held.fill_(2)
    assert view.tolist() == [2, 2, 2]


def test_another_streams_cache_is_taken_only_when_memory_is_short():
    with present("lazy", limit_bytes=2**20):
        other = torch.Stream("sim")
        held = torch.empty(2**19, dtype=torch.uint8, device="sim")
        address = held.data_ptr()
        del held
        with other:
            assert torch.empty(2**18, dtype=torch.uint8, device="sim").data_ptr() != address
            before, whole = torch.sim.memory_allocated(), torch.empty(2**20, dtype=torch.uint8, device="sim")
        with pytest.raises(torch.OutOfMemoryError, match="1 bytes were asked for"):
            torch.empty(1, dtype=torch.uint8, device="sim")
        assert torch.sim.memory_allocated() == before + whole.numel()


def test_peaks(lazy):
    before = torch.sim.memory_allocated()
    torch.sim.reset_peak_memory_stats()
    torch.empty(1024, dtype=torch.uint8, device="sim")
    assert torch.sim.memory_allocated() == before
    assert torch.sim.max_memory_allocated() == before + 1024


def test_random_numbers_go_by_the_order_of_launches():
    drawn = []
    for name in backend.POLICIES:
        with present(name):
            torch.manual_seed(5)
            side = torch.Stream("sim")
            with side:
                first = torch.rand(4, device="sim")
            second = torch.nn.functional.dropout(torch.ones(16, device="sim"), 0.5)
            state = torch.sim.get_rng_state()
            third = torch.rand(4, device="sim")
            torch.sim.set_rng_state(state)
            assert torch.equal(third, torch.rand(4, device="sim"))
            side.synchronize()
            drawn.append([value.cpu() for value in (first, second, third)])
    assert not torch.equal(drawn[0][0], drawn[0][2])
    assert all(torch.equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True))


def test_random_numbers_are_the_devices_own(lazy):
    state = torch.get_rng_state()
    own = torch.Generator(device="sim").manual_seed(3)
    values = torch.randn(100, device="sim", generator=own)
    again = torch.randn(100, device="sim", generator=torch.Generator(device="sim").manual_seed(3))
    assert torch.equal(values, again)
    assert len(set(torch.randperm(50, device="sim").tolist())) == 50
    assert torch.equal(torch.get_rng_state(), state)


def test_host_waits_are_counted(lazy):
    x = torch.arange(4.0, device="sim")
    torch.sim.synchronize()
    torch.sim.current_stream().synchronize()
    event = torch.Event("sim")
    event.record()
    event.synchronize()
    x.cpu()
    x.sum().item()
    assert waits() == {"stream": 1, "event": 1, "device": 1, "copy": 1, "value": 1}


def test_results_whose_shape_depends_on_values(policy):
    x = torch.tensor([0.0, 2.0, 0.0, 3.0])
    there = x.to("sim")
    assert torch.equal(there.nonzero().cpu(), x.nonzero())
    assert torch.equal(there[there > 0].cpu(), x[x > 0])
    assert torch.equal(there.unique().cpu(), x.unique())
    assert backend.operators_waited().keys() >= {"aten::nonzero"}
    there[there > 0] = 9
    assert there.tolist() == [0, 9, 0, 9]


def test_an_error_is_heard_by_who_waits_next(lazy):
    table, rows = torch.zeros(3, 2, device="sim"), torch.tensor([5], device="sim")
    torch.nn.functional.embedding(rows, table)
    with pytest.raises(RuntimeError, match="failed: index out of range"):
        torch.sim.synchronize()


def test_pinned_memory_is_kept_until_its_copy_has_ended(lazy):
    host = torch.full((1000,), 7.0).pin_memory()
    there = torch.empty(1000, device="sim").copy_(host, non_blocking=True)
    del host
    assert (there == 7).all().item()


def test_pages_are_not_unregistered_under_a_copy(lazy):
    pages = torch.zeros(4096, dtype=torch.uint8)
    torch.sim.host_register(pages.data_ptr(), pages.numel())
    assert pages[7:].is_pinned()
    there = torch.empty(4096, dtype=torch.uint8, device="sim")
    torch.sim.synchronize()
    there.copy_(pages, non_blocking=True)
    with pytest.raises(RuntimeError, match="under 1 copies"):
        torch.sim.host_unregister(pages.data_ptr())
    assert not pages.is_pinned()


def test_pages_that_are_mapped_are_read_by_kernels(lazy):
    host = torch.arange(12.0).view(4, 3).pin_memory()
    rows = torch.nn.functional.embedding(torch.tensor([2], device="sim"), torch.sim.mapped(host))
    host[2] = 5
    assert rows.tolist() == [[5, 5, 5]]


def test_data_across_devices(lazy):
    weight = torch.nn.Parameter(torch.ones(3))
    weight.data = torch.full((2,), 4.0, device="sim")
    (weight * 2).sum().backward()
    assert (weight.device.type, weight.grad.device.type) == ("sim", "sim")
    assert weight.grad.tolist() == [2, 2]


def test_events_tell_times(lazy):
    begin, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    begin.record()
    torch.ones(1000, device="sim").exp()
    end.record()
    assert not end.query()
    end.synchronize()
    assert end.query()
    assert 0 < begin.elapsed_time(end) < 1e4


def test_it_is_there_only_where_it_is_asked_for():
    assert not torch.accelerator.is_available()
    with present():
        assert torch.accelerator.is_available()
        assert torch.accelerator.current_accelerator().type == "sim"
    assert torch.accelerator.device_count() == 0


def test_without_a_compiler_it_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler, and there is no g\\+\\+-none here: install it"):
        build(tmp_path, compiler="g++-none")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_host_reads_its_own_memory():
    """So that the crash above is the device's doing."""
    held = torch.ones(4)
    assert len(ctypes.string_at(held.data_ptr(), 4)) == 4


def test_dropout_keeps_a_byte_an_element():
    """As on a GPU, and as plans for one count it; a CPU keeps a mask in the input's dtype."""
    kept = {}
    for device in ("cpu", "sim"):
        saved = []
        tensor = torch.ones(16, dtype=torch.bfloat16, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, saved=saved: saved.append(one) or one, lambda one: one
        ):
            torch.nn.functional.dropout(tensor, 0.5)
        kept[device] = [one.dtype for one in saved]
    assert kept == {"cpu": [torch.bfloat16], "sim": [torch.bool]}
