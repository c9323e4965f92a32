"""The command line.

Exit codes: 0 fits or done; 1 does not fit (a plan as fast as was asked counts), and nothing else; 2 bad input, or
doctor found a problem; 3 the runs of the demonstration differ; 70 an internal error; 74 the output cannot be written;
130 interrupted; 141 the reader of the output is gone. ``memplan run`` ends with its script's own.

What a command needs is imported inside it, so that ``memplan report`` starts without torch.

``entry`` is where a command begins and how it ends; ``options`` is the one table of options, ``defaults`` where else
they may come from; ``plan``, ``run`` and ``machine`` are the commands, ``output`` and ``paths`` what they share.
"""

from __future__ import annotations

from memplan.cli import machine, plan, run  # each adds its commands
from memplan.cli.entry import group, main

__all__ = ["group", "machine", "main", "plan", "run"]
