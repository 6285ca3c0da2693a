"""How much memory a device has left."""

import math
import os
from pathlib import Path

import torch

_MEMORY_FILE = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> float:
    """The memory in bytes that a device has left, as far as the system tells; infinite where it does not.

    On a CPU it is that of the machine, of which all of its processes have a share.
    """
    if device.type == "cuda":
        # What PyTorch has reserved and does not use counts as taken to the driver, and is free to us.
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return math.inf
    # Pages that hold copies of files are not free, but available: a machine that has read a data set has few free ones.
    if _MEMORY_FILE.exists():
        for line in _MEMORY_FILE.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return 1024.0 * float(amount.split()[0])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
