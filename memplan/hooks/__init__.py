"""What is hung into a model, by the analyzer and the runtime alike.

``triggers`` see every access of weights (``taps``: backwards that enter a layer from within), ``recompute`` and
``offload`` are the activation policies (``same_again`` looks whether a recompute is one), ``flows`` says whether
gradients come through what is wholly frozen, ``late_hooks`` the hooks of others that come after a plan, ``compiled``
what torch.compile has made of modules, ``forward_proxy`` stands in a module's ``forward``, ``nested`` walks what
modules take and return, ``owner`` says whose a hook is. Of the loss: ``tiled_heads`` are heads whose weight a library
multiplies with by itself, ``chunked_loss`` computes it for a few tokens at a time.
"""

from __future__ import annotations
