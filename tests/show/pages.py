"""Pages read back: what a browser would find in them, without one."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


@dataclass
class Element:
    """One element; ``children`` are elements and texts in their order."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def all(self, *tags: str) -> list[Element]:
        """Return every element of these tags inside, in their order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += [child] if child.tag in tags else []
                found += child.all(*tags)
        return found

    def text(self, *without: str, hidden: bool = True) -> str:
        """Return all text inside, that of the tags ``without`` left out; elements are a space apart.

        ``hidden``: with what screen readers leave out too.
        """
        parts = [
            child if isinstance(child, str) else child.text(*without, hidden=hidden)
            for child in self.children
            if isinstance(child, str)
            or (child.tag not in without and (hidden or child.attributes.get("aria-hidden") != "true"))
        ]
        return " ".join(" ".join(parts).split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute twice: {attrs}"
        made = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> where {self.open[-1].tag} is open"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.open[-1].children.append(data)


def read(text: str) -> Element:
    """Return the page. Fails where elements are not closed in their order, or an attribute comes twice."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"{reader.open[-1].tag} is not closed"
    return reader.root


def tables(page: Element) -> dict[str, list[tuple[str, ...]]]:
    """Return the rows of every table by its id, the head first."""
    found = {
        table.attributes["id"]: [
            tuple(cell.text() for cell in row.children if isinstance(cell, Element)) for row in table.all("tr")
        ]
        for table in page.all("table")
    }
    assert len(found) == len(page.all("table")), "two tables have one id"
    return found
