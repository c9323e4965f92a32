"""The report as one HTML page that needs no network, no script and no other file. jinja2 is opened here alone.

``render`` fills ``page.html``; ``view`` is what it is filled with, of ``blocks``, ``memory``, ``times`` and
``frontier``, the drawings, and ``tables``. ``axes`` are the drawings' marks, ``tags`` the words on them.
"""
