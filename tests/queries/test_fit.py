"""The most that fits: one more does not, unless the model itself takes no more."""

from __future__ import annotations

import json

import pytest

import memplan
from memplan.case import case_of
from memplan.cli import main
from memplan.errors import DoesNotFitError, InputError
from memplan.program.schema import Budgets
from memplan.queries import fit as fitting
from memplan.request import Request
from tests.queries.small import config_of
from tests.support.training import CPU

GIVEN = {"hardware": CPU, "ram": "1GiB"}


def fits(shape, rank, vram):
    case = case_of(
        Request.of(
            config_of("llama"), shape, {"adapter": {"rank": rank, "targets": "all-linear"}, "vram": vram, **GIVEN}
        )
    )
    return case.least_vram_bytes() <= vram


@pytest.mark.full
def test_one_more_does_not_fit():
    shape, rank = (2, 16), 4
    least = case_of(
        Request.of(config_of("llama"), shape, {"adapter": {"rank": rank, "targets": "all-linear"}, "vram": 1, **GIVEN})
    )
    vram = least.least_vram_bytes() * 3
    found = memplan.fit(config_of("llama"), shape, rank=rank, vram=vram, **GIVEN)
    (batch, at), (most_rank, _) = found.most["batch"], found.most["rank"]
    assert at.peak_bytes <= vram
    assert batch > 2
    assert fits((batch, 16), rank, vram)
    assert not fits((batch + 1, 16), rank, vram)
    assert most_rank >= 8
    assert most_rank % 8 == 0
    assert fits(shape, most_rank, vram)
    assert not fits(shape, most_rank + 8, vram)
    assert found.asked.vram_bytes == vram
    assert found.least.vram_bytes * 3 == vram
    assert found.least.step_s >= found.least_at.step_s >= found.whole.step_s
    assert found.least_at.step_s <= found.whole.step_s * 1.05
    assert found.quantized == {}  # it is no name of a model


@pytest.mark.full
def test_positions_bound_the_sequence():
    config = config_of("gpt2")
    found = memplan.fit(config, (1, 16), rank=4, vram="1GiB", **GIVEN)
    sequence, _ = found.most["sequence"]
    assert "sequence" in found.bounded
    assert sequence == config.n_positions // 64 * 64


@pytest.mark.full
def test_what_does_not_fit_at_all():
    found = memplan.fit(config_of("llama"), (64, 64), rank=4, vram="100KiB", **GIVEN)
    assert found.asked is None
    assert found.most["rank"] is None
    assert found.least.vram_bytes > 100 * 1024
    with pytest.raises(DoesNotFitError):
        memplan.plan(config_of("llama"), (64, 64), adapter={"rank": 4}, vram="100KiB", **GIVEN)


def test_bad_input():
    with pytest.raises(InputError, match="slowdown"):
        memplan.fit(config_of("llama"), (1, 16), slowdown=float("nan"), **GIVEN)
    with pytest.raises(InputError):
        memplan.fit(config_of("llama"), (0, 16), vram="1GiB", **GIVEN)


@pytest.mark.full
def test_on_the_command_line(capsys):
    command = ["fit", "smollm2-135m", "--seq", "64", "--hardware", "rtx-4090", "--ram", "8GiB", "--vram", "2GiB"]
    assert main([*command, "--json", "--quantizations"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["most"]["batch"][0] > 1
    assert found["quantized"]["nf4"]["step_s"] > 0
    assert main([*command[:-1], "300MiB", "--batch", "64"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "greatest batch" in shown
    assert main([*command, "--activations", "keep"]) == 2


class _Needs:
    """A case of which only the need is known."""

    def __init__(self, need: int, budget: int) -> None:
        self.budgets = Budgets(vram_bytes=budget, ram_bytes=0, disk_bytes=0)
        self._need = need

    def least_vram_bytes(self) -> int:
        return self._need


@pytest.mark.parametrize(
    ("need", "expected"),
    [
        (lambda size: max(1000, 10 * size), 500),
        (lambda size: 1000 if size < 3000 else 9000, 2999),
        (lambda size: size * size // 100, 707),
        (lambda size: 10 * size + (3000 if size > 77 else 0), 200),
    ],
)
def test_few_sizes_are_looked_at(need, expected, monkeypatch):
    """Each is a trace of a model: however memory grows, some two dozen will do."""
    tried = []

    def make(size):
        tried.append(size)
        return _Needs(need(size), 5000)

    monkeypatch.setattr(_Needs, "place", lambda self: None, raising=False)
    monkeypatch.setattr(fitting, "point_of", lambda plan: None)
    (found, _), bounded = fitting._greatest(make, 1, 1, 4096)
    assert found == expected
    assert not bounded
    assert len(tried) <= 24
