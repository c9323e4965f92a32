"""What a forward may change beside its result, kept and put back.

``snapshot`` writes down what a model's objects hold, kind by kind as ``holders`` know them, but for what is ``closed``;
``reach`` finds what a function can change; ``process_state`` is what the process has; ``expendable`` stands in for what
a look would use up. For layers that run twice: ``setting`` (of ``containers`` and objects), ``data_writes`` and
``optimizer_steps`` (``watched``: as long as anybody asks for it).
"""

from __future__ import annotations
