"""Micro-batches that take turns, one step after another: what is alive then, counted by itself."""

from __future__ import annotations


def bytes_of_turns(table, policies, group):
    """Return the most device bytes at each access, frozen weights apart, while ``group`` micro-batches pass them.

    Accesses from the last forward to the first backward are one visit, passed by each micro-batch at once.
    """
    rows = table.accesses
    alive = [
        life
        for life in table.lifetimes
        if life.policy == "any" or life.policy == policies.get(rows[life.born].module, "keep")
    ]
    loss = next((row.index for row in rows if row.kind == "loss"), None)
    visits, index = [], 0
    while index < len(rows):
        length = 3 if group > 1 and loss is not None and index == loss - 1 else 1
        visits.append(range(index, index + length))
        index += length
    most = [0] * len(rows)
    for visit in visits:
        top = 0
        for turn in range(group):
            for access in visit:
                total = rows[access].transient(policies.get(rows[access].module, "keep"))
                for fixed in table.fixed:
                    total += fixed.size_bytes * (group if fixed.kind == "batch" else 1)
                for life in alive:
                    if life.kind != "activations":
                        total += life.size_bytes * (life.born <= access <= life.last)
                        continue
                    for other in range(group):
                        if other == turn:
                            total += life.size_bytes * (life.born <= access <= life.last)
                        else:  # it waits for this visit, or for the next
                            waits = visit[-1] + 1 if other < turn else visit[0]
                            total += life.size_bytes * (life.born < waits <= life.last)
                top = max(top, total)
        for access in visit:
            most[access] = top
    if group == 1:
        assert all(len(visit) == 1 for visit in visits)
    return most
