"""Models as they are stored and made, before anything is planned.

``checkpoint`` reads safetensors as a table of extents; ``models`` and ``names`` know models by name and modules by
canonical name; ``arguments`` check the words that a model is asked for in; ``calls`` are what it is called with;
``meta_model`` builds one on ``meta``, ``quantization`` as a quantizer would, ``adapters`` add PEFT's; ``weights`` and
``live_storages`` say what tensors frozen weights are made of, and which storages are alive; ``caching_allocator`` is
what torch reserves for such.
"""

from __future__ import annotations
