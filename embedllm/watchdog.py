"""Whether an engine still makes progress, as seen by whoever waits for it. There is no watchdog thread.

Owns the time that passed without a sign of life. Invariant: only time in which somebody looked counts. A process that
was stopped, or held by a call that kept the interpreter lock, kept the engine's thread from working too.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback

STALLED, DEAD = 30.0, 120.0  # seconds without a sign of life: then a warning with the stack, then it counts as dead

log = logging.getLogger("embedllm")


class Watchdog:
    """Watches one thread. Whoever waits calls `look` every `most` / 2 seconds or so; a longer gap counts as `most`."""

    def __init__(self, most: float) -> None:
        self._most = most
        self._seen = self._last = self._stuck = 0.0
        self._warned = False

    def look(self, beat: float, busy: bool, thread: int | None) -> float | None:
        """Seconds without progress once it counts as dead, else None.

        `beat` changes with every sign of life, `busy` is whether there should be any, `thread` is its identifier.
        """
        now, last = time.monotonic(), self._last
        self._last = now
        if not busy or beat != self._seen:
            self._seen, self._stuck = beat, 0.0
            return None
        self._stuck += min(now - last, self._most)
        if self._stuck > DEAD:
            return self._stuck
        if self._stuck > STALLED and not self._warned:
            self._warned = True
            frame = sys._current_frames().get(thread or 0)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else "no stack"
            log.warning("the engine made no progress for %.0f s; it is in:\n%s", self._stuck, stack)
        return None
