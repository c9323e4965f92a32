"""Where bytes lie: ``home`` (a block's permanent copy), ``arena`` (one line of offsets in a tier; ``shared_arena``:
one that ranks share), ``disk`` (reading and packing files), ``page_lock`` and ``prefault`` (host memory of just that
size, touched in time), ``limit`` (how much of the device torch may take), ``storage_aliases`` (who else holds it).
"""

from __future__ import annotations
