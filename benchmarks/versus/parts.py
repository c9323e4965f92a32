"""Parts: one model, batch and card each, short enough to be run one by one."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.versus.contenders import CARD, PEERS, PLANNED
from benchmarks.versus.models import Model, known, small


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is run together, and the table that comes of it."""

    name: str
    device: str
    model: Model
    shape: tuple[int, int]
    """Rows, and tokens of a row."""
    rounds: int
    steps: int
    """Of a round."""
    seconds: int
    """After which no turn begins; one answer may take half of what is left."""
    card_gib: int | None = None
    checkpointing: bool = False
    contenders: tuple[str, ...] = ("whole", *PLANNED, *PEERS)

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


def _cpu(name: str, kind: str, tokens: int = 192) -> Part:
    return Part(name=name, device="cpu", model=small(kind), shape=(1, tokens), rounds=10, steps=1, seconds=300)


CPU = (_cpu("cpu-llama", "llama"), _cpu("cpu-moe", "mixtral"), _cpu("cpu-t5", "t5"))
TINY = Part(
    name="cpu-tiny",
    device="cpu",
    model=small("llama", width=64, layers=4),
    shape=(1, 64),
    rounds=2,
    steps=2,
    seconds=150,
)
"""For tests: seconds."""


def _shape(tokens: int) -> tuple[int, int]:
    return (max(1, tokens // 2048), min(tokens, 2048))


def _cuda() -> tuple[Part, ...]:
    """Return a part of every model and length, and of every card that is emulated."""
    found = []
    lengths = (256, 1024, 2048, 4096, 16384)
    decoders = [
        known("llama-3.1-8b"),
        known("llama-3.1-8b", nf4=True),
        known("qwen3-14b"),
        known("qwen3-14b", nf4=True),
        known("llama-3.1-70b", nf4=True),
        known("mixtral-8x7b", num_hidden_layers=16),  # all 32 are 93 GB of checkpoint and as much RAM
        known("bloomz-7b1"),
        known("bloomz-7b1", "float32"),
    ]
    seeds = [known("t0-3b", "float32"), known("t0-3b"), known("mt0-xxl"), known("mt0-xxl", "float32")]
    cases = [(model, _shape(tokens)) for model in decoders for tokens in lengths]
    cases += [(model, shape) for model in seeds for shape in ((1, 256), (8, 256), (8, 512))]
    cases += [(known("flux"), (rows, 4096)) for rows in (1, 4)]
    for model, shape in cases:
        name = f"{model.name}-{shape[0] * shape[1]}"
        found.append(Part(name=name, device="cuda", model=model, shape=shape, rounds=2, steps=4, seconds=420))
    for gib in (8, 12, 16, 24):
        for model in (*decoders[:5], known("mt0-xxl"), known("flux")):
            shape = (1, 4096) if model.is_flux else (1, 512) if "mt0" in model.name else (1, 2048)
            found.append(
                Part(
                    name=f"{model.name}-{shape[0] * shape[1]}-card-{gib}",
                    device="cuda",
                    model=model,
                    shape=shape,
                    rounds=2,
                    steps=4,
                    seconds=420,
                    card_gib=gib,
                    checkpointing=True,
                    contenders=("whole", *CARD, *PEERS),
                )
            )
    return tuple(found)


CUDA = _cuda()
"""Unproven: no GPU has run them."""
ALL = {part.name: part for part in (*CPU, TINY, *CUDA)}
