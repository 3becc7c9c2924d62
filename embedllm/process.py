"""What embedllm changes in the process it is a guest in: everything, and all of it is here.

Owns the few calls whose effect outlives them or reaches code that is not ours, each made at first use and none at
import. Invariant: calling any of them twice changes nothing more, and nobody else's setting is replaced.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from embedllm.errors import EngineError

ATTENTION = "embedllm"
CELLS = "embedllm.cells"  # the module whose functions are called around cells
SWITCH_INTERVAL = 2e-4  # seconds; Python's own is 5e-3


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


def ipython_shell() -> Any:
    """IPython's shell where this process runs one, else None. Imports nothing: a shell has IPython loaded already."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None


def can_send_from_threads() -> bool:
    """Whether other threads than the cell's own can show something: ipykernel 7.0 loses what they send."""
    return not getattr(sys.modules.get("ipykernel"), "__version__", "").startswith("7.0.")


def is_interruptible() -> bool:
    """Whether Ctrl-C or Stop raises KeyboardInterrupt in the code that runs now.

    Not in another thread, and not in a cell that awaits: there Stop asks the event loop, once it runs again.
    """
    handler = signal.getsignal(signal.SIGINT)
    return handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()


def call_around_cells(shell: Any, make: Callable[[], Any]) -> None:
    """Have `make().before(info)` and `.after(result)` called around every cell of the shell, from now on; once each.

    Two entries in the shell's tables of callbacks. A reload of the module they are from finds them there. Not
    post_execute: that runs after messages of widgets too.
    """
    known = shell.events.callbacks["post_run_cell"]
    if not any(getattr(one, "__module__", None) == CELLS for one in known):
        cells = make()
        shell.events.register("pre_run_cell", cells.before)
        shell.events.register("post_run_cell", cells.after)


class Haste:
    """While it is on, Python threads that want the interpreter get it after SWITCH_INTERVAL.

    A step is hundreds of calls that each give the interpreter up and want it back. Beside a thread that computes in
    Python, each would wait for 5 ms: docs/decisions/0014. One per engine thread; the interval goes back when the last
    is off, unless somebody else has changed it meanwhile.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _num_on: ClassVar[int] = 0
    _before: ClassVar[float] = 0.0
    _ours: ClassVar[float] = 0.0  # as Python tells it back

    def __init__(self) -> None:
        self._is_on = False

    def begin(self) -> None:
        """Turn it on; nothing if it is."""
        if self._is_on:
            return
        with Haste._lock:
            self._is_on = True
            Haste._num_on += 1
            if Haste._num_on == 1:
                Haste._before = sys.getswitchinterval()
                sys.setswitchinterval(min(SWITCH_INTERVAL, Haste._before))
                Haste._ours = sys.getswitchinterval()

    def end(self) -> None:
        """Turn it off; nothing if it is."""
        if not self._is_on:
            return
        with Haste._lock:
            self._is_on = False
            Haste._num_on -= 1
            if Haste._num_on == 0:
                Haste._restore()

    @classmethod
    def forget(cls) -> None:
        """In a forked child no engine runs."""
        cls._lock = threading.Lock()
        if cls._num_on:
            cls._num_on = 0
            cls._restore()

    @classmethod
    def _restore(cls) -> None:
        if sys.getswitchinterval() == cls._ours:
            sys.setswitchinterval(cls._before)
