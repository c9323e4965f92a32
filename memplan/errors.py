"""What memplan raises. Each message says what was asked, what stood in the way, and what to do.

MemplanError
├── InputError (a ValueError)     what was given cannot be used; nothing was changed
│   ├── SizeError                 a size that is not a count of bytes
│   ├── HardwareError             an unknown or unreadable hardware profile
│   ├── ModelError                a model that memplan cannot place
│   └── CheckpointError           a weights file that is missing, truncated or not the model's
├── PlanError (a ValueError)      a plan that cannot be used; nothing was changed
│   ├── PlanFormatError           not a plan, truncated, or of another schema version
│   ├── PlanMismatchError         a plan for another model
│   └── PlanCheckError            a plan that breaks its own budgets or its own order
├── DoesNotFitError               no plan keeps the budgets; carries the least that would
├── TooSlowError                  no plan within the budgets is as fast as was asked
└── RunError (a RuntimeError)     training under a plan cannot go on
    ├── TransferError             a weight could not be brought: names the block and the file
    ├── StrayReadError            a weight was read that is not there (checked mode)
    └── MovedWeightsError         a call would have moved or cast streamed weights
"""

from __future__ import annotations

import re


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def type_and_line(error: BaseException) -> str:
    """Return an error's type, and the first line of what it says where it says something."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


_MORE_GIB_THAN_ANY = 1 << 16


class MemplanError(Exception):
    """The root of everything that memplan raises on purpose."""


class InputError(MemplanError, ValueError):
    """What was given cannot be used; nothing was changed."""


class SizeError(InputError):
    """A size that is not a count of bytes."""

    def __init__(self, what: str, size: object) -> None:
        bare = isinstance(size, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*", size) is not None
        unit = "GiB" if bare and float(str(size)) < _MORE_GIB_THAN_ANY else "B"
        hint = f"its unit is missing, did you mean {str(size).strip()}{unit}? Else " if bare else ""
        super().__init__(
            f"{what} was given as {size!r}, which is not a size: {hint}give a number with a unit, such as "
            '"6GiB", "24G" or "512MiB", or whole bytes from 0'
        )


class HardwareError(InputError):
    """An unknown or unreadable hardware profile."""


class ModelError(InputError):
    """A model that memplan cannot place."""


class CheckpointError(InputError):
    """A weights file that is missing, truncated, or not the model's."""


class PlanError(MemplanError, ValueError):
    """A plan that cannot be used; nothing was changed."""


class PlanFormatError(PlanError):
    """Not a plan, truncated, or of another schema version."""


class PlanMismatchError(PlanError):
    """A plan that was made for another model."""


class PlanCheckError(PlanError):
    """A plan that breaks its own budgets or its own order.

    ``faults`` holds every fault that the check found, one sentence each.
    """

    def __init__(self, faults: tuple[str, ...]) -> None:
        self.faults = faults
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        super().__init__(f"the plan is invalid: {shown}. Re-create it with memplan.plan, or undo the edit")


class DoesNotFitError(MemplanError):
    """No plan keeps the budgets.

    ``asked`` says in one clause what was asked and that it does not fit; ``limited_by`` names what limits it;
    ``suggestions`` are changes that help, those first that make it fit alone, the cheapest before all others.
    ``least_vram_bytes`` is the least ``vram`` for which a plan exists with the other budgets as given, or None where no
    ``vram`` would do; ``least_ram_bytes`` the same of ``ram``, ``least_disk_bytes`` a ``disk`` that does.
    """

    def __init__(
        self,
        asked: str,
        *,
        least_vram_bytes: int | None,
        limited_by: str,
        suggestions: tuple[str, ...],
        least_ram_bytes: int | None = None,
        least_disk_bytes: int | None = None,
    ) -> None:
        self.asked = asked
        self.least_vram_bytes = least_vram_bytes
        self.least_ram_bytes = least_ram_bytes
        self.least_disk_bytes = least_disk_bytes
        self.limited_by = limited_by
        self.suggestions = suggestions
        super().__init__(f"{asked}: {limited_by}. To make it fit: {'; '.join(suggestions)}")


class TooSlowError(MemplanError):
    """No plan within the budgets is as fast as was asked.

    ``step_s``: of the best plan; ``least_vram_bytes``: the least ``vram`` at which a plan is as fast, to a 256th of the
    span from the minimum to all weights on the device, or None where no ``vram`` would do.
    """

    def __init__(self, message: str, *, step_s: float, least_vram_bytes: int | None) -> None:
        self.step_s = step_s
        self.least_vram_bytes = least_vram_bytes
        super().__init__(message)


class RunError(MemplanError, RuntimeError):
    """Training under a plan cannot go on."""


class TransferError(RunError):
    """A weight could not be brought: names the block and the file."""


class StrayReadError(RunError):
    """A weight was read that is not there (checked mode)."""


class MovedWeightsError(RunError):
    """A call would have moved or cast streamed weights."""
