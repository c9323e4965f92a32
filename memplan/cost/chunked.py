"""The cost rows with the loss computed in chunks of tokens: an estimate of what a trainer that does so would need."""

from __future__ import annotations

from msgspec.structs import replace

from memplan.cost.table import CostTable

CHUNK_TOKENS = 1024


def chunked_loss(table: CostTable, tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> CostTable | None:
    """Return the rows of a pass over ``tokens`` whose logits, their gradient and what the loss makes of them exist for
    one chunk at a time; None where there is one chunk, or no loss apart from the model.

    The head runs once more, since the logits of a chunk are made again for its gradient.
    """
    chunks = -(-tokens // chunk_tokens)
    at = next((row.index for row in table.accesses if row.kind == "loss"), None)
    if chunks < 2 or at is None:
        return None
    makes_logits = {life.born for life in table.lifetimes if life.last == at}
    head_s = sum(row.time_s for row in table.accesses if row.index in makes_logits and row.kind == "forward")
    loss = table.accesses[at]
    inside = replace(
        loss,
        time_s=loss.time_s + head_s,
        transient_bytes=-(-loss.transient_bytes // chunks),
        transient_recompute_bytes=-(-loss.transient_recompute_bytes // chunks),
        transient_offload_bytes=-(-loss.transient_offload_bytes // chunks),
    )
    return replace(
        table,
        accesses=(*table.accesses[:at], inside, *table.accesses[at + 1 :]),
        lifetimes=tuple(
            replace(life, size_bytes=-(-life.size_bytes // chunks)) if at in (life.born, life.last) else life
            for life in table.lifetimes
        ),
    )
