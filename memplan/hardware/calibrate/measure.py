"""Measures this machine's rates, in some seconds, into a HardwareProfile.

Each rate is the median of a few repeats, at shapes like those of training. What runs beside it slows it, as it
would slow training; so measure on an idle machine.

The CUDA part is unproven: see ``cuda.py``.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
import torch

from memplan.errors import HardwareError
from memplan.hardware.calibrate import cpu, cuda
from memplan.hardware.calibrate.disk import disk_rate
from memplan.hardware.calibrate.rates import Progress, Rates
from memplan.hardware.machine import cache_folder, machine_key, processor_name
from memplan.hardware.profile import SCHEMA_VERSION, Figure, HardwareProfile


def measure(
    device: Literal["cpu", "cuda"] | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> HardwareProfile:
    """Return a profile of this machine, measured now: under 6 s on a CPU of two cores.

    ``device``: None for CUDA where there is one, else the CPU. ``folder``: where a file of 128 MiB is written, read and
    deleted to time the disk; None for the cache folder. ``progress`` is called with a short text before each part.

    Raises HardwareError where ``device`` is ``"cuda"`` and torch sees none, and where the folder cannot be written.
    """
    say = progress if progress is not None else (lambda text: None)
    chosen = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise HardwareError("device was given as 'cuda', and torch sees no CUDA device: give 'cpu' or None")
    say("disk")
    disk = disk_rate(Path(folder) if folder is not None else cache_folder())
    with torch.inference_mode():
        rates = cuda.measure(say) if chosen == "cuda" else cpu.measure(say)
    return _profile(chosen, rates, disk)


def _profile(device: Literal["cpu", "cuda"], rates: Rates, disk: tuple[float, int]) -> HardwareProfile:
    today = datetime.now(UTC).date().isoformat()

    def figure(value: float) -> Figure:
        return Figure(value=float(f"{value:.4g}"), kind="measured", source="memplan.hardware.calibrate", date=today)

    def whole(value: int) -> Figure:
        return Figure(value=float(value), kind="measured", source="memplan.hardware.calibrate", date=today)

    ram = psutil.virtual_memory().total
    if device == "cuda":
        device_bytes = int(torch.cuda.get_device_properties().total_memory)
        name = torch.cuda.get_device_name()
        description = f"{name} beside {processor_name()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    else:
        device_bytes, name = ram, processor_name()
        description = f"{name}, {torch.get_num_threads()} compute threads, torch {torch.__version__}"
    return HardwareProfile(
        schema_version=SCHEMA_VERSION,
        name=f"{name} (measured)",
        description=description,
        device=device,
        device_bytes=whole(device_bytes),
        host_bytes=whole(ram),
        matmul_flops_per_s={dtype: figure(rate) for dtype, rate in rates.matmul.items()},
        memory_bytes_per_s=figure(rates.memory),
        host_to_device_bytes_per_s=figure(rates.to_device),
        device_to_host_bytes_per_s=figure(rates.to_host),
        disk_bytes_per_s=figure(disk[0]),
        disk_depth=whole(disk[1]),
        launch_s=figure(rates.launch),
        operator_s=figure(rates.operator),
        load_latency_s=figure(rates.latency),
        context_bytes=whole(int(rates.context)),
        pageable_bytes_per_s=None if rates.pageable is None else figure(rates.pageable),
        duplex_factor=None if rates.duplex is None else figure(rates.duplex),
        page_lock_bytes=whole(int(rates.page_lock)) if rates.page_lock else None,
        page_lock_refused_bytes=None if rates.page_lock_refused is None else whole(int(rates.page_lock_refused)),
        machine=machine_key(),
    )
