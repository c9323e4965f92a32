"""Graphs of models that several tests plan for, each traced once: a trace takes a second, a step of such a model far
less.

They lie in a folder too, for the workers that tests run in, named after the model, the code and the libraries.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch
from torch import nn

from memplan.analyze.graph import LayerGraph
from memplan.analyze.repeat.signature import Described
from memplan.analyze.trace.trace import analyze
from memplan.hooks.nested import tensors_in

ROOT = Path(__file__).parents[2]
_known: dict[str, LayerGraph] = {}


def graph_of(model: nn.Module, batch, loss, **options) -> LayerGraph:
    """Return ``analyze(model, batch, loss=loss, **options)``, from before where a model just like it was analyzed."""
    context = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled())
    given = [(tuple(t.shape), t.dtype, t.numpy().tobytes()) for t in tensors_in(batch)]
    how = (given, loss.__module__, loss.__qualname__, sorted(options.items()), context, torch.get_num_threads())
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


@cache
def code() -> str:
    """Return what tells this code and its libraries from others."""
    files = sorted((ROOT / "memplan").rglob("*.py")) + [ROOT / "tests" / "support" / "training.py"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return " ".join([digest, *(version(name) for name in ("torch", "transformers", "peft"))])
