"""Budgets against what a machine has, as far as its profile says. No torch here."""

from __future__ import annotations

from memplan.device_kinds import is_apart
from memplan.errors import InputError
from memplan.hardware.machine import DEVICE_RESERVE_BYTES
from memplan.hardware.profile import Figure, HardwareProfile
from memplan.units import GIB, format_bytes


def require_vram(profile: HardwareProfile, vram_bytes: int) -> None:
    """Raise InputError for a budget above the memory of a card.

    A datasheet's GB are powers of ten here, so that no plan counts on more than there is; a card of 24 GB may have as
    much as 24 GiB, and more it cannot have. On a CPU a plan may be for the card of another machine: :func:`beyond` says
    so.
    """
    most = most_vram_bytes(profile)
    if not is_apart(profile.device) or vram_bytes <= most:
        return
    usual = format_bytes(max(0, int(profile.device_bytes.value) - DEVICE_RESERVE_BYTES))
    raise InputError(
        f"vram was given as {format_bytes(vram_bytes)}, but {profile.name} has {format_bytes(most)}, of which about "
        f"{usual} are usually free: give at most {format_bytes(most)}, or leave it out"
    )


def most_vram_bytes(profile: HardwareProfile) -> int:
    """Return the most device memory that a machine of this profile can have, in bytes."""
    return _most_bytes(profile.device_bytes)


def beyond(profile: HardwareProfile, vram_bytes: int, ram_bytes: int) -> tuple[str, ...]:
    """Return what is to be said of budgets that are more than the machine has, as far as its profile says."""
    found = []
    usual = int(profile.device_bytes.value)
    if vram_bytes > usual:
        if not is_apart(profile.device):
            found.append(
                f"The vram is more than the {format_bytes(usual)} of RAM of {profile.name}, whose CPU is the compute "
                "device: it fits on another machine alone. Give that one's card (hardware) for its times."
            )
        else:
            found.append(
                f"The vram is all that {profile.name} can have: the driver, a display and other processes take a "
                f"part of it, about {format_bytes(usual - DEVICE_RESERVE_BYTES)} are usually free."
            )
    if profile.host_bytes is not None and ram_bytes > _most_bytes(profile.host_bytes):
        found.append(
            f"The ram is more than the {format_bytes(int(profile.host_bytes.value))} of {profile.name}: it fits on "
            "another machine alone."
        )
    return tuple(found)


def _most_bytes(figure: Figure) -> int:
    gigabytes, rest = divmod(int(figure.value), 10**9)
    return gigabytes * GIB if figure.kind == "datasheet" and rest == 0 else int(figure.value)
