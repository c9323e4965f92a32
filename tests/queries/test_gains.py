"""What a little more would bring: each of it the solver's, and an estimate of chunks beside a loss that has them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.case import case_of
from memplan.cost.chunked import CHUNK_TOKENS, chunked_loss
from memplan.program.schema import Plan
from memplan.queries.frontier import budgets_of
from memplan.queries.gains import with_gains
from memplan.request import Request
from memplan.show.terminal import text
from tests.queries.small import config_of
from tests.support.training import CPU

GIVEN = {"adapter": {"rank": 4}, "hardware": CPU, "ram": "1GiB"}


@pytest.fixture(scope="module")
def tight():
    case = case_of(Request.of(config_of("llama"), (2, 16), {"vram": "1GiB", **GIVEN}))
    low, high = budgets_of(case, 2)
    return case, low, high, case.place(vram_bytes=(low + high) // 2)


def test_each_is_what_a_plan_with_it_takes(tight):
    case, low, _, _ = tight
    made = with_gains(case.place(vram_bytes=low, pieces=False))
    by_name = {gain.of: gain for gain in made.gains}
    assert by_name.keys() == {"vram", "link"}
    more = case.place(vram_bytes=low + by_name["vram"].more)
    assert by_name["vram"].pass_s == pytest.approx(more.prediction.pass_s)
    rate = case.table.host_to_device_bytes_per_s + by_name["link"].more
    faster = dataclasses.replace(case, table=replace(case.table, host_to_device_bytes_per_s=rate))
    taken = faster.place(vram_bytes=low, pieces=False).prediction.pass_s
    assert taken <= by_name["link"].pass_s < made.prediction.pass_s


def test_nothing_is_gained_where_everything_is_there(tight):
    _, _, high, _ = tight
    made = memplan.plan(config_of("llama"), (2, 16), vram=high, **GIVEN)
    assert made.gains == ()


def test_what_was_asked_holds(tight):
    """With everything recomputed by order, more memory ends the waiting alone."""
    _, low, _, _ = tight
    made = memplan.plan(config_of("llama"), (2, 16), vram=low, activations="recompute", **GIVEN)
    (gain,) = [gain for gain in made.gains if gain.of == "vram"]
    assert gain.pass_s == pytest.approx(made.prediction.compute_s)


def test_it_is_in_the_report_and_in_the_file(tight, tmp_path):
    _, low, _, _ = tight
    made = memplan.plan(config_of("llama"), (2, 16), vram=low, **GIVEN)
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.gains == made.gains != ()
    shown = text(again)
    assert "With 1.00 GiB more vram a micro-batch would be" in shown


class _InChunks(torch.nn.Module):
    """A model whose loss is computed for so many tokens at a time, the logits made again for their gradient."""

    def __init__(self, config):
        super().__init__()
        self.inner = LlamaForCausalLM(config)

    def forward(self, input_ids, labels):
        hidden = self.inner.model(input_ids).last_hidden_state.flatten(0, 1)

        def part(hidden, labels):
            return functional.cross_entropy(self.inner.lm_head(hidden).float(), labels, reduction="sum")

        parts = zip(hidden.split(CHUNK_TOKENS), labels.flatten().split(CHUNK_TOKENS), strict=True)
        return {"loss": sum(checkpoint(part, h, wanted, use_reentrant=False) for h, wanted in parts) / labels.numel()}


def test_chunks_take_about_what_a_loss_in_chunks_takes():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=16384,
        tie_word_embeddings=False,
    )  # fmt: skip
    batch = {"input_ids": torch.zeros(4, 1024, dtype=torch.long), "labels": torch.zeros(4, 1024, dtype=torch.long)}
    asked = {**GIVEN, "vram": "8GiB", "gains": False}
    plain = memplan.plan(config, (4, 1024), **asked)
    with torch.device("meta"):
        model = _InChunks(config)
    real = memplan.plan(model, batch, **asked).prediction.peaks.vram_bytes
    chunked = chunked_loss(plain.table, plain.workload.tokens)
    policies = plain.policies()
    weights = plain.prediction.vram_parts["weights"] + plain.prediction.vram_parts["slots"]
    estimated = weights + max(chunked.device_bytes_at(access.index, policies) for access in chunked.accesses)
    assert real < plain.prediction.peaks.vram_bytes * 0.6
    assert estimated == pytest.approx(real, rel=0.1)


def test_one_chunk_is_no_chunk(tight):
    _, _, _, plan = tight
    assert chunked_loss(plan.table, CHUNK_TOKENS) is None
