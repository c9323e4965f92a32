"""What machines can do, and what this one is.

``profile``: a machine's figures, each with where it comes from, read from files. ``machine``: what this machine tells
of itself, ``numa``: which of its memory is near a card. ``cards``: names of cards as people write them. ``budgets``:
what is asked for against what a machine has. ``calibrate``: measuring a profile; the only room that needs torch. Read
in this order.
"""

from __future__ import annotations

from memplan.hardware.profile import Figure as Figure
from memplan.hardware.profile import HardwareProfile as HardwareProfile
from memplan.hardware.profile import as_rows as as_rows
from memplan.hardware.profile import load as load
from memplan.hardware.profile import names as names
from memplan.hardware.profile import save as save
