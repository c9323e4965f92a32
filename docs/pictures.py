"""Takes pictures of reports, on a page and in a terminal:  python docs/pictures.py [FOLDER]

Pages are taken in headless Chromium at the widths of a phone, a tablet and a desktop, terminals drawn by rich, both
light and dark. All go to ``docs/_build/pictures``, or FOLDER; what these documents show is copied to ``docs/figures``.
Nothing in them is measured: they are of plans. Needs the ``docs`` extra, and Chromium for pages (``MEMPLAN_CHROMIUM``,
else what is on the path).
"""

from __future__ import annotations

import html
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

import memplan
from memplan import api
from memplan.errors import DoesNotFitError
from memplan.show import first_screen, terminal
from memplan.show.first_screen import Beside
from memplan.show.glyphs import RICH
from memplan.units import GIB

HERE = Path(__file__).parent
FIGURES = HERE / "figures"
WIDTHS = (400, 768, 1280)
"""Of a page, in CSS pixels."""
COLUMNS = (60, 80, 120)
THEMES: Mapping[str, TerminalTheme] = {"light": DEFAULT_TERMINAL_THEME, "dark": DIMMED_MONOKAI}
SHOWN = "report"
"""The page of which the documents show the head: all above its tables."""
SHOWN_SIZE = (900, 1490)
"""Width and height of that, in CSS pixels."""

_NARROWEST = 500
"""Chromium's least window: a narrower page is taken in a frame."""
_TALLEST = 12_000
_REMOTE_FONTS = re.compile(r"@font-face \{\{.*?\n    \}\}\n", re.DOTALL)


CASE: dict[str, Any] = {
    "adapter": {"rank": 16, "targets": "all-linear"}, "dtype": "bf16", "hardware": "rtx-3060-12gb",
}  # fmt: skip
CASES: Mapping[str, tuple[tuple[int, int], dict[str, Any]]] = {
    SHOWN: ((1, 2048), {**CASE, "vram": "8GiB", "ram": "48GiB"}),
    "disk": ((1, 512), {**CASE, "vram": "5GiB", "ram": "6GiB", "disk": "24GiB"}),
}
"""What pages are of, all of Qwen3-8B: a card of today, and RAM that does not hold the model."""


def screens(plan: memplan.Plan) -> dict[str, Callable[[], RenderableType]]:
    """Return what a terminal shows, by the name of its picture: anything that rich prints."""
    return {
        "first": lambda: first_screen.screen(
            plan,
            Beside(device_bytes=12 * GIB, next_command="memplan run --vram 8GiB --ram 48GiB -- python train.py"),
            RICH,
        ),
        "plan": lambda: terminal.render(plan),
        "does-not-fit": _failure,
    }


def terminal_picture(made: RenderableType, columns: int, theme: TerminalTheme, title: str) -> str:
    """Return what a terminal of so many columns shows, as SVG."""
    console = Console(
        record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    console.print(made)
    return console.export_svg(title=title, theme=theme, code_format=_REMOTE_FONTS.sub("", CONSOLE_SVG_FORMAT))


def page_picture(page: str, width: int, *, dark: bool, scale: float = 1.0) -> Image.Image:
    """Return a page as a browser ``width`` CSS pixels wide shows it, all of its height."""
    frame = (
        "<!doctype html><meta charset=utf-8><style>body{margin:0}iframe{border:0;display:block}</style>"
        f'<iframe width={width} height={_TALLEST} srcdoc="{html.escape(page)}"></iframe>'
    )
    with tempfile.TemporaryDirectory() as folder:
        opened, taken = Path(folder, "page.html"), Path(folder, "page.png")
        measure = "<script>onload=()=>document.title=frames[0].document.documentElement.scrollHeight</script>"
        opened.write_text(frame.replace(f"height={_TALLEST}", "height=10") + measure, encoding="utf-8")
        height = int(re.findall(r"<title>(\d+)</title>", _chromium(folder, dark, "--dump-dom", opened.as_uri()))[0])
        opened.write_text(frame, encoding="utf-8")
        _chromium(
            folder, dark, f"--window-size={max(width, _NARROWEST)},{height}", f"--force-device-scale-factor={scale}",
            f"--screenshot={taken}", opened.as_uri(),
        )  # fmt: skip
        with Image.open(taken) as image:
            return image.crop((0, 0, round(width * scale), round(height * scale))).convert("RGB")


def _chromium(folder: str, dark: bool, *options: str) -> str:
    done = subprocess.run(
        [
            chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=10000", *options,
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"Chromium failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.stdout


def chromium() -> str:
    """Return the browser. Raises SystemExit where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("MEMPLAN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise SystemExit("pages need Chromium: apt-get install chromium, or set MEMPLAN_CHROMIUM to its path")
    return found


def _failure() -> RenderableType:
    try:
        memplan.plan("qwen3-8b", (1, 2048), **{**CASE, "vram": "2GiB", "ram": "48GiB"})
    except DoesNotFitError as error:
        return Text(terminal.failure_text(error))
    raise AssertionError("8B fits 2 GiB")


def main(arguments: Sequence[str]) -> None:
    """Write all pictures."""
    folder = Path(arguments[0]) if arguments else HERE / "_build" / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: memplan.plan("qwen3-8b", batch, **options) for name, (batch, options) in CASES.items()}
    for name, screen in screens(made[SHOWN]).items():
        for columns in COLUMNS:
            os.environ["COLUMNS"] = str(columns)  # for what is set as plain text
            shown = screen()
            for theme, colours in THEMES.items():
                text = terminal_picture(shown, columns, colours, f"memplan {name}, {columns} columns")
                (folder / f"terminal-{name}-{columns}-{theme}.svg").write_text(text, encoding="utf-8")
    for name, plan in made.items():
        batch, options = CASES[name]
        points = memplan.frontier("qwen3-8b", batch, **{key: options[key] for key in options if key != "vram"})
        file = folder / f"page-{name}.html"
        api.report(plan, html=file, points=points)
        for width in WIDTHS:
            for theme in THEMES:
                image = page_picture(file.read_text(encoding="utf-8"), width, dark=theme == "dark")
                image.save(folder / f"page-{name}-{width}-{theme}.png", optimize=True)
    width, height = SHOWN_SIZE
    image = page_picture((folder / f"page-{SHOWN}.html").read_text(encoding="utf-8"), width, dark=False)
    image.crop((0, 0, width, height)).quantize(128).save(FIGURES / "report.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
