"""Plan + RunRecord -> report.

``summary`` derives all numbers, ``rows`` sets them in tables; ``sentences`` and ``glyphs`` are how they are said;
``strip`` draws a placement; ``first_screen``, ``terminal`` and ``html`` set the report; ``compare``,
``query_tables``, ``tables``, ``known``, ``csv``, ``log_lines``, ``trace`` are the other outputs.
"""

from __future__ import annotations
