"""When a progress bar may be shown, and one that may stay silent.

Owns the rule: a bar appears on a terminal, in a notebook, or when asked for; never in a log file or a pipe.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

from embedllm.process import can_send_from_threads, ipython_shell

if TYPE_CHECKING:
    from tqdm import tqdm


def bar_wanted(progress: bool | None) -> bool:
    """`progress` if it says; otherwise whether somebody is looking at a terminal or a notebook."""
    if progress is not None:
        return progress
    return in_notebook() or bool(sys.stderr is not None and sys.stderr.isatty())


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return hasattr(ipython_shell(), "kernel")


class Silent:
    """What is shown where nobody looks. Not a disabled tqdm: that would start tqdm's monitoring thread all the same."""

    disable = True
    n = 0

    def update(self, n: float = 1) -> None:
        """Nothing is drawn."""

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Nothing is drawn."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing was opened."""


def bar(total: int, what: str, progress: bool | None, **options: Any) -> tqdm[Any] | Silent:
    """A tqdm bar where one is wanted. Use it in a with statement."""
    here = threading.current_thread() is threading.main_thread() or can_send_from_threads()
    if not bar_wanted(progress) or not here:
        return Silent()
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, leave=False, **options)
