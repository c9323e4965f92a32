"""Writes the pages of docs/reference from the code:  python docs/reference.py

The options of a plan from ``memplan.PlanOptions``, the command line from click, the Python API from signatures and
docstrings, the files from their types.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import memplan
from memplan import request
from memplan.analyze import graph
from memplan.cli import group
from memplan.cli.options import OPTIONS
from memplan.cost import ranks, table
from memplan.hardware import profile
from memplan.program import record, schema
from memplan.run.attach import attach

FOLDER = Path(__file__).parent / "reference"
SCHEMAS = Path(__file__).parents[1] / "schemas"
WRITTEN = "Written by `make docs` from the code."

OPTIONS_PAGE = f"""# The options of a plan

{WRITTEN} Each is a keyword of `memplan.plan`, `frontier`, `fit`, `wrap`, `placing`,
`memplan.trainers.callback.MemplanCallback` and `memplan.trainers.lightning.Placement` alike; one that there is none of
is refused with the names that are near it, and so is one that makes no sense where it is given, such as `dtype` for a
model that is built already. The last column has the words of `memplan plan`, `frontier` and `fit`; those with a ∗ are
also of `memplan run`, where what is given goes before what the script's trainer says.

| Option | Type | What it is | On the command line |
|---|---|---|---|
"""
COMMANDS_PAGE = f"""# The command line

{WRITTEN} `memplan COMMAND --help` prints the same. [Exit codes](../troubleshooting.md#exit-codes),
[the options of a plan in Python](options.md),
[defaults by environment or file](../howto/budget.md#defaults-of-your-own).

Completion in a shell, here bash (zsh and fish likewise):

```bash
eval "$(_MEMPLAN_COMPLETE=bash_source memplan)"
```
"""
PYTHON_PAGE = f"""# The Python API

{WRITTEN} All that is public is here; `options` are [the options of a plan](options.md).
"""
FILES_PAGE = f"""# Plan, record and profile files

{WRITTEN} All are JSON with a JSON Schema (`schemas/`, in the wheel `memplan/_schemas/`); a field that a schema does
not know is refused. Bytes and seconds, as each name ends.
"""
KINDS = {"plan": "A plan", "record": "A record", "profile": "A hardware profile"}
MODULES = (schema, record, profile, table, ranks, graph)


def plain(text: str) -> str:
    """Return a docstring's text in Markdown."""
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`")


def cell(text: str) -> str:
    """Return a text for a table: a bar would end its cell, and so would one within code."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)


def fields_of(made: ast.ClassDef) -> dict[str, tuple[str, str]]:
    """Return the type and the text of each field of a class, as they stand in its source."""
    found: dict[str, tuple[str, str]] = {}
    for field, after in zip(made.body, [*made.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            text = inspect.cleandoc(ast.literal_eval(after.value)).strip() if told else ""  # type: ignore[union-attr]
            found[ast.unparse(field.target)] = (ast.unparse(field.annotation), text)
    return found


def texts() -> dict[str, tuple[str, str]]:
    """Return the type and the text of each option of a plan."""
    (made,) = ast.parse(inspect.getsource(request.PlanOptions)).body
    assert isinstance(made, ast.ClassDef)
    return fields_of(made)


def options_page() -> str:
    rows = []
    for name, (kind, text) in texts().items():
        row = OPTIONS.get(name)
        words = [] if row is None else [word for one in row.said for word in (*one.opts, *one.secondary_opts)]
        said = ", ".join(f"`{word}`" for word in words if word.startswith("--"))
        if row is not None and row.with_script:
            said += " ∗"
        rows.append(f"| `{name}` | `{cell(kind)}` | {cell(plain(text))} | {said} |\n")
    return OPTIONS_PAGE + "".join(rows)


def commands_page() -> str:
    with click.Context(group, info_name="memplan", **group.context_settings) as context:
        return COMMANDS_PAGE + "".join(_command(context, command, name) for name, command in group.commands.items())


def _command(above: click.Context, command: click.Command, name: str) -> str:
    with click.Context(command, info_name=name, parent=above, **command.context_settings) as context:
        if isinstance(command, click.Group):
            return "".join(_command(context, inner, name) for name, inner in command.commands.items())
        rows = [p.get_help_record(context) for p in command.get_params(context) if isinstance(p, click.Option)]
        lines = [f"| `{cell(said)}` | {cell(' '.join(text.split()))} |" for said, text in filter(None, rows)]
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        told = inspect.cleandoc(command.help or "")
        return "\n".join(
            [f"\n## {context.command_path}", "", f"    {usage}", "", told, "", "| Option | |", "|---|---|", *lines, ""]
        )


def python_page() -> str:
    functions, classes, errors = [], [], []
    for name in memplan.__all__:
        value = attach if name == "attach" else getattr(memplan, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            errors.append(f"| `{name}` | {plain(value.__doc__ or '')} |")
        elif inspect.isclass(value) and name != "PlanOptions":
            classes.append(_class(name, value))
        elif callable(value) and name != "PlanOptions":
            functions.append(function(f"memplan.{name}", value))
    from memplan.trainers.callback import MemplanCallback

    functions.append(function("memplan.trainers.callback.MemplanCallback", MemplanCallback))
    told = ["\n## Errors\n", "| | |", "|---|---|", *errors, ""]
    return PYTHON_PAGE + "\n## Functions\n" + "".join(functions) + "\n## Classes\n" + "".join(classes) + "\n".join(told)


def parameters_of(value: Any) -> dict[str, str]:
    """Return the text of each parameter: the lines of a docstring that begin with its name and a colon."""
    found = re.findall(r"^``(\w+)``: (.*?)(?=^``\w+``: |^$|\Z)", inspect.getdoc(value) or "", re.MULTILINE | re.DOTALL)
    return {name: plain(text[:1].upper() + text[1:]) for name, text in found}


def function(name: str, value: Any, level: int = 3) -> str:
    """Return a function's section: what it does, a row for each parameter, and what else its docstring says."""
    told = parameters_of(value)
    text = re.sub(r"^``\w+``: .*?(?=^``\w+``: |^$|\Z)", "", inspect.getdoc(value) or "", flags=re.MULTILINE | re.DOTALL)
    paragraphs = [plain(one) for one in text.split("\n\n") if one.strip()]
    lines = [f"\n{'#' * level} {name}\n", "\n\n".join(paragraphs), ""]
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    if parameters and told:
        lines += ["| Parameter | Type | Default | |", "|---|---|---|---|"]
    for one in parameters if told else []:
        kind = "" if one.annotation is inspect.Parameter.empty else f"`{cell(str(one.annotation))}`"
        stars = {one.VAR_KEYWORD: "**", one.VAR_POSITIONAL: "*"}.get(one.kind, "")
        default = "" if one.default is inspect.Parameter.empty else f"`{one.default!r}`"
        lines.append(f"| `{stars}{one.name}` | {kind} | {default} | {cell(told[one.name])} |")
    return "\n".join(lines) + "\n"


def _class(name: str, value: type) -> str:
    """Return a class's section, with its public methods; a file's fields are on the page of files."""
    lines = [f"\n### memplan.{name}\n", plain((value.__doc__ or "").split("\n\n")[0]), ""]
    if value.__module__ in (schema.__name__, record.__name__):
        lines.append("Its fields: [files](files.md).\n")
    lines += ["| | |", "|---|---|"]
    for word, member in vars(value).items():
        if word.startswith("_") or not isinstance(member, property | classmethod | staticmethod | type(_class)):
            continue
        signature = "" if isinstance(member, property) else str(inspect.signature(getattr(value, word)))
        signature = re.sub(r"\(self(, )?", "(", signature).replace("'", "")
        lines.append(f"| `{cell(word + signature)}` | {cell(plain(inspect.getdoc(member) or ''))} |")
    return "\n".join(lines) + "\n"


def files_page() -> str:
    told: dict[str, ast.ClassDef] = {}
    for module in MODULES:
        told |= {node.name: node for node in _tree(module).body if isinstance(node, ast.ClassDef)}
    parts = []
    for name, title in KINDS.items():
        parts.append(f"\n## {title}\n\nSchema: `schemas/{name}.json`.\n")
        for kind, definition in json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))["$defs"].items():
            made = fields_of(told[kind])
            parts.append(
                f"\n### {kind}\n\n{plain(definition.get('description', ''))}\n\n| Field | Type | |\n|---|---|---|\n"
            )
            parts += [
                f"| `{field}` | `{cell(made[field][0])}` | {cell(plain(made[field][1]))} |\n"
                for field in definition["properties"]
            ]
    return FILES_PAGE + "".join(parts)


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


PAGES = {"options.md": options_page, "command_line.md": commands_page, "python.md": python_page, "files.md": files_page}


def main() -> None:
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
