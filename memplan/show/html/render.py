"""The page written down: one file, or a frame in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from memplan.atomic_write import write as write_file
from memplan.program.record import RunRecord
from memplan.program.results import Point
from memplan.program.schema import Plan
from memplan.show.glyphs import RICH
from memplan.show.html.tables import size, time
from memplan.show.html.view import Machine, page


def text(
    plan: Plan, record: RunRecord | None = None, points: Sequence[Point] = (), machine: Machine | None = None
) -> str:
    """Return the page. Raises PlanMismatchError where ``record`` is of another plan."""
    return _environment().get_template("page.html").render(page=page(plan, record, points, machine))


def write(
    path: str | Path,
    plan: Plan,
    record: RunRecord | None = None,
    points: Sequence[Point] = (),
    machine: Machine | None = None,
) -> None:
    """Write the page, whole or not at all; ``-`` is standard output. Raises InputError where the file cannot be
    written.
    """
    write_file(path, text(plan, record, points, machine).encode())


_THEMES = "".join(
    f":is({where}) .memplan-report{{color-scheme:{scheme}}}"
    for scheme, where in (
        ("light", "[data-jp-theme-light=true],.vscode-light,html[theme=light]"),
        ("dark", "[data-jp-theme-light=false],.vscode-dark,html[theme=dark]"),
    )
)
"""The page goes with the colours of the notebook, where that says what they are (Jupyter, VS Code, Colab); else with
the system's. Nothing but the frame is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The page as notebooks show it: in a frame of its own, so that neither's style reaches the other."""

    page: str
    plain: str
    """For whoever shows no HTML."""

    def _repr_html_(self) -> str:
        # The text is for those who show HTML but no frames: a notebook that is not trusted, a forge.
        return (
            f"<style>{_THEMES}</style>"
            f'<iframe title="memplan report" class="memplan-report" sandbox srcdoc="{html.escape(self.page)}" '
            'style="width:100%;height:44rem;border:0" loading="lazy"></iframe>'
            f"<details><summary>The report as text</summary><pre>{html.escape(self.plain)}</pre></details>"
        )

    def __repr__(self) -> str:
        return self.plain


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_safe,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": size, "time": time, "share": _share}
    return environment


def _share(value: float) -> str:
    """Return a share as a length of CSS."""
    return f"{100 * value:.2f}%"


def _safe(value: object) -> object:
    """Write out what could steer the reader's eye: names come from other people's models. jinja2 escapes the rest."""
    return RICH.safe(value) if isinstance(value, str) and not isinstance(value, Markup) else value
