"""LayerGraph + HardwareProfile -> CostTable: ``table`` is the value, ``build`` makes it with the roofline of ``time``;
``chunked`` and ``optimizer_state`` are tables as they would be with the loss in chunks and with the optimizer's state
in RAM, ``group`` as they are for micro-batches that share each load, ``data_parallel`` for one of several ``ranks``;
``reserved`` is what a CUDA device holds beyond what is alive.
"""

from __future__ import annotations
