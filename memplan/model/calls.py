"""What a model is called with in training, where a mapping or a tuple does not say it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class Call:
    """One call of a model as it is written: ``Call(ids, attention_mask=mask)`` for ``model(ids, attention_mask=mask)``.

    Given as a batch, where a model is called with positions and keywords alike.
    """

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs
        self.entry = ""
        """Name of the module within the model that is called; empty: the model itself."""

    @classmethod
    def of(cls, entry: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return the call of the module of that name."""
        call = cls(*args, **kwargs)
        call.entry = entry
        return call

    def run(self, model: Any) -> Any:
        """Return what the call returns."""
        return (model.get_submodule(self.entry) if self.entry else model)(*self.args, **self.kwargs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The calls that a script makes of a model from one backward to the next, given as a batch: in the mode that the
    model is in, be it evaluation.
    """

    calls: tuple[Call, ...]
    reads_rest: bool = False
    """Whether what the calls do not come to is read as well, where nobody knows how: none of them is the model's
    own, or not all are known yet.
    """
