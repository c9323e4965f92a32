"""One visit to a machine with a card: the parts that ``benchmarks/gpu.sh`` runs.

``visit``: what they share; ``keep``: results as parts end; ``suite``: the tests marked ``gpu``; ``cards``: emulated
cards; ``peers``: who else streams weights; ``timeline``: one micro-batch, kernel by kernel; ``table``: all of it, for
people. What only a card can show is unproven until results of it are in ``benchmarks/results/``.
"""
