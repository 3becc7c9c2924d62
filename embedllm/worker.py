"""The engine's thread: one daemon thread with its own asyncio loop, a mailbox in, channels out.

Owns the thread and nothing of the policy. Only this thread touches the engine; everybody else posts. Callers and
finalizers share no lock with it: they use SimpleQueue.put and call_soon_threadsafe only. Invariant: every channel
handed in is ended, whatever happens to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from embedllm.channel import SLICE, Channel
from embedllm.engine import Engine
from embedllm.errors import (
    EngineClosed,
    EngineDead,
    EngineForked,
    EngineReentered,
    QueueFull,
    RequestCancelled,
)
from embedllm.faults import StepStopped, let_go
from embedllm.outbox import Outbox, refuse
from embedllm.process import Haste
from embedllm.request import Request
from embedllm.watchdog import Watchdog

READER_PATIENCE = 30.0  # seconds a foreground request may go unread before it gives its blocks back
SWEEP_SECONDS = 1.0  # between two looks for readers that went away
JOIN_TIMEOUT = 2.0

log = logging.getLogger("embedllm")
T = TypeVar("T")


class Worker:
    """Runs an engine once started. All methods but the private ones may be called from any thread."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._mailbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._channels = Outbox()
        self._shaping: set[int] = set()  # requests whose shape is still being compiled: not in the engine yet
        self._ids = itertools.count(1)
        self._error: Exception | None = None  # why no more requests are taken
        self._pid = os.getpid()
        self._loop: asyncio.SelectorEventLoop | None = None
        self._wake = asyncio.Event()
        self._stopping = False  # asked to end
        self._awake = False  # doing something, so `last_beat` should move
        self._gone = False  # nobody reads the mailbox any more
        self._watchdog = Watchdog(2 * SLICE)
        self._haste = Haste()
        self._next_sweep = 0.0
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()  # holds one item once the thread is done
        self._held = [self]  # what the thread runs; taken back where an interrupt leaves it half started
        self._thread = threading.Thread(target=_run_held, args=(self._held,), name=f"embedllm-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread. It ends after `stop`. Raises RuntimeError if the system gives no thread."""
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_debug(False)  # whatever PYTHONASYNCIODEBUG says of the program's own loops
        try:
            self._thread.start()
        except BaseException:
            self._held.clear()
            if self._thread.ident is None:  # there is no thread
                self._loop.close()
            raise

    # ---- any thread -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._error is None and not self._stopping and os.getpid() == self._pid

    def check_caller(self, what: str) -> None:
        """Raises where waiting for the engine would wait for ever: on its own thread, or after fork()."""
        if os.getpid() != self._pid:
            raise EngineForked(
                "this process was forked from the one that made the LLM, and its engine thread did not come along; "
                "make the LLM after the fork"
            )
        if threading.get_ident() == self._thread.ident:
            raise EngineReentered(f"{what} would wait for the engine from inside its own thread (in a callback)")

    def check_alive(self) -> None:
        """Raises EngineForked, EngineDead with its first cause, or EngineClosed."""
        if os.getpid() != self._pid:
            self.check_caller("")
        error = self._error
        if error is not None:
            raise type(error)(*error.args) from error.__cause__

    @property
    def is_idle(self) -> bool:
        """Whether no request is in it or on its way."""
        return not self._channels and self._mailbox.empty()

    def new_id(self) -> int:
        """An id no other request of this engine has."""
        return next(self._ids)

    @property
    def num_pinned(self) -> int:
        """Blocks that pins hold right now."""
        return self._engine.scheduler.num_pinned

    def submit(self, request: Request, channel: Channel) -> None:
        """Queue a validated request, or queue nothing and raise QueueFull, EngineClosed, EngineDead or EngineForked."""
        self.check_alive()
        limits = self._engine.limits
        if len(self._channels) + self._mailbox.qsize() >= limits.max_queued + limits.max_num_seqs:
            raise QueueFull(f"{limits.max_queued} requests wait already, which is the limit: wait for some to finish")

        def enter() -> None:
            if self._error is not None:
                refuse(channel, self._error)
            elif channel.is_abandoned:
                refuse(channel, _never_taken(request.id))
            else:
                self._channels[request.id] = channel
                self._shaping.add(request.id)
                if request.shape is None:
                    take()

        def take() -> None:
            if request.id in self._shaping:
                self._shaping.remove(request.id)
                if self._error is None:
                    self._engine.submit(request)
                else:  # given up since: nobody but its own thread may touch the engine
                    refuse(channel, self._error)

        self._post(enter)
        if request.shape is not None:
            request.shape.when_done(lambda: self._post(take))

    def cancel(self, request_id: int) -> None:
        """End a request. Safe from finalizers: it neither blocks nor raises."""
        if os.getpid() == self._pid:
            self._engine.cancel_asked.add(request_id)
            self._post(lambda: self._cancel(request_id))

    def cancel_all(self, which: Callable[[Channel], bool]) -> None:
        """End every request submitted so far whose channel `which` picks."""

        def cancel() -> None:
            for request_id, channel in list(self._channels.items()):
                if which(channel):
                    self._cancel(request_id)

        self._post(cancel)

    def attend(self, channel: Channel) -> None:
        """Called by readers before each slice of a wait: the request is followed, and the engine should show life.

        There is no watchdog thread: whoever waits is the watchdog. Raises EngineForked and EngineReentered.
        """
        self.check_caller("waiting")
        self.note_reader(channel)
        self._look_for_life()
        if self._gone and self._error is not None and channel.ended is None:
            refuse(channel, self._error)

    def note_reader(self, channel: Channel) -> None:
        """Somebody looks at the request: it is not unread, and if it was set aside it goes on. Never raises."""
        channel.last_read = time.monotonic()
        if channel.parked:
            self._post(lambda: self._resume(channel))

    def tell(self, function: Callable[[Engine], object]) -> None:
        """Run a function on the engine between two steps, some time. Safe from finalizers: never blocks or raises."""

        def run() -> None:
            if self._error is None:
                function(self._engine)

        self._post(run)

    def call(self, function: Callable[[Engine], T], timeout: float | None = None) -> T:
        """Run a function on the engine between two steps and return its result.

        Raises what the function raises, TimeoutError after `timeout` seconds, and as `check_caller` and `check_alive`.
        """
        self.check_caller("this call")
        self.check_alive()
        # Not a Future: its lock, left behind by an interrupt, would stop the engine's thread.
        answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                self.check_alive()
                answer.put((function(self._engine), None))
            except BaseException as error:
                answer.put((None, let_go(error)))

        self._post(run)
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
            try:
                value, error = answer.get(timeout=max(0.0, left))
            except queue.Empty:
                if left <= 0:
                    raise TimeoutError(f"the engine did not answer within {timeout} s") from None
                self._look_for_life()
                self.check_alive()
            else:
                if error is not None:
                    raise error
                return value  # type: ignore[return-value]  # without an error there is a value

    def stop(self) -> None:
        """Ask the thread to end every request and itself. Safe from finalizers: it neither blocks nor raises."""
        if os.getpid() == self._pid:
            self._stopping = self._engine.stop_asked = True
            self._post(lambda: None)

    def join(self, timeout: float = JOIN_TIMEOUT) -> None:
        """Wait for a stopped thread to end and give its memory back, `timeout` seconds at most.

        Not Thread.join: interrupted at a bad moment, that takes a running thread for a finished one (so does is_alive).
        """
        if os.getpid() != self._pid or self._thread.ident in (None, threading.get_ident()):
            return
        deadline = time.monotonic() + timeout
        while not self._gone and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                self._ended.put(self._ended.get(timeout=min(SLICE, left)))  # back, for whoever else waits

    def _look_for_life(self) -> None:
        """Notice a thread that makes no progress."""
        busy = self._awake and not self._gone
        stuck = self._watchdog.look(self._engine.last_beat, busy, self._thread.ident)
        if stuck is not None:
            self._error = self._error or EngineDead(f"the engine made no progress for {stuck:.0f} s")
            self._gone = True
            self._channels.refuse_all(self._error)
            self._read_mailbox()

    def _post(self, message: Callable[[], None]) -> None:
        if os.getpid() != self._pid:
            return
        self._mailbox.put(message)
        if self._gone:
            self._read_mailbox()
        elif self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed: the thread reads the mailbox once more after that
                self._loop.call_soon_threadsafe(self._wake.set)

    def _read_mailbox(self) -> None:
        """Run what was posted: on the engine's thread, or on anybody's once that is gone and everything is refused."""
        for _ in range(self._mailbox.qsize()):
            try:
                message = self._mailbox.get_nowait()
            except queue.Empty:
                return
            try:
                message()
            except Exception as error:
                if not self._gone:
                    self._engine.start_over(error)

    # ---- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        assert self._loop is not None
        error: Exception = EngineClosed("this LLM was closed")
        try:
            self._loop.run_until_complete(self._main())
        except EngineDead as dead:
            error = dead
        except BaseException as fault:  # nobody planned for it
            error = EngineDead(f"the engine failed: {fault!r}")
            error.__cause__ = fault
        self._haste.end()
        let_go(error)
        if not isinstance(error, EngineClosed):
            log.error("the engine is dead", exc_info=error)
        self._end(error)
        self._loop.close()
        self._gone = True
        self._ended.put(None)
        self._read_mailbox()

    async def _main(self) -> None:
        while True:
            self._awake = True
            self._engine.last_beat = time.monotonic()
            self._read_mailbox()
            if self._stopping:
                break
            if self._engine.has_work:
                self._haste.begin()
                self._step()
                await asyncio.sleep(0)
            else:
                self._haste.end()
                await self._sleep()
        self._read_mailbox()  # what was cancelled before the end is cancelled, not closed

    def _step(self) -> None:
        try:
            output = self._engine.step()
        except StepStopped:
            return
        if self._error is not None:  # given up by whoever waited for this step
            raise self._error
        self._channels.deliver(output, self._engine.cancel)
        if time.monotonic() >= self._next_sweep:
            self._sweep()

    async def _sleep(self) -> None:
        """Until a message comes or a deadline passes. An idle engine uses no CPU."""
        self._wake.clear()
        if not self._mailbox.empty():
            return
        deadline = self._engine.next_deadline
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._awake = False
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout)
        self._awake = True
        self._engine.last_beat = time.monotonic()
        if deadline is not None and time.monotonic() >= deadline:
            self._step()  # the engine ends what has expired

    def _resume(self, channel: Channel) -> None:
        """Somebody reads a parked request again."""
        channel.parked = False
        if self._error is None:
            self._engine.resume(channel.request_id)

    def _cancel(self, request_id: int) -> None:
        if request_id in self._shaping:
            self._shaping.remove(request_id)
            refuse(self._channels.pop(request_id), _never_taken(request_id))
        if self._error is None:
            self._engine.cancel(request_id)

    def _sweep(self) -> None:
        """Park foreground requests nobody reads for a while; end those nobody can read, whose cancel got lost."""
        now = time.monotonic()
        self._next_sweep = now + SWEEP_SECONDS
        for request_id, channel in list(self._channels.items()):
            if channel.is_abandoned:
                self._cancel(request_id)
            elif channel.foreground and not channel.parked and now - channel.last_read > READER_PATIENCE:
                channel.parked = True
                self._engine.park(request_id)

    def _end(self, error: Exception) -> None:
        """Take no more requests, end those there are with this error, give the memory back. Never raises."""
        self._error = self._error or error
        try:
            self._channels.deliver(self._engine.end_all(self._error), self._engine.cancel)
        except Exception:
            log.error("ending requests failed", exc_info=True)
        self._channels.refuse_all(self._error)
        self._channels.clear()
        self._shaping.clear()
        try:
            self._engine.close()
        except Exception:
            log.error("giving memory back failed", exc_info=True)


def _never_taken(request_id: int) -> RequestCancelled:
    return RequestCancelled(f"request {request_id} was cancelled before it was taken")


def _run_held(held: list[Worker]) -> None:
    """The thread's function. It holds the worker only once it runs."""
    with contextlib.suppress(IndexError):
        held.pop()._run()
