"""Copies of weights that autograd saves and the plan has no room for: looked for once, in a run's first pass.

A plan that was made without the run's autocast, or for another kind of adapter, does not foresee the casts or the
merged weights that a layer then saves for its backward, and a card runs out of memory that the plan says is free.

[Note: looked at, not hooked] Saved-tensor hooks would stand between a checkpoint and what it drops. So nothing is
hooked: when a forward has ended, the graph that it left is walked, and what its nodes hold is looked at where it lies,
without unpacking it. What others' hooks hold (a checkpoint's, an offload's) is theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memplan.hooks.nested import tensors_in
from memplan.hooks.triggers import in_backward
from memplan.model.live_storages import storage_of
from memplan.model.weights import plain_parts
from memplan.program.schema import Plan
from memplan.run.memory.arena import Arena
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


class Copies:
    """Compares what each forward of the first pass saved with what the plan has for it."""

    def __init__(self, plan: Plan, modules: Mapping[str, nn.Module], arena: Arena) -> None:
        """``modules``: the plan's trigger modules by name. ``arena``: the device's, where the weights lie."""
        self._plan = plan
        self._modules = modules
        self._weights = arena.addresses
        policies = plan.policies()
        self._left = {
            row.index
            for row in plan.table.accesses
            if row.kind == "forward" and policies.get(row.module, "keep") == "keep"
        }
        self.unforeseen_bytes = 0
        """Copies of weights that the first pass saved beyond what the plan has."""

    def look(self, module: str, call: int, given: object, output: object) -> bool:
        """Look at a forward that has ended, and return whether all have been looked at. ``call``: its linear
        position.
        """
        if call < 0 or in_backward() or not torch.is_grad_enabled():
            return False
        index = call % len(self._plan.table.accesses)
        if call >= len(self._plan.table.accesses) and index not in self._left:
            return True  # the second pass has begun; what is left was never trained
        if index in self._left:
            self._left.discard(index)
            self._compare(index, self._modules[module], tensors_in(given), tensors_in(output))
        return not self._left

    def _compare(self, index: int, module: nn.Module, given: list[torch.Tensor], output: list[torch.Tensor]) -> None:
        row = self._plan.table.accesses[index]
        held = {*_addresses(given), *_addresses(module.parameters()), *_addresses(module.buffers())}
        alike = self._shapes(row.blocks)
        storages: dict[int, int] = {}
        copies: dict[int, int] = {}
        for tensor in (*saved_tensors(output, given), *output):
            for part in plain_parts(tensor):
                storage = storage_of(part)
                if storage is None:
                    continue
                address, size_bytes = storage.data_ptr(), storage.nbytes()
                if address in held or self._weights.holds(address):
                    continue
                storages[address] = size_bytes
                if (tuple(sorted(part.shape)), size_bytes // part.element_size()) in alike:
                    copies[address] = size_bytes
        planned = sum(
            life.size_bytes
            for life in self._plan.table.lifetimes
            if life.born == index and life.kind == "activations" and life.policy in ("any", "keep")
        )
        # As large as a weight by chance may an activation be: then the plan has it, and the sums agree.
        unforeseen = min(sum(copies.values()) - row.weight_copy_bytes, sum(storages.values()) - planned)
        if copies and unforeseen >= min(copies.values()):
            self._report(row.module, unforeseen)

    def _shapes(self, blocks: Iterable[int]) -> set[tuple[tuple[int, ...], int]]:
        """Return what copies of weights look like: their shape, dimensions in order, or one expert's of many; and
        elements.
        """
        found = set()
        for block in blocks:
            for tensor in self._plan.table.blocks[block].tensors:
                shape, elements = tensor.shape, torch.Size(tensor.shape).numel()
                found |= {(tuple(sorted(part)), elements) for part in (shape, shape[1:]) if len(part) > 1}
        return found

    def _report(self, module: str, size_bytes: int) -> None:
        if not self.unforeseen_bytes:  # at once: the next layers may be those for which there is no room
            _LOG.warning(
                "%s saves %s of copies of its weights for backward that the plan does not have (casts or merged "
                "weights), and others may too: make the plan inside the same autocast, or with autocast=, and with "
                "the same adapter; or plan with activations='recompute'",
                module,
                format_bytes(size_bytes),
            )
        self.unforeseen_bytes += size_bytes


def saved_tensors(output: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield what the graph between ``given`` and ``output`` saved for backward, hooked tensors apart."""
    seen = {tensor.grad_fn for tensor in given}
    nodes: list[Any] = [tensor.grad_fn for tensor in output]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, (tuple, list)) else (raw,):
                    if saved.unpack_hook is None and isinstance(saved.data, torch.Tensor):
                        yield saved.data


def _addresses(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    for tensor in tensors:
        for part in plain_parts(tensor):
            storage = storage_of(part)
            if storage is not None:
                yield storage.data_ptr()
