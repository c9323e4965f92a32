"""Which node a card is near, as Linux tells it: files written for the test, as of a machine with two processors."""

from __future__ import annotations

import pytest

from memplan.hardware.numa import advice, node_of, nodes


@pytest.fixture
def machine(tmp_path):
    def write(cpus, near):
        for node, text in cpus.items():
            (tmp_path / "node" / f"node{node}").mkdir(parents=True)
            (tmp_path / "node" / f"node{node}" / "cpulist").write_text(text)
        (tmp_path / "pci" / "0000:c1:00.0").mkdir(parents=True)
        (tmp_path / "pci" / "0000:c1:00.0" / "numa_node").write_text(near)
        return {"folder": tmp_path / "node", "devices": tmp_path / "pci"}

    return write


def test_a_card_near_one_of_two(machine):
    at = machine({0: "0-3,8-11\n", 1: "4-7,12-15\n", 2: "\n"}, "1\n")  # the last has memory alone
    assert nodes(at["folder"]) == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}
    assert node_of("0000:C1:00.0", at["devices"]) == 1
    said, do = advice("0000:c1:00.0", allowed=range(16), **at)
    assert said == "near node 1 of 2"
    assert "numactl --cpunodebind=1 --membind=1" in do
    assert advice("0000:c1:00.0", allowed={4, 12}, **at) == (said, "")


@pytest.mark.parametrize(
    ("cpus", "near", "address"),
    [
        ({0: "0-7"}, "0", "0000:c1:00.0"),
        ({0: "0-3", 1: "4-7"}, "-1", "0000:c1:00.0"),
        ({0: "0-3", 1: "4-7"}, "0", "0000:c2:00.0"),
        ({0: "0-3", 1: "4-7"}, "0", ""),
        ({0: "what", 1: "4-7"}, "0", "0000:c1:00.0"),
        ({}, "0", "0000:c1:00.0"),
    ],
    ids=["one node", "not told", "another card", "no address", "garbled", "no nodes"],
)
def test_nothing_is_said_where_there_is_nothing_to_say(cpus, near, address, machine):
    assert advice(address, allowed=range(8), **machine(cpus, near)) == ("", "")
