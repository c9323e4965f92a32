"""Defaults of options that a user keeps: in the environment, in ``memplan.toml``, or in ``[tool.memplan]`` of
``pyproject.toml``, in the directory where a command begins.

What is given on the command line goes before the environment, and that before a file. A file that was used is named on
standard error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from memplan.model.arguments import like

PREFIX = "MEMPLAN_"
"""Before an option's name in capitals: ``MEMPLAN_VRAM`` is ``--vram``."""

FILES = ("memplan.toml", "pyproject.toml")
"""The first that is there, and has something for memplan, is used."""


def variable(option: str) -> str:
    """Return the environment variable that stands for an option such as ``--lora-rank``."""
    return PREFIX + option.lstrip("-").replace("-", "_").upper()


def from_file(folder: Path, options: Mapping[str, str]) -> tuple[Path | None, dict[str, Any]]:
    """Return the file of a directory that has defaults, and them by the name of a parameter.

    ``options``: the parameters that there are, by what a file calls them (``lora-rank``). Raises click.BadParameter
    for a file that cannot be read, for an option that there is none of, and for a value that is no text, number, truth
    value or list.
    """
    for name in FILES:
        file = folder / name
        if not file.is_file():
            continue
        try:
            held: Any = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            if name == FILES[0]:
                raise click.BadParameter(f"{file} cannot be read: {error}.", param_hint=name) from error
            continue  # a pyproject.toml is not memplan's to complain of
        if name == "pyproject.toml":
            tools = held.get("tool")
            held = tools.get("memplan") if isinstance(tools, dict) else None
            if held is None:
                continue
        if not isinstance(held, dict):
            raise click.BadParameter(f"{file}: tool.memplan is not a table.", param_hint=name)
        return file, {_checked(key, value, file, options): value for key, value in held.items()}
    return None, {}


def _checked(key: str, value: object, file: Path, options: Mapping[str, str]) -> str:
    name = key.replace("_", "-")
    if name not in options:
        raise click.BadParameter(f"{file} has {key!r}, which is no option{like(name, options)}.", param_hint=file.name)
    if not isinstance(value, (str, int, float, list)):
        raise click.BadParameter(
            f"{file} has {key} = {value!r}: give text, a number, true or false, or a list.", param_hint=file.name
        )
    return options[name]
