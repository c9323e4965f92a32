"""The trainers people already use, in the order of their way.

``launch`` starts a script, ``import_hooks`` waits for its libraries, ``serve_script`` and ``serve_loop`` serve it
(``compiled_whole``: what is said of models compiled as a whole); ``loading`` are its models; ``hf_trainer``,
``callback``, ``lightning`` and ``placing`` are for those who call memplan themselves; ``other_models`` share the
budget, ``release`` gives a model back whole, ``hf_groups`` has a Trainer's micro-batches share loads, ``log_callback``
and ``longest_batch`` are small parts.
"""

from __future__ import annotations
