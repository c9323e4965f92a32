"""``memplan run``: what a script is started with, and what then waits in its process for the libraries to be imported.

Nothing but the standard library is imported here: every Python under ``memplan run`` reads this as it starts.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

from memplan.trainers.launch import PROCESS, VARIABLE, Seen, say

_LAUNCHERS = ("accelerate.commands.launch", "torch.distributed.run", "deepspeed.launcher.runner")
"""They import torch, and train in other processes."""


def _tell_of_none() -> None:
    """Say at the end that nothing was trained, in a process that might have."""
    is_command = os.environ.get(PROCESS) == str(os.getpid())
    might = is_command and "torch" in sys.modules and not any(name in sys.modules for name in _LAUNCHERS)
    if Seen.training and Seen.model and not Seen.served and not Seen.error:
        say("nothing was placed: a trainer trained, but no call with gradients of a model that memplan serves was seen")
    if not Seen.training and not Seen.error and (Seen.model or might):
        say("no training was seen: no model that memplan serves was called with gradients")


def _without_traceback(before: Callable[..., Any]) -> Callable[..., Any]:
    """Have an error that says that nothing fits, or is as fast as asked, end a script as it ends ``memplan plan``."""

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        Seen.error = True
        errors = sys.modules.get("memplan.errors")
        if errors is not None and isinstance(error, errors.TooSlowError):
            say(str(error))
            return
        if errors is None or not isinstance(error, errors.DoesNotFitError):
            before(kind, error, trace)
            return
        from memplan.show import terminal

        sys.stderr.write(terminal.failure_text(error))
        sys.stderr.flush()

    return hook


def install() -> None:
    """Have the libraries that memplan serves changed when, and only if, the script imports them."""
    if VARIABLE in os.environ and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.excepthook = _without_traceback(sys.excepthook)
        atexit.register(_tell_of_none)
        after: dict[str, Callable[[ModuleType], None]] = {
            "transformers.modeling_utils": _models,
            "transformers.trainer": _trainer,
            "peft.peft_model": _adapters,
            "diffusers.models.modeling_utils": _diffusers,
            "torch.optim.optimizer": _optimizers,
            "torch._dynamo.eval_frame": _compiled,
        }
        sys.meta_path.insert(0, _Finder(after))


def lightning_callbacks() -> list[Any]:
    """Return what Lightning is to add to each Trainer's callbacks: nothing but under ``memplan run``."""
    if VARIABLE not in os.environ:
        return []
    from memplan.trainers.lightning import PlacementAtFirstCall

    return [PlacementAtFirstCall()]


def _models(module: ModuleType) -> None:
    from memplan.trainers.serve_script import serve_models

    serve_models(module.PreTrainedModel)


def _diffusers(module: ModuleType) -> None:
    from memplan.trainers.serve_script import serve_diffusers

    serve_diffusers(module.ModelMixin)


def _trainer(module: ModuleType) -> None:
    from memplan.trainers.serve_script import serve_trainer

    serve_trainer(module.Trainer)


def _adapters(module: ModuleType) -> None:
    from memplan.trainers.serve_script import serve_adapters

    serve_adapters(module.PeftModel)


def _optimizers(module: ModuleType) -> None:
    """Have every optimizer told of as it is made: then a loop of the script's own is about to train."""
    kind = module.Optimizer
    original = kind.__init__

    @functools.wraps(original)
    def init(optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        if _is_of_script(sys._getframe(1)):
            try:
                from memplan.trainers.serve_loop import serve_optimizer  # torch is all there only by now

                serve_optimizer(optimizer)
            except Exception as error:  # the script is to run all the same
                say(f"inactive: its optimizer cannot be looked at ({type(error).__name__}: {error})")

    kind.__init__ = init


def _compiled(module: ModuleType) -> None:
    """Have a model that is compiled as a whole say why it is not served."""
    plain = sys.modules["torch.nn"].Module
    ways = ((module.OptimizedModule, "__init__"), (plain, "compile"))
    originals = [getattr(kind, name) for kind, name in ways]

    def first(place: int) -> Callable[..., None]:
        @functools.wraps(originals[place])
        def call(*args: Any, **kwargs: Any) -> None:
            from memplan.trainers.serve_loop import serve_compiled_models  # torch is all there only by now

            for (kind, name), original in zip(ways, originals, strict=True):
                setattr(kind, name, original)
            serve_compiled_models(module.OptimizedModule)
            getattr(*ways[place])(*args, **kwargs)

        return call

    for place, (kind, name) in enumerate(ways):
        setattr(kind, name, first(place))


def _is_of_script(frame: FrameType | None) -> bool:
    """Whether nothing of memplan, which has its own ways with trainers and makes optimizers to measure, is at work."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("memplan."):
            return False
        frame = frame.f_back
    return True


class _Finder(MetaPathFinder):
    """Finds what the others find, and has something done once it has been imported."""

    def __init__(self, after: dict[str, Callable[[ModuleType], None]]) -> None:
        self._after = after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        then = self._after.get(fullname)  # may be looked for long before it is imported
        if then is None:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, then)
                return spec
        return None


class _Loader(Loader):
    def __init__(self, loader: Loader, then: Callable[[ModuleType], None]) -> None:
        self._loader, self._then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module's loader is the true one: pickle, inspect and pkgutil ask it for more than this.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            self._then(module)
        except Exception as error:  # the script is to run all the same
            say(f"inactive: {module.__name__} cannot be served ({type(error).__name__}: {error})")
