"""What a cost table says of memory."""

from __future__ import annotations

import pytest

from memplan.cost.optimizer_state import state_on_host
from tests.support.tables import make_table


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
@pytest.mark.parametrize("away", [False, True])
def test_all_accesses_at_once_are_those_one_by_one(policy, away):
    table = make_table([1 << 20] * 7, offloadable=True)
    table = state_on_host(table) if away else table
    policies = dict.fromkeys(table.recomputable[::2], policy)
    assert table.device_bytes(policies) == [table.device_bytes_at(row.index, policies) for row in table.accesses]
