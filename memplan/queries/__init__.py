"""What people ask before they train: ``frontier`` (memory against time), ``fit`` (the most that fits), ``gains`` (what
a little more would bring), ``compare`` (other ways of placing);
and ``one_plan``, on which several ranks agree.
"""

from __future__ import annotations
