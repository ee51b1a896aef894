"""Peak memory of a run: of the accelerator where there is one, else of the process."""

import ctypes
import gc
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start anew, so that one run of many in a process has its own peak (CUDA and Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages of earlier runs that the C library still holds
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another system: the peak stays that of the whole process
        return


def peak_bytes() -> int:
    """Bytes at the peak since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
