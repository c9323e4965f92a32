"""Every wait, and every event that one is for, is dropped in turn: some case goes wrong, under one order or another.

The list is made from the code. What no case catches would be a wait too many, or a case too few.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import memplan.run
from memplan.program.schema import RING_BYTES
from memplan.run import tiers
from memplan.run.attach import attach
from memplan.run.memory import arena, page_lock
from memplan.run.memory.disk import DiskReader, Extent
from memplan.run.modules import install, optimizer_state
from memplan.run.transfer import device, streams, transfer
from tests.device import backend
from tests.run import test_gpu, test_optimizer_state
from tests.run.test_parity import plan_for
from tests.support import devices
from tests.support.devices import planned
from tests.support.training import assert_equal, batch_of, make

SIM = devices.Apart("sim")
THERE = SIM.device
WAITS = ("wait_event", "wait_stream", "synchronize", "record", "record_event", "record_stream", "await_job")
MUTATED = (
    (streams, "StreamTransfers", install), (optimizer_state, "_State", optimizer_state),
    (device, "unpin_pages", page_lock),
)  # fmt: skip
"""Where a class or function is written, and by whose name for it it is used."""

MEASURES = {"before.record(stream)", "after.record(stream)"}
"""What only takes the time."""


NOT_CAUGHT = {}
"""What no case here shows to be needed, and what may be why. Whoever drops one needs more of an argument."""


class _Calls(ast.NodeTransformer):
    """Find the calls of a class that wait, or are waited for; drop one."""

    def __init__(self, dropped: int = -1) -> None:
        self.found: list[str] = []
        self._dropped = dropped

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name not in WAITS:
            return node
        self.found.append(ast.unparse(node))
        if len(self.found) - 1 != self._dropped:
            return node
        return ast.parse("torch.Event(self._device)" if name == "record_event" else "0.0", mode="eval").body


def class_of(module: ModuleType, name: str) -> ast.Module:
    tree = ast.parse(inspect.getsource(module))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return ast.Module([node for node in tree.body if isinstance(node, kinds) and node.name == name], [])


def calls_of(module: ModuleType, name: str) -> list[str]:
    calls = _Calls()
    calls.visit(class_of(module, name))
    return calls.found


def mutations() -> Iterator[object]:
    for module, name, user in MUTATED:
        for index, call in enumerate(calls_of(module, name)):
            if call not in MEASURES and call not in NOT_CAUGHT:
                yield pytest.param(module, name, user, index, id=f"{name}-{index}-{call}")


def mutated(module: ModuleType, name: str, dropped: int) -> type:
    tree = ast.fix_missing_locations(_Calls(dropped).visit(class_of(module, name)))
    names = dict(vars(module))
    exec(compile(tree, f"<{name} mutated>", "exec"), names)
    return names[name]


def streamed(tmp_path, monkeypatch):
    planned(SIM, "llama", tmp_path, share=0.4)


def tight(tmp_path, monkeypatch):
    planned(SIM, "llama", tmp_path, share=0.0)


def offloaded(tmp_path, monkeypatch):
    planned(SIM, "llama", tmp_path, share=0.2, offload="all")


def pageable(tmp_path, monkeypatch):
    lock = page_lock.page_locked
    only_rings = lambda size: lock(size) if size == RING_BYTES else test_gpu.refused()  # noqa: E731
    monkeypatch.setattr(arena, "page_locked", only_rings)
    planned(SIM, "llama", tmp_path, share=0.2, offload="all")


def unpinned(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "page_locked", test_gpu.refused)
    planned(SIM, "llama", tmp_path, share=0.2, offload="all")


def first_loads(tmp_path, monkeypatch):
    """Loads on another stream than that on which their memory was allocated."""
    (tmp_path / "block").parent.mkdir(exist_ok=True)
    (tmp_path / "block").write_bytes(bytes([5]) * 4096)
    extent = Extent(path=str(tmp_path / "block"), file_offset_bytes=0, size_bytes=4096)
    reader = DiskReader()
    reader.open([extent])
    there = [torch.empty(4096, dtype=torch.uint8, device=THERE) for _ in range(2)]
    stored = torch.full((4096,), 5, dtype=torch.uint8, device=THERE)
    home, room = (page_lock.page_locked(4096).zero_() for _ in range(2))
    transfers = install.StreamTransfers(THERE)
    with torch.Stream(THERE):
        tickets = [
            transfers.load("h2d", 0, transfer.HostSource(home.fill_(5)), there[0]),
            transfers.load("disk", 1, transfer.DiskSource(((extent, 0),), reader, "a block"), there[1]),
            transfers.load("d2h", 2, transfer.HostSource(stored), room),
        ]
        for block, ticket in enumerate(tickets):
            transfers.wait(ticket, block)
    torch.sim.synchronize()
    transfers.close()
    reader.close()
    assert all((part.cpu() == 5).all() for part in (*there, room))


def ended(tmp_path, monkeypatch):
    """What is drained or closed uses no memory any more, by copies or by jobs."""
    there = torch.empty(4096, dtype=torch.uint8, device=THERE)
    for end in ("drain", "close"):
        transfers, home = install.StreamTransfers(THERE), torch.zeros(4096, dtype=torch.uint8)
        torch.sim.host_register(home.data_ptr(), home.numel())
        transfers.load("h2d", 0, transfer.HostSource(home), there)
        getattr(transfers, end)()
        torch.sim.host_unregister(home.data_ptr())  # raises under a copy
        transfers.close()
    transfers, staged = install.StreamTransfers(THERE), transfer.HostSource(torch.zeros(2**26, dtype=torch.uint8))
    ticket = transfers.load("h2d", 0, staged, torch.empty(2**26, dtype=torch.uint8, device=THERE))
    transfers.drain()
    assert ticket.filled.done()
    transfers.close()


def interrupted(tmp_path, monkeypatch):
    """Forwards and backwards that fail on their way, and training that goes on."""
    model = make("llama")
    layers = model.base_model.model.model.layers
    with attach(model, plan_for(model, "llama", share=0.2, offload="all"), cache=tmp_path):
        for layer in (1, 4):
            hook = layers[layer].register_forward_hook(fail)
            with pytest.raises(KeyError):
                model(**SIM.batches("llama", 0))
            hook.remove()
            hook = layers[layer].mlp.register_full_backward_hook(fail)
            with pytest.raises(KeyError):
                model(**SIM.batches("llama", 0)).loss.backward()
            hook.remove()
            model.zero_grad()
        run = SIM.train(model, "llama")
    assert_equal(devices.whole_of(SIM, "llama"), run)


def detached(tmp_path, monkeypatch):
    """What is allocated after a detach is nobody else's, though loads were on their way."""
    monkeypatch.setattr(arena, "page_locked", test_gpu.refused)
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.2), cache=tmp_path):
        model(**SIM.batches("llama", 0))
    held = [torch.zeros(2**16, dtype=torch.uint8, device=THERE) for _ in range(32)]
    torch.sim.synchronize()
    assert not any(part.any().item() for part in held)


def as_whole(gradients, tmp_path):
    """Compare what a function gives of a model under a plan, whose homes are all in RAM, and of one that is whole."""
    whole, model = make("llama"), make("llama")
    with attach(model, plan_for(model, "llama", share=0.0, tiers="host"), cache=tmp_path):
        found = gradients(model, SIM.batches)
    with SIM.attention():
        expected = gradients(whole, batch_of)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def taken(tmp_path, monkeypatch):
    """A state_dict's entries are homes, and written to while a step that reads them is under way."""
    as_whole(halved, tmp_path)


def halved(model, batches):
    """Return gradients of two micro-batches, between which the frozen matrices become half of what they were."""
    found = []
    for seed in range(2):
        model(**batches("llama", seed=seed)).loss.backward()
        for name, value in model.state_dict().items():
            if value.ndim == 2 and "lora" not in name:
                value.mul_(0.5)
        found += [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [gradient.cpu() for gradient in found]


def written(tmp_path, monkeypatch):
    """Weights are given other values of the host while a step that reads the old ones is under way."""
    as_whole(replaced, tmp_path)


def replaced(model, batches):
    found = []
    for seed in range(2):
        model(**batches("llama", seed=seed)).loss.backward()
        with torch.no_grad():
            for layer in model.get_base_model().model.layers:
                layer.mlp.down_proj.base_layer.weight.copy_(torch.full((64, 176), 0.01 * (seed + 1)))
        found += [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [gradient.cpu() for gradient in found]


def traced(tmp_path, monkeypatch):
    """The record tells when what a pass did took place, though it may be under way."""
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.4), cache=tmp_path, traced=True) as handle:
        for seed in range(2):
            model(**SIM.batches("llama", seed)).loss.backward()
        assert all(span.end_s >= span.start_s for span in handle.record.spans)


def pinned(tmp_path, monkeypatch):
    """Pages are unpinned though a copy of them is under way."""
    pages = np.zeros(4096, np.uint8)
    device.pin_pages(THERE, pages.ctypes.data, pages.nbytes)
    there = torch.empty(4096, dtype=torch.uint8, device=THERE)
    there.copy_(torch.from_numpy(pages), non_blocking=True)
    page_lock.unpin_pages(THERE, pages.ctypes.data)


def fail(*args):
    raise KeyError("on purpose")


def optimizer(tmp_path, monkeypatch):
    """Sent to RAM beside the next forward, whose room for that is not asked for here."""
    monkeypatch.setattr(tiers, "has_room_aside", lambda plan: True)
    test_gpu.test_the_optimizers_state_waits_on_the_host(SIM)


def saved_state(tmp_path, monkeypatch):
    """What a checkpoint is written of is there when it is asked for."""
    monkeypatch.setattr(tiers, "has_room_aside", lambda plan: True)
    model = make("llama")
    with attach(model, test_optimizer_state.plan_for(model)):
        found = stepped(model, SIM.batches)
    for one, other in zip(whole_state(), found, strict=True):
        assert np.array_equal(one, other)


@cache
def whole_state():
    with SIM.attention():
        return stepped(make("llama"), batch_of)


def stepped(model, batches):
    """Return the optimizer's state after two steps, as the host reads it at once."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        model(**batches("llama", seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return [held[name].numpy().copy() for held in state.values() for name in ("exp_avg", "exp_avg_sq")]


CASES: tuple[Callable[..., None], ...] = (
    pinned,  # before all in which memory that is let go too early would be read
    streamed, offloaded, pageable, unpinned, tight, first_loads, ended, interrupted, detached, optimizer, saved_state,
    taken, written, traced,
)  # fmt: skip


def caught_by(tmp_path, module, name, user, dropped) -> str | None:
    """Return the first case that goes wrong once a call is dropped."""
    changed = mutated(module, name, dropped)
    for turn, (case, order) in enumerate(itertools.product(CASES, backend.EXTREMES)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(user, name, changed)
            try:
                with devices.on(order.replace(" ", "-")):
                    case(tmp_path / str(turn), patch)
            except (AssertionError, RuntimeError, AttributeError, TypeError) as error:
                return f"{case.__name__}, {order}: {type(error).__name__}"
    return None


@pytest.mark.parametrize(("module", "name", "user", "dropped"), [*mutations()])
@pytest.mark.full
def test_a_dropped_wait_is_caught(module, name, user, dropped, tmp_path):
    assert caught_by(tmp_path, module, name, user, dropped)


def test_all_that_waits_is_tried():
    """But for records that are no events', the CPU's own jobs (transfer.py), and two files of whose waits no case here
    shows the need: spans.py, written_weights.py.
    """
    found = set()
    for path in Path(memplan.run.__file__).parent.rglob("*.py"):
        calls = _Calls()
        calls.visit(ast.parse(path.read_text(encoding="utf-8")))
        if calls.found:
            found.add(path.name)
    tried = {Path(module.__file__).name for module, _, _ in MUTATED}
    assert found - tried == {"handle.py", "conductor.py", "transfer.py", "spans.py", "written_weights.py"}


def test_what_is_not_caught_is_there():
    calls = {call for module, name, _ in MUTATED for call in calls_of(module, name)}
    assert calls >= {*NOT_CAUGHT, *MEASURES}


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_caught_where_nothing_is_dropped(case, apart, tmp_path, monkeypatch):
    case(tmp_path, monkeypatch)


def table() -> str:
    """Return what catches each dropped call, as it is kept in tests/results/waits.md."""
    lines = ["| class | dropped | caught by |", "|---|---|---|"]
    for module, name, user in MUTATED:
        for index, call in enumerate(calls_of(module, name)):
            if call in MEASURES:
                said = "not tried: it only takes the time"
            elif call in NOT_CAUGHT:
                said = f"nothing: {NOT_CAUGHT[call]}"
            else:
                with tempfile.TemporaryDirectory() as folder:
                    said = caught_by(Path(folder), module, name, user, index)
            lines.append(f"| `{name}` | `{call}` | {said} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
