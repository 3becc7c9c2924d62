"""What embedllm changes in the process it is a guest in: everything, and all of it is here.

Owns the few calls whose effect outlives them or reaches code that is not ours, each made at first use and none at
import. Invariant: calling any of them twice changes nothing more, and nobody else's setting is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedllm.errors import EngineError

ATTENTION = "embedllm"


def register_attention(function: Callable[..., Any]) -> str:
    """Make `function` known to transformers' AttentionInterface under our name, and return that name.

    Adds one entry to a table of functions by name; no other model looks it up. A reload of the module that defines the
    function replaces its own entry; a different function under our name is an error.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ALL_ATTENTION_FUNCTIONS.get(ATTENTION)
    if known is not None and getattr(known, "__module__", None) != function.__module__:
        raise EngineError(f"transformers' AttentionInterface has another function named {ATTENTION!r}: {known!r}")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, function)
    return ATTENTION


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """While a model is built: no bars and no warnings of transformers, whose settings are put back after."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def release_thread_pool() -> bool:
    """End the idle OpenMP threads that belong to the calling thread; they come back when it next computes.

    As soon as all pools of a process together have more threads than there are processors, GNU's OpenMP lets every
    pool sleep between two operations instead of spinning for a moment. The pool left over from loading in the caller's
    thread would slow each step of the engine's thread so: by a fifth, measured on two cores. Called after loading.
    False where torch uses another OpenMP, which does no such thing. OpenMP 5.0, omp_pause_resource_all(omp_pause_soft).
    """
    if not sys.platform.startswith("linux"):
        return False
    import torch

    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for library in (*bundled, Path("libgomp.so.1")):
        with contextlib.suppress(OSError, AttributeError):  # not loaded, or older than OpenMP 5.0
            return bool(ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all(1) == 0)
    return False
