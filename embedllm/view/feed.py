"""From the engine's events to messages for whoever watches: a thread that takes what was recorded a few times a second.

Owns the recorder's ring, the thread, its rate and the history. Knows no widget: listeners get bytes. The engine never
waits for it, and it holds nothing that keeps an LLM alive. Invariant: keyframes and events go out in the order of their
numbers, and whoever follows them from a keyframe has the engine's state; what the ring lost is marked, and a new
keyframe follows.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedllm import wire
from embedllm.events import Event
from embedllm.replay import State

if TYPE_CHECKING:
    from embedllm.engine import Engine
    from embedllm.worker import Worker

CAPACITY = 65_536  # events between two ticks
FASTEST, UNSEEN = 0.1, 0.5  # seconds between two ticks: with somebody who acknowledges, and without
SLOWEST = 4 * FASTEST
PATIENCE = 10.0  # seconds without an acknowledgement until nobody is believed to look
KEYFRAME_EVERY = 5.0  # seconds, while something happens
MOST_CPU, LITTLE_CPU = 0.01, 0.0025  # of a core: above it ticks are half as often, below they come back
CPU_WINDOW = 2.0  # seconds it is measured over
HISTORY_BYTES, HISTORY_SECONDS = 16 * 2**20, 600.0

Listener = Callable[[list[bytes]], object]
log = logging.getLogger("embedllm")


class Ring:
    """Events since the last `take`, the newest CAPACITY of them. Given to the engine as a recorder.

    `append` is the bound method of a deque, so the engine's side is one call into C. `beginning`, written on the
    engine's thread, is the state that the first event follows.
    """

    def __init__(self) -> None:
        self.beginning: State | None = None
        self._events: deque[Event] = deque(maxlen=CAPACITY)
        self.append = self._events.append

    def take(self) -> tuple[list[Event], bool]:
        """What was recorded since, in order, and whether the oldest of it may be lost."""
        events, taken, lost = self._events, list[Event](), False
        for _ in range(len(events)):
            taken.append(events.popleft())
            lost = lost or len(events) >= CAPACITY - 1  # it was full, and nobody else takes: it stays so until here
        return taken, lost


@dataclass(slots=True)
class _Chapter:
    """A keyframe and the messages of events after it, up to the next."""

    began: float
    messages: list[bytes] = field(default_factory=list)


class History:
    """The newest messages: at most `most_bytes` of them, and events of the last `most_seconds` only.

    What is older thins out from the beginning: first to keyframes, then those go too. The newest keyframe and what
    follows it always stay.
    """

    def __init__(self, most_bytes: int, most_seconds: float) -> None:
        self._most_bytes, self._most_seconds = most_bytes, most_seconds
        self._thinned: deque[_Chapter] = deque()  # keyframes alone
        self._chapters: deque[_Chapter] = deque()
        self.size = 0

    def add(self, now: float, message: bytes, is_keyframe: bool) -> None:
        if is_keyframe or not self._chapters:
            self._chapters.append(_Chapter(now))
        self._chapters[-1].messages.append(message)
        self.size += len(message)
        chapters = self._chapters
        while len(chapters) > 1 and (self.size > self._most_bytes or now - chapters[0].began > self._most_seconds):
            oldest = chapters.popleft()
            self.size -= sum(map(len, oldest.messages[1:]))
            self._thinned.append(_Chapter(oldest.began, oldest.messages[:1]))
        while self._thinned and self.size > self._most_bytes:
            self.size -= len(self._thinned.popleft().messages[0])

    def messages(self) -> list[bytes]:
        """All of them, in order."""
        return [message for chapter in (*self._thinned, *self._chapters) for message in chapter.messages]


class Feed:
    """Messages of one engine, while somebody listens. Safe from any thread.

    A listener is called on the feed's thread with the new messages in order, and with an empty list once the engine has
    ended. It must not block, and one that raises is dropped. The thread starts with the first listener and ends with
    the last, with `close()`, or with the engine.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._worker = worker
        self._clock, self._cpu = clock, cpu
        self._lock = threading.RLock()  # of all below; never the engine's thread's; a finalizer may come in between
        self._listeners: tuple[Listener, ...] = ()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._ring: Ring | None = None
        self._state: State | None = None
        self._number = 0
        self._wants_keyframe = self._has_news = False
        self._last_keyframe = self._acknowledged = self._window = 0.0
        self._spent = 0.0  # CPU seconds in this window
        self._interval = FASTEST
        self._history = History(HISTORY_BYTES, HISTORY_SECONDS)
        self.num_losses = 0

    # ---- listeners --------------------------------------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Hand it every message from now on, beginning with a keyframe. An empty list is the last one."""
        with self._lock:
            self._listeners = (*self._listeners, listener)
            self._wants_keyframe = True
            if self._thread is None:
                self._acknowledged = self._window = self._clock()
                self._spent = 0.0
                self._begin()
                self._stop = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._stop,), name="embedllm-feed", daemon=True)
                self._thread.start()

    def leave(self, listener: Listener) -> None:
        """Hand it nothing more. One that does not listen is ignored."""
        with self._lock:
            self._listeners = tuple(one for one in self._listeners if one != listener)
            if not self._listeners:
                self._end()

    def close(self) -> None:
        """End the thread and forget all listeners; the history stays. Idempotent."""
        with self._lock:
            self._listeners = ()
            self._end()

    def acknowledge(self) -> None:
        """Somebody has seen a message: it is worth being quick."""
        self._acknowledged = self._clock()

    def ask_for_keyframe(self) -> None:
        """Send a keyframe with the next messages."""
        self._wants_keyframe = True

    def history(self) -> list[bytes]:
        """What was sent so far, beginning with a keyframe: up to 16 MB or 10 minutes, and of the time before that only
        keyframes."""
        with self._lock:
            return self._history.messages()

    @property
    def interval(self) -> float:
        """Seconds between two ticks now."""
        unseen = self._clock() - self._acknowledged > PATIENCE
        return max(self._interval, UNSEEN) if unseen else self._interval

    # ---- the thread -------------------------------------------------------------------------------------------

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self.interval):
            if self._worker.alive:
                self.tick()
            else:
                self._worker.join()
                self.tick()  # how it ended
                self._tell([])
                self.close()

    def tick(self) -> None:
        """Hand on what happened since the last time. Called by the thread."""
        began = self._cpu()
        with self._lock:
            messages = self._take()
        if messages:
            self._tell(messages)
        self._spent += self._cpu() - began
        self._adapt()

    def _tell(self, messages: list[bytes]) -> None:
        for listener in self._listeners:
            try:
                listener(messages)
            except Exception:
                log.warning("a listener of the live view failed and is told nothing more", exc_info=True)
                self.leave(listener)

    def _adapt(self) -> None:
        """Tick less often if that took too much of a core, more often again if it takes little."""
        elapsed = self._clock() - self._window
        if elapsed < CPU_WINDOW:
            return
        share = self._spent / elapsed
        if share > MOST_CPU:
            self._interval = min(SLOWEST, 2 * self._interval)
        elif share < LITTLE_CPU:
            self._interval = max(FASTEST, self._interval / 2)
        self._window, self._spent = self._clock(), 0.0

    # ---- with the lock held -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Follow the engine from its state between two steps, whenever that is. One number is left out: whoever was
        told before takes the next keyframe as a new beginning."""
        old, ring = self._ring, Ring()
        self._ring, self._state = ring, None
        self._number += 1

        def attach(engine: Engine) -> None:
            if old is not None:
                engine.detach(old)
            engine.attach(ring)
            ring.beginning = State.of(engine)

        self._worker.tell(attach)

    def _end(self) -> None:
        ring, self._ring, self._thread = self._ring, None, None
        self._stop.set()
        if ring is not None:
            self._worker.tell(lambda engine: engine.detach(ring))

    def _take(self) -> list[bytes]:
        """The messages of a tick."""
        ring, messages = self._ring, list[bytes]()
        if ring is None or (self._state is None and ring.beginning is None):
            return messages
        events, lost = ring.take()
        if self._state is None and ring.beginning is not None:
            self._state, ring.beginning = ring.beginning, None
            self._add_keyframe(messages, self._state)
        if lost:
            self.num_losses += 1
            self._add(messages, wire.encode_events((), self._number + 1, int(self._clock() * 1e6), lost=True))
            self._begin()
            return messages
        state = self._state
        assert state is not None
        if events:
            state.apply(events)
            self._add(messages, wire.encode_events(events, self._number + 1, state.time))
            self._has_news = True
        if state.ended:
            self._begin()
        elif self._wants_keyframe or (self._has_news and self._clock() - self._last_keyframe >= KEYFRAME_EVERY):
            self._add_keyframe(messages, state)
        return messages

    def _add_keyframe(self, messages: list[bytes], state: State) -> None:
        self._add(messages, wire.encode_keyframe(state, self._number + 1), is_keyframe=True)
        self._wants_keyframe = self._has_news = False
        self._last_keyframe = self._clock()

    def _add(self, messages: list[bytes], message: bytes, is_keyframe: bool = False) -> None:
        self._number += 1
        messages.append(message)
        self._history.add(self._clock(), message, is_keyframe)
