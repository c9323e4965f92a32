"""Writes the page of a plan's options from the one list of them:  python docs/options.py"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from memplan import request
from memplan.cli.options import OPTIONS

PAGE = Path(__file__).with_name("options.md")
ABOVE = """# The options of a plan

Written by `make docs` from `memplan.PlanOptions`. Each is a keyword of `memplan.plan`, `frontier`, `fit`, `wrap`,
`placing` and `memplan.trainers.lightning.Placement` alike; one that there is none of is refused with the
names that are near it, and so is one that makes no sense where it is given, such as `dtype` for a model that is built
already. The last column has the words of `memplan plan`, `frontier` and `fit`; those with a ∗ are also of `memplan
run`, where what is given goes before what the script's trainer says.

| Option | Type | What it is | On the command line |
|---|---|---|---|
"""


def texts() -> dict[str, tuple[str, str]]:
    """Return the type and the text of each field, as they stand in the source."""
    (made,) = ast.parse(inspect.getsource(request.PlanOptions)).body
    assert isinstance(made, ast.ClassDef)
    found: dict[str, tuple[str, str]] = {}
    for field, text in zip(made.body[1::2], made.body[2::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        assert isinstance(text, ast.Expr)
        found[ast.unparse(field.target)] = (
            ast.unparse(field.annotation),
            inspect.cleandoc(ast.literal_eval(text.value)).strip(),
        )
    return found


def page() -> str:
    """Return the text of ``docs/options.md``."""
    rows = []
    for name, (kind, text) in texts().items():
        row = OPTIONS.get(name)
        words = [] if row is None else [word for one in row.said for word in (*one.opts, *one.secondary_opts)]
        said = ", ".join(f"`{word}`" for word in words if word.startswith("--"))
        if row is not None and row.with_script:
            said += " ∗"
        plain = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split())).replace("``", "`")
        rows.append(f"| `{name}` | `{kind}` | {plain} | {said} |")
    return ABOVE + "".join(f"{_escaped(row)}\n" for row in rows)


def _escaped(row: str) -> str:
    """A bar within code ends a cell unless it is written so."""
    return re.sub(r"`[^`]*`", lambda code: re.sub(r"(?<!\\)\|", r"\\|", code[0]), row)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
