"""Several processes of torch.distributed that train one model together: its ranks.

``world`` says whether there are any and which one this is; a ``session`` has them agree, stage by stage, so that an
error on one is an error on all, and ``ended`` tells which rank was the first to end; ``shared_memory`` is one copy of
weights that the ranks of a node read, and ``shared_reads`` what they read from files together; ``data_parallel`` has
DDP leave alone what memplan places, and ``restart`` is what ranks leave to those that take their place. Where one
process runs nothing here is used, and nothing here imports torch.distributed: who has initialised it has imported it.
"""

from __future__ import annotations
