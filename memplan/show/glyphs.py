"""How a report is written down: marks and colours for a terminal, ASCII for a pipe, a file or an issue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.units import format_seconds

if TYPE_CHECKING:
    from memplan.program.schema import Tier

_STYLES: dict[Tier, str] = {"device": "green", "host": "yellow", "disk": "cyan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyphs:
    """The marks of one kind of output."""

    device: str
    host: str
    disk: str
    recomputed: str
    offloaded: str
    dots: str
    times: str
    rule: str
    ascii_only: bool

    def mark(self, tier: Tier) -> str:
        """Return the mark of a block that lives in ``tier``."""
        return {"device": self.device, "host": self.host, "disk": self.disk}[tier]

    def style(self, tier: Tier) -> str:
        """Return the colour of ``tier``."""
        return _STYLES[tier]

    def seconds(self, seconds: float) -> str:
        """Return a time for people."""
        text = format_seconds(seconds)
        return text.replace("µ", "u") if self.ascii_only else text

    def safe(self, text: str) -> str:
        """Return a user's text with what could steer a terminal written out: names come from other people's models."""
        return "".join(letter if self._shown(letter) else ascii(letter)[1:-1] for letter in text)

    def _shown(self, letter: str) -> bool:
        return letter.isprintable() and (letter.isascii() or not self.ascii_only)


PLAIN = Glyphs(
    device="#", host="o", disk=".", recomputed="^", offloaded=">", dots="...", times="x", rule="-", ascii_only=True
)
RICH = Glyphs(
    device="█",
    host="▒",
    disk="░",
    recomputed="^",
    offloaded=">",
    dots="…",
    times="\N{MULTIPLICATION SIGN}",
    rule="─",
    ascii_only=False,
)
