"""The checked mode: every weight that autograd saves is looked at again when backward unpacks it.

What streaming rests on is that every access is seen before it happens; a missed one would read another block's bytes
without a sound. Here it raises. [Note: hooks inside a checkpointed region] Saved-tensor hooks of ours hide the tensors
from a checkpoint's own, which then would no longer drop them; so what is not ours is handed on to the hooks around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from memplan.errors import StrayReadError
from memplan.hooks.compiled import call_of, replace_call
from memplan.hooks.offload import changed, version_of
from memplan.hooks.recompute import drop_hooks_that_stayed, hooks_around, run_hooked, without_graph
from memplan.model.weights import plain_parts
from memplan.run.memory.arena import Arena
from memplan.run.schedule.loader import Loader
from memplan.run.schedule.streamed import Streamed
from memplan.run.verify.race_check import ClockedTransfers


class CheckedReads:
    """Wraps forwards so that what they read of the device arena is noted, and what they save is checked at unpack."""

    def __init__(
        self, arena: Arena, streamed: Mapping[int, Streamed], loader: Loader, transfers: ClockedTransfers
    ) -> None:
        self._addresses = arena.addresses
        self._loader = loader
        self._transfers = transfers
        self._names = {block: s.name for block, s in streamed.items()}
        self._streamed = streamed
        self._undo: list[Callable[[], None]] = []
        self.checked = 0
        """Saved weights that were looked at again."""

    def wrap(self, module: nn.Module, own: frozenset[int], blocks: frozenset[int]) -> None:
        """Note that ``module``'s forward reads ``own``, and check what it saves of ``blocks``: streamed ones, both."""
        original = call_of(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for block in own:
                self._transfers.read(block, "read in forward")
            drop_hooks_that_stayed()
            around = hooks_around()
            hooks = self._packer(around, blocks), self._unpacker(around)
            return run_hooked(lambda: original(*args, **kwargs), *hooks)

        self._undo.append(replace_call(module, forward))

    def remove(self) -> None:
        """Unwrap in the reverse order."""
        while self._undo:
            self._undo.pop()()

    def _packer(self, around: Any, blocks: frozenset[int]) -> Callable[[torch.Tensor], Any]:
        def pack(tensor: torch.Tensor) -> Any:
            block = self._block_of(tensor, blocks)
            if block is not None:
                if not self._loader.is_there(block):
                    raise StrayReadError(self._message(block, "saved for backward"))
                return ("ours", tensor, block, tensor._version)
            if around is not None:
                return ("other", around[0](tensor))
            return ("kept", without_graph(tensor), version_of(tensor))

        return pack

    def _unpacker(self, around: Any) -> Callable[[Any], torch.Tensor]:
        def unpack(packed: Any) -> torch.Tensor:
            if packed[0] == "other":
                value: torch.Tensor = around[1](packed[1])
                return value
            if packed[0] == "kept":
                if version_of(packed[1]) != packed[2]:
                    raise changed("a module")
                kept: torch.Tensor = packed[1]
                return kept
            _, tensor, block, version = packed
            self.checked += 1
            if not self._loader.is_there(block):
                raise StrayReadError(self._message(block, "read in backward"))
            if tensor._version != version:
                raise StrayReadError(self._message(block, "written to since forward and read in backward"))
            self._transfers.read(block, "read in backward")
            held: torch.Tensor = tensor
            return held

        return unpack

    def _block_of(self, tensor: torch.Tensor, blocks: frozenset[int]) -> int | None:
        """Return which of ``blocks`` a tensor is a view of. Slots are shared: another block may lie there now."""
        for plain in plain_parts(tensor):
            pointer = plain.data_ptr()
            if plain.numel() == 0 or not self._addresses.holds(pointer):
                continue
            for block in blocks:
                part = self._streamed[block].part
                if part.data_ptr() <= pointer < part.data_ptr() + part.numel():
                    return block
        return None

    def _message(self, block: int, how: str) -> str:
        return (
            f"a weight of the block {self._names[block]} was {how} while the block was away: an access that no trigger "
            "saw. Pin that block to the device (pins={...: 'device'}) and report the model's class"
        )
