"""The threads that PyTorch computes with on a CPU, on a machine that others use too.

Owns how many the calling thread has. GNU's OpenMP lets threads spin while they wait for each other, which is best as
long as each has a processor to itself. Where another program holds one of the processors, two of them share one, and
every operation lasts until the system swaps them. Invariant: only the calling thread's team changes, no setting of the
process; where torch uses another OpenMP, nothing does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from pathlib import Path

import torch

from embedllm.machine import num_processors

LOOK, LOOK_AGAIN = 0.25, 1.0  # seconds until the next look: when all was well, and when it was not
OPERATIONS, LATE, MOST_LATE = 6, 0.001, 2  # a look is so many; so many that take so many seconds end it
GRAIN = 32_768  # values that torch gives a thread at least


@functools.cache
def _library() -> ctypes.CDLL | None:
    """GNU's OpenMP, if torch has loaded it."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for name in (*bundled, "libgomp.so.1"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(name), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    return None


def release_pool() -> bool:
    """End the idle threads that belong to the calling thread; they come back when it next computes.

    As soon as all pools of a process together have more threads than there are processors, OpenMP lets every pool
    sleep between two operations instead of spinning. The pool left over from loading in the caller's thread would slow
    each step of the engine's thread so. Called after loading. False where there is nothing to call. OpenMP 5.0,
    omp_pause_resource_all(omp_pause_soft).
    """
    library = _library()
    return hasattr(library, "omp_pause_resource_all") and library.omp_pause_resource_all(1) == 0  # type: ignore[union-attr]


class Team:
    """How many threads the calling thread computes with: as many as find a processor, up to torch's number.

    `most`: instead of torch's number.
    """

    def __init__(self, most: int | None = None) -> None:
        self.size = 0  # not known yet
        self._most = most
        self._next = 0.0

    def gather(self) -> None:
        """Called before each step, always by the same thread: now and then it looks how many find a processor."""
        if time.monotonic() < self._next:
            return
        library = _library()
        if self._most is None:
            self._most = min(torch.get_num_threads(), num_processors())
        size = self._most
        if library is not None:
            library.omp_set_num_threads(size)
            while size > 1 and not _all_find_a_processor(size):
                size //= 2
                library.omp_set_num_threads(size)
        self.size = size
        self._next = time.monotonic() + (LOOK if size == self._most else LOOK_AGAIN)


def _all_find_a_processor(size: int) -> bool:
    """Whether a few short operations on this many threads take no longer than they should."""
    values = torch.zeros(size * GRAIN)
    late = 0
    for _ in range(OPERATIONS):
        began = time.perf_counter()
        values.neg_()
        late += time.perf_counter() - began > LATE
        if late == MOST_LATE:
            return False
    return True
