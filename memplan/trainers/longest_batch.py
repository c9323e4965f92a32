"""The largest micro-batch that a loader will give: that of its longest rows, where their lengths can be known."""

from __future__ import annotations

from typing import Any

import numpy as np

_MOST_ROWS = 50_000_000
"""Of more than these the lengths are not looked at: a second or two, and eight bytes each."""


def longest_batch(loader: Any) -> Any:
    """Return the batch that a loader's collator makes of its longest rows, or None where it has no lengths to tell.

    For a map-style dataset of ``datasets``, whose columns of lists say how long they are without being read.
    """
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    size = getattr(loader, "batch_size", None) or getattr(loader, "total_batch_size", None)
    table = getattr(dataset, "data", None)
    if dataset is None or collate is None or not size or not hasattr(table, "column_names"):
        return None
    if not 0 < len(dataset) <= _MOST_ROWS:
        return None
    lengths = _lengths(dataset)
    if lengths is None:
        return None
    size = min(int(size), len(lengths))
    # The first of equals: rows of one length leave the order as it is.
    rows = np.sort(np.argsort(-lengths, kind="stable")[:size])
    return collate([dataset[int(row)] for row in rows])


def _lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    import pyarrow
    import pyarrow.compute

    columns = [
        dataset.data.column(name)
        for name in dataset.column_names
        if pyarrow.types.is_list(dataset.data.schema.field(name).type)
        or pyarrow.types.is_large_list(dataset.data.schema.field(name).type)
    ]
    if not columns:
        return None
    found = np.zeros(dataset.data.num_rows, np.int64)
    for column in columns:
        counted = pyarrow.compute.fill_null(pyarrow.compute.list_value_length(column), 0)
        found += np.asarray(counted.to_numpy(), np.int64)
    indices = getattr(dataset, "_indices", None)  # of a selection, a shuffle or a split
    return found if indices is None else found[np.asarray(indices.column(0).to_numpy(), np.int64)]
