"""Texts that users read have the field's words: what memplan used to call its own way is gone from them.

Read are the string literals of the package, f-strings too; docstrings of what ``memplan`` exports and of commands
(their help); pages; the documents but for the log and the design notes. What cannot be told apart by a pattern
("pass" for a micro-batch, "rows" of an embedding) is not looked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import memplan

ROOT = Path(__file__).parents[1]

OLD = {
    # ---- terms
    r"\bhold(s|ing)? (everything|every weight)\b": "keep all weights on the GPU",
    r"\b(link|compute|disk|that|which|what) binds\b": "PCIe-bound, compute-bound, disk-bound",
    r"\bpage[- ]lock(ed|s|ing)\b": "pinned",
    r"\b(a|one|the|this|each|per) pass\b(?! (over|through))|\bpasses of a step\b": "micro-batch",
    r"\bslots?\b": "streaming buffer",
    r"\bstall(s|ed|ing)?\b": "waiting",
    r"(?<!embedding )\brows/pass\b": "embedding rows/pass",
    r"\b(lies?|lain|lying) (in|on|at|there|where|beside|beyond|below|above)\b": "is in, is on",
    r"\bneed not lie\b": "don't have to stay",
    r"\bstands? (in the|on the|there|where)\b": "is in, is reached in",
    r"\bdone over\b": "retried",
    r"\bto the last bit\b": "bit-identical",
    r"\bas is (fastest|faster|shorter)\b": "whichever is faster",
    r"\bstands? aside\b": "inactive",
    r"\b(are|is|was|were|be) told\b|\btold (of|that)\b": "printed, called with",
    r"\ba line a (step|pass)\b": "one line per step",
    r"\bby symptom\b": "Troubleshooting",
    # ---- wordings
    r"\bmay have page-locked\b": "Maximum pinned host memory",
    r"\bits state counts\b": "sizes its state",
    r"\bchosen among all three\b|\bone look more\b": "picks per layer (one extra trace)",
    r"\bhave more room where activations\b": "use memory that activations leave free",
    r"\bas a step is shorter\b": "whichever is faster",
    r"\bof the whole run, for its time\b": "Total steps, to estimate run time",
    r"\bthat the least vram may cost\b": "Slowdown accepted for the minimum vram",
    r"\bplan does not hold\b|\bmend what was edited\b": "the plan is invalid: ... re-create it, or undo the edit",
    r"\bwas to be trained in\b|\bthe least that works\b": "needs at least ...; the budget is ...",
    r"\bwas to be written to\b": "cannot write ... to ...",
    r"\btorch cannot be asked\b": "torch failed to query the GPU",
    r"\bpeak stands\b": "VRAM peaks in",
    r"\bwithin [\d.{}]+%? of any plan\b": "at most ... above the lower bound",
    r"\bmade again in\b": "recomputed in",
    r"\bcalls itself\b": "has id",
    r"\bnothing can move\b": "deadlock",
    r"\bhas no say\b": "cannot set",
    r"\bits forward was before\b": "backward of ... ran after detach()",
    r"\bhas come home\b": "once placed",
    r"\bfails unheard\b": "errors in flight are discarded",
    r"\bcircle that no one sees\b": "reference cycle",
    r"\bset themselves up\b": "create and use",
    r"\binstead of it a name\b": "or pass a model name",
    r"\bcommand keeps graphs\b": "analyses are cached",
    r"\bmemplan cannot help\b": "unsupported setups run unchanged",
    r"\ba GPU has proven\b": "until validated on a GPU",
    r"\ba contender, in turns\b": "one process each, interleaved",
    r"\bwhat the most is that fits\b": "find the largest ... that fit",
    r"\ba script as it is\b": "run an unmodified script",
    r"\bcannot be had\b": "could not be fetched",
    r"\bcalled measured\b": "predicted unless marked measured",
    r"\bone step of a drawing\b": "x-axis: module calls, not to scale",
    r"\bbackwards hand on\b": "gradients between layers",
    r"\bno plan can beat\b": "the lower bound",
}
"""Old wordings (no matter the case), and what is said in their place."""

ALLOWED = {
    "spread in equal slots": "the name of a published baseline in measured tables, and a key of theirs",
}
"""Texts in which an old word stays, each with the reason."""

CODE = {
    "docs/architecture.md": {"slot", "slots", "stall"},
    "docs/stages/run.md": {"slot", "slots"},
    "docs/reference/files.md": {"slots"},
}
"""Pages, with words in which they name what the code and its files call so."""

_ANY = re.compile("|".join(f"(?:{pattern})" for pattern in OLD), re.IGNORECASE)
_NAME = re.compile(r"[\w.-]*")
"""Of a literal: a key, an identifier, a class of CSS; no text."""
Text = tuple[Path, int, str]


def of_code(path: Path, *, docstrings: frozenset[str]) -> Iterator[Text]:
    """Yield what a module may show: its literals, and the docstrings of commands and of what is exported by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    silent = set(_unshown(tree, docstrings))
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield path, node.lineno, "".join(parts)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside | silent
            and not _NAME.fullmatch(node.value)
        ):
            yield path, node.lineno, node.value


def _unshown(tree: ast.Module, docstrings: frozenset[str]) -> Iterator[int]:
    """Yield the literals that are documentation for contributors."""
    shown: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            command = any(".command" in ast.unparse(decorator) for decorator in node.decorator_list)
            if command or node.name in docstrings:
                members = (one for one in node.body if not getattr(one, "name", "").startswith("_"))
                shown |= {id(node), *map(id, members)}
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for child in body if isinstance(body, list) and id(node) not in shown else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                yield id(child.value)


def of_prose(path: Path) -> Iterator[Text]:
    """Yield the paragraphs of a document or a page, without its code and its comments."""
    text = path.read_text(encoding="utf-8")
    blank = lambda match: re.sub(r"[^\n]", " ", match[0])  # noqa: E731  (lines keep their numbers)
    text = re.sub(r"```.*?```|<!--.*?-->|\{#.*?#\}|\{%.*?%\}|\{\{.*?\}\}", blank, text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]+`|\]\([^)\n]*\)|class=\S+", blank, text)
    line = 1
    for part in re.split(r"(\n\s*\n)", text):
        if part.strip():
            yield path, line, part
        line += part.count("\n")


@cache
def texts() -> tuple[Text, ...]:
    """Return all that users read."""
    exported: dict[str, set[str]] = {}
    for name in memplan.__all__:
        module = getattr(getattr(memplan, name), "__module__", None)
        if module is not None:
            exported.setdefault(module, set()).add(name)
    found: list[Text] = []
    for path in sorted((ROOT / "memplan").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found += of_code(path, docstrings=frozenset(exported.get(module, ())))
    pages = sorted((ROOT / "memplan").rglob("*.html"))
    notes = {ROOT / "docs" / "log.md", ROOT / "docs" / "design.md"}
    documents = [
        path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in notes and "_build" not in str(path)
    ]
    for path in (*pages, ROOT / "README.md", *documents):
        found += of_prose(path)
    return tuple(found)


def old_words(text: str) -> list[str]:
    """Return the old wordings in a text."""
    return [match[0] for match in _ANY.finditer(" ".join(text.split()))]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_texts_have_the_words_of_the_field() -> None:
    found = [
        f"{name(path)}:{line}: {word!r} in {' '.join(text.split())[:100]!r}: {_better(word)}"
        for path, line, text in texts()
        if text not in ALLOWED
        for word in old_words(text)
        if word.lower() not in CODE.get(name(path), ())
    ]
    assert not found, "\n".join(found)


def test_what_is_allowed_is_there_and_needs_it() -> None:
    shown = {text for _, _, text in texts()}
    for text, reason in ALLOWED.items():
        assert text in shown, text
        assert old_words(text), text
        assert reason
    for page, words in CODE.items():
        found = {word.lower() for path, _, text in texts() if name(path) == page for word in old_words(text)}
        assert words <= found, page


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise ValueError(f"{name} is page-locked")', ["page-locked"]),
        ('"""It stalls."""\nx = 1', []),  # for contributors
        ('def public():\n    """It stalls."""', ["stalls"]),
        ('def _private():\n    """It stalls."""', []),
        ('@group.command()\ndef of_a_command():\n    """It is\n    page-locked."""', ["page-locked"]),
        ('class Kept:\n    """Fields."""\n    field: int\n    """It stalls."""', ["stalls"]),
        ('key = {"stall_s": 1, "slots": 2}', []),
    ],
)
def test_texts_of_code_are_seen(source: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    shown = of_code(path, docstrings=frozenset({"public", "Kept"}))
    assert [word for _, _, text in shown for word in old_words(text)] == found


def test_prose_is_seen_and_code_in_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# Pages\n\nIt is page-locked,\nand done\nover.\n\n```\nstall\n```\n\nA `stall` of [it](lies on).\n"
    )
    assert [(line, old_words(text)) for _, line, text in of_prose(path) if old_words(text)] == [
        (3, ["page-locked", "done over"])
    ]


def _better(word: str) -> str:
    return next(better for pattern, better in OLD.items() if re.fullmatch(pattern, word, re.IGNORECASE))
