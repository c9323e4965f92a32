"""CostTable + budgets -> Plan.

``solve`` is the way through: ``validate`` refuses, ``problem`` makes arrays of the rows, ``search`` tries
``candidates`` (see ``layout``) and ``alternatives``, ``bound`` says what no plan can beat, ``baselines`` are other ways
of placing, ``min_vram`` and ``refusal`` are for budgets that nothing fits.
"""

from __future__ import annotations
