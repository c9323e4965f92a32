"""CostTable + budgets -> Plan.

``solve`` is the way through: ``validate`` refuses, ``problem`` makes arrays of the rows, ``generators`` propose
candidates (see ``layout``), the ``evaluator`` judges them, ``alternatives`` are what is tried around a search,
``bound`` says what no plan can beat, ``baselines`` are other ways of placing, ``min_vram`` and ``refusal`` are for
budgets that nothing fits.
"""

from __future__ import annotations
