"""What of an object is not entered when it is written down: values that cannot change, and what libraries hold of
their own.
"""

from __future__ import annotations

import functools
import io
import sys
from collections.abc import Iterable
from enum import Enum
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    ModuleType,
    TracebackType,
)
from typing import Any

import torch
from torch import nn

from memplan.model.weights import is_quantizer_state
from memplan.state import holders

ATOMS = (
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(...),
    Enum,
    CodeType,
    FrameType,
    TracebackType,
    BuiltinFunctionType,
    ModuleType,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    torch.Tensor,
)
ATOM_TYPES = {
    int,
    float,
    complex,
    str,
    bytes,
    bool,
    type(None),
    torch.dtype,
    torch.device,
    torch.Size,
    torch.Tensor,
    nn.Parameter,
}
_CLOSED = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._ops",
    "torch._library",
    "torch._C",
    "torch.fx",
    "torch.jit",
    "torch.distributed",
    "torch.cuda",
    "torch.utils.data",
    "torch.profiler",
    "torch.multiprocessing",
    "torch.library",
    "logging",
    "threading",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "subprocess",
    "socket",
    "ssl",
    "re",
    "weakref",
    "importlib",
    "inspect",
    "typing",
    "abc",
    "pathlib",
    "accelerate",
    "datasets",
    "lightning",
    "pytorch_lightning",
    "trl",
    "transformers.trainer",
    "tokenizers",
    "wandb",
    "tensorboard",
    "tensorboardX",
    "pandas",
    "pyarrow",
    "matplotlib",
    "memplan",
    "triton",
)
"""Where objects come from that are not entered: they belong to the process, or to whoever trains, not to a forward."""
_LIBRARIES = frozenset(
    {
        *sys.stdlib_module_names,
        "torch",
        "numpy",
        "scipy",
        "transformers",
        "diffusers",
        "peft",
        "bitsandbytes",
        "torchao",
        "memplan",
    }
) - {"__main__"}
"""Of their functions and classes the global names are not followed: what they keep is known (``fake.caches_empty``)."""


def names_in(code: CodeType) -> Iterable[str]:
    """Yield the names that a function's code, and what is defined in it, looks up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


@functools.cache
def is_closed_name(module: str) -> bool:
    return any(module == closed or module.startswith((closed + ".", closed + "_")) for closed in _CLOSED)


def is_closed(kind: type) -> bool:
    return not issubclass(kind, nn.Module) and is_closed_name(kind.__module__ or "")


def is_library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES


def keeps_cache(function: Any) -> bool:
    return is_library(function.__wrapped__.__module__)


def is_used_up(value: Any) -> bool:
    """Whether an object is another one after its use, and nothing that it holds could put it back."""
    kind = type(value)
    if is_quantizer_state(value) or isinstance(value, io.IOBase):
        return True
    return hasattr(kind, "__next__") and (
        is_closed(kind) or holders.of_slots(value) is None is getattr(value, "__dict__", None)
    )
