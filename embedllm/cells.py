"""What the cells of a notebook mean for requests: Stop ends those of the cell it stops.

Owns what is called before and after each cell, and knows when which cell began. Knows no engine; asks the registry.
Invariant: a cell that was stopped leaves no foreground request behind, and no traceback that IPython keeps holds a
request or an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import traceback
import weakref
from typing import Any

from embedllm import registry
from embedllm.faults import links_of
from embedllm.process import call_around_cells, ipython_shell


def follow() -> None:
    """Follow the cells of this process's IPython shell from now on, if it has one. Calling it again changes nothing."""
    shell = ipython_shell()
    if hasattr(shell, "events"):
        call_around_cells(shell, Cells)


class Cells:
    """Called around each cell of one shell. Cells may run inside one another and beside one another."""

    def __init__(self) -> None:
        self._first = time.monotonic()  # the cell that runs now began earlier, and asked for nothing until now
        self._began: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()

    def before(self, info: Any) -> None:
        """A cell begins."""
        self._began[info] = time.monotonic()

    def after(self, result: Any) -> None:
        """A cell has ended, `result.error_in_exec` says how; there is no result where it was cancelled at its edge."""
        if result is None:
            error: BaseException | None = asyncio.CancelledError()
            began = max(self._began.values(), default=self._first)
        else:
            error, began = result.error_in_exec, self._began.pop(result.info, self._first)
        if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
            registry.end_foreground(began)
        _let_go(error)


def _let_go(error: BaseException | None) -> None:
    """Clear embedllm's own frames in a traceback; those of the user stay as they are, for %debug."""
    for link in links_of(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_globals.get("__name__", "").partition(".")[0] == "embedllm":
                with contextlib.suppress(RuntimeError):  # it still runs, in another thread
                    frame.clear()
                    _ = frame.f_locals  # before Python 3.13 a copy for whoever looked, brought up to date by looking
