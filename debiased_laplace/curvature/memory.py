"""Memory limits and the free memory of a device."""

import os
from pathlib import Path

import torch

KEEP_BYTES = 256 * 2**20
"""Size up to which samples are held in memory instead of being loaded again."""

CHUNK_BYTES = 128 * 2**20
"""Approximate size of the chunks in which per-sample rows are computed."""

LARGEST_SIDE = 4096
"""Longest side of a parameter as a matrix that gets eigenvectors, which take its cube; longer ones keep their axes."""

LEAST = 512 * 2**20
"""Smallest limit of memory: what chunks and samples that are held take."""


def available_memory(device: torch.device, limit: int | None = None) -> int:
    """Return the bytes that a computation may take beyond the model and the directions.

    Args:
        device: that computes.
        limit: bytes, as the user gave it; None: a quarter of what is free.
    """
    return free_memory(device) // 4 if limit is None else limit


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device, as reported by the system."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30
