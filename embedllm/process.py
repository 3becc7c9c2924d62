"""What embedllm changes in the process it is a guest in: everything, and all of it is here.

Owns the few calls whose effect outlives them or reaches code that is not ours, each made at first use and none at
import. Invariant: calling any of them twice changes nothing more, and nobody else's setting is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
