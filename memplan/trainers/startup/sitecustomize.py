"""What a Python that starts under ``memplan run`` reads first; it then hands on to the file of this name that it
hides.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _begin() -> None:
    try:
        from memplan.trainers.import_hooks import install
    except ImportError:
        sys.stderr.write("memplan: not installed for this Python, so the script runs without it\n")
    else:
        install()


def _hand_on() -> None:
    """Run the file of this name that would have run without memplan."""
    here = Path(__file__).resolve().parent
    others = [folder for folder in sys.path if Path(folder).resolve() != here]
    sys.path[:] = others
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


try:
    _begin()
finally:
    _hand_on()
