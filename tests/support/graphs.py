"""Graphs of models that several tests plan for, each traced once: a trace takes a second, a step of such a model far
less.

They lie in a folder too, for the workers that tests run in, named after the model, the code and the libraries.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from memplan.analyze.graph import LayerGraph
from memplan.analyze.repeat.signature import Described
from memplan.analyze.trace import trace
from memplan.hooks.late_hooks import note_traced
from memplan.hooks.nested import tensors_in

ROOT = Path(__file__).parents[2]
_known: dict[str, LayerGraph] = {}
_seen: dict[tuple[object, ...], LayerGraph] = {}
analyze = trace.analyze


def graph_of(model: nn.Module, batch, loss, **options) -> LayerGraph:
    """Return ``analyze(model, batch, loss=loss, **options)``, from before where a model just like it was analyzed."""
    given = [(tuple(t.shape), t.dtype, t.numpy().tobytes()) for t in tensors_in(batch)]
    how = (given, loss.__module__, loss.__qualname__, sorted(options.items()), _context())
    key = hashlib.sha256(repr((code(), Described().leaves(model), how)).encode()).hexdigest()
    if key not in _known:
        path = ROOT / ".cache" / "graphs" / key
        if path.is_file():
            _known[key] = msgspec.json.decode(path.read_bytes(), type=LayerGraph)
        else:
            _known[key] = analyze(model, batch, loss=loss, **options)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{key}.{os.getpid()}")
            unfinished.write_bytes(msgspec.json.encode(_known[key]))
            unfinished.replace(path)
    return _known[key]


def analyze_once(model: nn.Module, batch: object, *, known: dict | None = None, **options) -> LayerGraph:
    """Return ``analyze(model, batch, **options)``, from before where a model just like it was analyzed: of the same
    classes with the same forwards, whose settings, hooks and parameters are equal. ``known``: graphs from before; None:
    this process's.
    """
    known = _seen if known is None else known
    loss = options.pop("loss", None)
    tensors = list(tensors_in(batch))
    if (loss is not None and "<" in loss.__qualname__) or any(tensor.is_meta for tensor in tensors) or _is_watched():
        return analyze(model, batch, loss=loss, **options)
    classes = {type(module): None for module in model.modules()}
    forwards = tuple((kind, kind.forward, kind.__call__) for kind in classes)
    values = [(tensor.dtype, tensor.tolist()) for tensor in tensors]
    devices = {parameter.device for parameter in model.parameters()}
    what = repr((Described().leaves(model), devices, batch, values, sorted(options.items()), _context()))
    key = (forwards, loss, hashlib.sha256(what.encode()).digest())
    if key not in known:
        known[key] = analyze(model, batch, loss=loss, **options)
    note_traced(model)
    return known[key]


@contextmanager
def traced_once(known: dict | None = None) -> Iterator[None]:
    """Within it ``memplan.plan`` analyzes by ``analyze_once``: for tests of what comes after the trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "analyze", partial(analyze_once, known=known))
        yield


def _context() -> tuple[object, ...]:
    """What a trace depends on besides what it is given."""
    autocast = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    attention = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
    return (*autocast, *attention, torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())


def _is_watched() -> bool:
    """Whether somebody's modes see what is computed."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


@cache
def code() -> str:
    """Return what tells this code and its libraries from others."""
    files = sorted((ROOT / "memplan").rglob("*.py")) + [ROOT / "tests" / "support" / "training.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return " ".join([digest, *(version(name) for name in ("torch", "transformers", "peft"))])
