# SPDX-License-Identifier: Apache-2.0
"""Peak memory of this process."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["PeakMemory"]


class PeakMemory:
    """Context manager: peak resident size within the block, MiB above its beginning, as ``mib``.

    On Linux the kernel's high-water mark, reset at the beginning; elsewhere what the block adds to the largest size
    that the process ever had.
    """

    def __enter__(self) -> PeakMemory:
        # what is freed within the block would hide as much of the block's own
        gc.collect()
        with suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = _high_water()
        return self

    def __exit__(self, *_: object) -> None:
        self.mib = max(0.0, _high_water() - self._start)


def _high_water() -> float:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
