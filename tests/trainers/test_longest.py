"""The largest micro-batch of a loader is found from the lengths of its rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from memplan.trainers.longest_batch import longest_batch

LENGTHS = [3, 9, 2, 7, 9, 1]


def padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    return torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])


def dataset():
    return Dataset.from_dict({"input_ids": [[index + 1] * length for index, length in enumerate(LENGTHS)]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows, [2, 5]),
        (lambda rows: rows.select([0, 2, 3, 5]), [1, 4]),
        (lambda rows: rows.select([5, 3, 0]), [4, 1]),
        (lambda rows: rows.select([5]), [6]),
    ],
    ids=["all", "some", "other order", "one"],
)
def test_the_longest_rows(change, expected):
    loader = torch.utils.data.DataLoader(change(dataset()), batch_size=2, collate_fn=padded)
    batch = longest_batch(loader)
    assert batch[:, 0].tolist() == expected
    assert batch.shape[1] == max(LENGTHS[index - 1] for index in expected)


def test_what_has_no_lengths_has_none():
    assert longest_batch(torch.utils.data.DataLoader([1, 2, 3], batch_size=2)) is None
    numbers = Dataset.from_dict({"label": [1, 2, 3]})
    assert longest_batch(torch.utils.data.DataLoader(numbers, batch_size=2)) is None
