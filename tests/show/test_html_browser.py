"""The page in headless Chromium: it opens quickly, nothing is cut at any width, and axe finds nothing serious.

Chromium is ``MEMPLAN_CHROMIUM``, else what is on the path. axe-core is ``MEMPLAN_AXE`` or
``node_modules/axe-core/axe.min.js`` (``npm install axe-core``): it is as large as all the rest, so it is not in the
repository.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from memplan.program.results import point_of
from memplan.program.schema import Plan
from memplan.show.html import render
from tests.show.plans import disk_plan, long_plan, make_plan, make_record, solve_plan
from tests.show.test_html import EVIL

CHROMIUM = os.environ.get("MEMPLAN_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
AXE = Path(os.environ.get("MEMPLAN_AXE", Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"))

if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

POLICY = re.compile(r"<meta http-equiv=Content-Security-Policy[^>]*>")
EDGES = re.compile(r"@media screen { \.wide .*?} }", re.DOTALL)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--hide-scrollbars",
    "--window-size=1400,1000",
)

MEASURE = """
<script>
function cut(frame) {
  const page = frame.contentDocument, width = frame.clientWidth, found = [];
  const scrolls = frame.name == "paper" ? ".none" : ".wide";
  const root = page.scrollingElement;
  if (root.scrollWidth > width) found.push(`the page is ${root.scrollWidth} wide`);
  for (const one of page.querySelectorAll("main *:not(svg, svg *, option)")) {
    const box = one.getBoundingClientRect();
    if (!box.width || one.closest(`.unseen, ${scrolls}`)) continue;
    const what = `${one.tagName} ${one.className}: ${one.textContent.trim().slice(0, 40)}`;
    if (box.right > width + 0.5 || box.left < -0.5) found.push(`beyond the edge: ${what}`);
    if (one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push(`cut: ${what}`);
  }
  for (const one of page.querySelectorAll("td, th, caption:not(.unseen), summary"))
    if (one.clientWidth && one.scrollWidth > one.clientWidth + 1) found.push(`cut: ${one.textContent}`);
  const kinds = "p, dt, dd, caption, h1, h2, h3, li, figcaption, .lane, .axis, .drawing, .bar, .label, .marks";
  const texts = [...page.querySelectorAll(kinds)]
    .filter(one => !one.closest(".unseen, details, caption.unseen") && one.getBoundingClientRect().width > 1);
  for (let i = 0; i < texts.length; i++) for (let j = i + 1; j < texts.length; j++) {
    if (texts[i].contains(texts[j]) || texts[j].contains(texts[i])) continue;
    const a = texts[i].getBoundingClientRect(), b = texts[j].getBoundingClientRect();
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
      found.push(`one over the other: ${texts[i].textContent} / ${texts[j].textContent}`);
  }
  for (const drawing of page.querySelectorAll(".field, .ticks, .upwards")) {
    const words = [...drawing.querySelectorAll("span")].map(one => [one.textContent, one.getBoundingClientRect()]);
    const whole = drawing.getBoundingClientRect();
    for (const [text, box] of words)
      if (box.left < whole.left - 1 || box.right > whole.right + 1) found.push(`beyond its drawing: ${text}`);
    for (let i = 0; i < words.length; i++) for (let j = i + 1; j < words.length; j++) {
      const [one, a] = words[i], [other, b] = words[j];
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)
        found.push(`on one drawing: ${one} / ${other}`);
    }
  }
  return found;
}
addEventListener("load", () => {
  const result = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const style = frame.contentWindow.getComputedStyle(frame.contentDocument.body);
    result[frame.name || frame.width] = {
      cut: cut(frame), paper: style.backgroundColor, seen: frame.contentDocument.querySelectorAll("svg path").length,
    };
  }
  document.body.innerHTML = "<pre id=result></pre>";
  document.getElementById("result").textContent = JSON.stringify(result);
});
</script>
"""


def chromium(folder: Path, *options: str) -> str:
    """Run Chromium with a profile of its own; return what it printed."""
    assert CHROMIUM is not None
    profile = folder / "profile"
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout


def result(folder: Path, page: str, *, dark: bool = False) -> Any:
    """Open a page whose script leaves JSON in ``#result``; return that."""
    (folder / "opened.html").write_text(page, encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = (scheme, "--virtual-time-budget=30000", "--dump-dom")
    printed = chromium(folder, *options, (folder / "opened.html").as_uri())
    found = re.search(r'<pre id="result">(.*?)</pre>', printed, re.DOTALL)
    assert found, printed[-2000:]
    return json.loads(html.unescape(found[1]))


def long_names() -> Plan:
    """Return a plan whose layers have names as long as a phone is wide, without a space."""
    long = "language_model.decoder_with_a_long_name.blocks_of_the_stack"
    return make_plan("dhhkd", rename={index: f"{long}.{index}" for index in range(4)}, stack=long, recomputed=" ^^")


@functools.cache
def made(which: str) -> str:
    plan = {"disk": disk_plan, "run": solve_plan, "long": long_plan, "names": long_names}[which]()
    record = make_record(plan, pass_s=1.0) if which in ("run", "names") else None
    return render.text(plan, record, (point_of(plan),))


@pytest.fixture(params=["disk", "run", "long", "names"])
def page(request: pytest.FixtureRequest) -> str:
    return made(request.param)


@pytest.mark.parametrize(("dark", "opened"), [(True, False), (False, True)], ids=["dark, folded", "light, open"])
def test_nothing_is_cut(tmp_path: Path, page: str, dark: bool, opened: bool) -> None:
    text = page.replace("<details>", "<details open>") if opened else page
    frames = "".join(
        f'<iframe width={width} height=3000 srcdoc="{html.escape(text)}"></iframe>' for width in (360, 768, 1280)
    )
    found = result(tmp_path, f"<!doctype html><meta charset=utf-8>{frames}{MEASURE}", dark=dark)
    assert {width: seen["cut"] for width, seen in found.items()} == {"360": [], "768": [], "1280": []}
    papers = {seen["paper"] for seen in found.values()}
    assert papers == {"rgb(22, 24, 27)" if dark else "rgb(252, 251, 248)"}
    assert min(seen["seen"] for seen in found.values()) > 30


@pytest.mark.skipif(not AXE.is_file(), reason="there is no axe-core: npm install axe-core")
@pytest.mark.parametrize(("which", "dark"), [("disk", True), ("run", False), ("long", False)])
def test_axe_finds_nothing_serious(tmp_path: Path, which: str, dark: bool) -> None:
    script = f"""<script>{AXE.read_text(encoding="utf-8")}</script><script>
      axe.run(document).then(found => {{
        const said = found.violations.map(one => [one.impact, one.id, one.nodes.length, one.nodes[0].html]);
        document.body.innerHTML = "<pre id=result></pre>";
        document.getElementById("result").textContent = JSON.stringify({{said, passes: found.passes.length}});
      }});
    </script>"""
    text = POLICY.sub("", made(which)).replace("<details>", "<details open>").replace("</body>", f"{script}</body>")
    text = EDGES.sub("", text)  # axe judges no contrast over a gradient
    found = result(tmp_path, text, dark=dark)
    assert found["passes"] > 10
    assert [one for one in found["said"] if one[0] in ("serious", "critical")] == []


def test_it_opens_within_a_second(tmp_path: Path) -> None:
    script = """<script>addEventListener("load", () => setTimeout(() => {
      const [entry] = performance.getEntriesByType("navigation");
      document.body.innerHTML = "<pre id=result></pre>";
      document.getElementById("result").textContent = JSON.stringify(entry.loadEventEnd - entry.startTime);
    }))</script>"""
    text = POLICY.sub("", made("long")).replace("</body>", f"{script}</body>")
    (tmp_path / "opened.html").write_text(text, encoding="utf-8")

    def opened_ms() -> float:
        printed = chromium(tmp_path, "--timeout=5000", "--dump-dom", (tmp_path / "opened.html").as_uri())
        found = re.search(r'<pre id="result">([\d.]+)</pre>', printed)
        assert found, printed[-500:]
        return float(found[1])

    assert min(opened_ms() for _ in range(3)) < 1000


def test_what_others_named_runs_nothing(tmp_path: Path) -> None:
    plan = make_plan("dhhd", rename={1: EVIL, 2: '"><img src=x onerror=alert(1)>'}, notes=(EVIL,))
    text = POLICY.sub("", render.text(plan, make_record(plan, pass_s=1.0)))
    catch = "<script>window.ran = 0; window.alert = () => { window.ran += 1 };</script>"
    tell = """<script>addEventListener("load", () => {
      const result = {ran, scripts: document.scripts.length, images: document.images.length};
      document.body.innerHTML = "<pre id=result></pre>";
      document.getElementById("result").textContent = JSON.stringify(result);
    })</script>"""
    text = text.replace("<head>", f"<head>{catch}").replace("</body>", f"{tell}</body>")
    assert result(tmp_path, text) == {"ran": 0, "scripts": 2, "images": 0}
    assert result(tmp_path, f"{catch}<script>alert(1)</script>{tell}<body></body>")["ran"] == 1  # it would be seen


def test_a_frame_keeps_its_style_to_itself(tmp_path: Path) -> None:
    plan: Plan = solve_plan()
    frame = render.Frame(page=render.text(plan), plain="")._repr_html_()
    tell = """<script>addEventListener("load", () => {
      const mine = getComputedStyle(document.querySelector("p")), frame = document.querySelector("iframe");
      const result = {font: mine.fontFamily, height: frame.clientHeight, inside: frame.contentDocument === null};
      document.body.innerHTML = "<pre id=result></pre>";
      document.getElementById("result").textContent = JSON.stringify(result);
    })</script>"""
    style = "<style>p { font-family: monospace }</style>"
    found = result(tmp_path, f"<!doctype html>{style}<p>a notebook</p>{frame}{tell}")
    assert found == {"font": "monospace", "height": 704, "inside": True}


@pytest.mark.parametrize(
    ("told", "dark", "paper"),
    [
        ("data-jp-theme-light=false", False, "rgb(22, 24, 27)"),
        ("data-jp-theme-light=true", True, "rgb(252, 251, 248)"),
        ("class=vscode-dark", False, "rgb(22, 24, 27)"),
        ("", True, "rgb(22, 24, 27)"),
    ],
)
def test_a_frame_has_the_colours_of_its_notebook(tmp_path: Path, told: str, dark: bool, paper: str) -> None:
    frame = render.Frame(page=made("run"), plain="")._repr_html_().replace(" sandbox ", " ")  # to look inside
    tell = """<script>addEventListener("load", () => {
      const frame = document.querySelector("iframe"), page = frame.contentDocument;
      const result = {paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor};
      document.body.innerHTML = "<pre id=result></pre>";
      document.getElementById("result").textContent = JSON.stringify(result);
    })</script>"""
    assert result(tmp_path, f"<!doctype html><body {told}><p>a notebook</p>{frame}{tell}", dark=dark) == {
        "paper": paper
    }


def printed(folder: Path, page: str) -> list[bytes]:
    """Return the pages of a page as it is printed to PDF: their sizes."""
    (folder / "opened.html").write_text(page, encoding="utf-8")
    chromium(
        folder,
        "--blink-settings=preferredColorScheme=0",
        "--no-pdf-header-footer",
        f"--print-to-pdf={folder / 'page.pdf'}",
        (folder / "opened.html").as_uri(),
    )
    data = (folder / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    return [one[1] for one in re.finditer(rb"/Type\s*/Page\b.*?/MediaBox\s*\[([\d. ]+)\]", data, re.DOTALL)]


def test_what_is_folded_is_printed(tmp_path: Path) -> None:
    opened = printed(tmp_path, made("run").replace("<details>", "<details open>"))
    folded = printed(tmp_path, made("run"))
    assert folded == opened
    assert 3 <= len(folded) <= 12
    if shutil.which("pdftotext"):
        text = subprocess.run(
            ["pdftotext", "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True, check=True
        )
        for caption in ("Device memory at every access", "The pass, access by access", "Every block"):
            assert caption in text.stdout
        assert re.search(r"^ *0 +forward ", text.stdout, re.MULTILINE)


@pytest.mark.parametrize("which", ["disk", "run", "names", pytest.param("long", marks=pytest.mark.full)])
def test_on_paper_nothing_is_cut(tmp_path: Path, which: str) -> None:
    """Folded tables and those that scroll on a screen too: in the width of a page of A4 between its margins."""
    text = made(which).replace("@media print", "@media all").replace("@media screen", "@media not all")
    frame = f'<iframe name=paper width=718 height=3000 srcdoc="{html.escape(text)}"></iframe>'
    found = result(tmp_path, f"<!doctype html><meta charset=utf-8>{frame}{MEASURE}")
    assert found["paper"]["cut"] == []
