"""The profile of this machine: the cached one, else measured now."""

from __future__ import annotations

from collections.abc import Callable

from memplan.errors import HardwareError
from memplan.hardware.calibrate.measure import measure
from memplan.hardware.machine import cached, cached_path
from memplan.hardware.profile import HardwareProfile, save


def current(progress: Callable[[str], None] | None = None) -> HardwareProfile:
    """Return this machine's profile: the cached one, else it is measured (some seconds) and cached.

    ``progress`` is called with a short text before each measurement. The cache's key is the platform, the processor,
    the CPUs that it may use, the GPU, and torch's version.
    """
    try:
        found = cached()
    except HardwareError:
        found = None  # of an older memplan, or cut short by a full disk: it is measured again and written over
    if found is None or found.operator_s is None:  # of a memplan that did not measure this yet
        return measured_now(progress)
    return found


def measured_now(progress: Callable[[str], None] | None = None) -> HardwareProfile:
    """Measure this machine now, keep the profile for the plans to come, and return it. Raises HardwareError."""
    profile = measure(progress=progress)
    path = cached_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(profile, path)
    except OSError:
        pass  # a cache that cannot be written costs the next start some seconds, no more
    return profile
