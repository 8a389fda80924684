"""How much memory there is to spend."""

import os
from pathlib import Path

import torch

KEEP_BYTES = 256 * 2**20
"""Samples are held in memory rather than loaded again up to this size."""

CHUNK_BYTES = 128 * 2**20
"""Per-sample rows are computed in chunks of about this size."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, as far as the system tells."""
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
