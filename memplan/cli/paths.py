"""Files that are named on the command line: looked at before the work, which may take a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from memplan.atomic_write import STANDARD_INPUT, STANDARD_OUTPUT, descriptor_of, reason, require_writable, same_file


class _Output(click.ParamType[Path]):
    """A file to be written, as :mod:`memplan.atomic_write` writes it; ``-`` is standard output."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = _path(value)
        try:
            require_writable(path)
        except (OSError, ValueError) as error:
            self.fail(f"{value} cannot be written: {reason(error)}.", param, ctx)
        return STANDARD_OUTPUT if descriptor_of(path) == 1 else path


class _Input(click.Path):
    """A file to be read; ``-`` is standard input."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        super().convert(value, param, ctx)
        return _path(value)


OUTPUT = _Output()
INPUT = _Input()


def require_apart(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] = {}, *, as_json: bool = False
) -> None:
    """Raise click.BadParameter where two files of a command are one, so that one of them would be lost."""
    written = {option: path for option, path in outputs.items() if path is not None}
    for (option, path), (other, its) in combinations(written.items(), 2):
        if same_file(path, its):
            raise click.BadParameter(f"{other} names the same file: give each its own.", param_hint=option)
    for option, path in written.items():
        if as_json and path == STANDARD_OUTPUT:
            raise click.BadParameter("give --json or a file on standard output, not both.", param_hint=option)
    read = {option: path for option, path in inputs.items() if path is not None}
    for option, path in written.items():
        for argument, source in read.items():
            if path != STANDARD_OUTPUT and same_file(path, source):
                raise click.BadParameter(f"{argument} is read from this file: give another.", param_hint=option)
    if sum(path == STANDARD_INPUT for path in read.values()) > 1:
        raise click.BadParameter("standard input can be read once: give files.", param_hint=" and ".join(read))


@contextmanager
def apart_from(*outputs: Path | None) -> Iterator[None]:
    """Have what is printed go to standard error where a file goes to standard output."""
    if STANDARD_OUTPUT not in outputs:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _path(value: Any) -> Path:
    path = Path(value)
    return path.absolute() if path == STANDARD_OUTPUT and str(value) != "-" else path
