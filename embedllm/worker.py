"""The engine's thread: one daemon thread with its own asyncio loop, a mailbox in, channels out.

Owns the thread and nothing of the policy. Only this thread touches the engine; everybody else posts. Callers and
finalizers share no lock with it: they use SimpleQueue.put and call_soon_threadsafe only. Invariant: every channel
handed in is ended, whatever happens to the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from embedllm.channel import Channel, fire
from embedllm.engine import Engine, StepStopped
from embedllm.errors import EngineClosed, EngineDead, EngineForked, EngineReentered
from embedllm.outputs import Timing, Usage
from embedllm.request import Ended, Request, StepOutput

READER_PATIENCE = 30.0  # seconds a foreground request may have unread tokens before it gives its blocks back
STALLED, DEAD = 30.0, 120.0  # seconds without a step's end: then a warning with the stack, then EngineDead
JOIN_TIMEOUT = 2.0

log = logging.getLogger("embedllm")
T = TypeVar("T")


class Worker:
    """Runs an engine. All methods but the private ones may be called from any thread."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._mailbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._channels: dict[int, Channel] = {}
        self._error: Exception | None = None  # why no more requests are taken
        self._pid = os.getpid()
        self._loop = asyncio.SelectorEventLoop()
        self._wake = asyncio.Event()
        self._stopping = False
        self._stepping = False
        self._warned = False
        self._next_reader_check = 0.0
        self._thread = threading.Thread(target=self._run, name=f"embedllm-{name}", daemon=True)
        self._thread.start()

    # ---- any thread -------------------------------------------------------------------------------------------

    def check_caller(self, what: str) -> None:
        """Raises where waiting for the engine would wait for ever: on its own thread, or after fork()."""
        if os.getpid() != self._pid:
            raise EngineForked(
                "this process was forked from the one that made the LLM, and its engine thread did not come along; "
                "make the LLM after the fork"
            )
        if threading.get_ident() == self._thread.ident:
            raise EngineReentered(f"{what} would wait for the engine from inside its own thread (in a callback)")

    def submit(self, request: Request, channel: Channel) -> None:
        """Queue a validated request. Raises EngineClosed, EngineDead or EngineForked."""
        self.check_alive()
        channel.watch = self.watch

        def take() -> None:
            if self._error is not None:
                self._refuse(channel)
                return
            self._channels[request.id] = channel
            self._engine.submit(request)

        self._post(take)

    def cancel(self, request_id: int) -> None:
        """End a request. Safe from finalizers: it neither blocks nor raises."""
        self._post(lambda: self._engine.cancel(request_id))

    def resume(self, channel: Channel) -> None:
        """Somebody reads a parked request again."""

        def resume() -> None:
            channel.parked = False
            self._engine.resume(channel.request_id)

        self._post(resume)

    def call(self, function: Callable[[Engine], T], timeout: float | None = None) -> T:
        """Run a function on the engine between two steps and return its result."""
        self.check_caller("this call")
        self.check_alive()
        answer: Future[T] = Future()

        def run() -> None:
            try:
                if self._error is not None:
                    raise type(self._error)(*self._error.args)
                answer.set_result(function(self._engine))
            except BaseException as error:
                answer.set_exception(error)

        self._post(run)
        return answer.result(timeout)

    def check_alive(self) -> None:
        if os.getpid() != self._pid:
            self.check_caller("")
        error = self._error
        if error is not None:
            raise type(error)(*error.args) from error.__cause__

    def close(self, timeout: float = JOIN_TIMEOUT) -> None:
        """End every request as cancelled and stop the thread; waits up to `timeout` seconds for the step in flight.

        Idempotent. Called from the engine's own thread (a finalizer) it only asks.
        """
        if os.getpid() != self._pid:
            return
        self._engine.stop_asked = True
        self._post(self._stop)
        if threading.get_ident() != self._thread.ident:
            self._thread.join(timeout)

    def watch(self) -> None:
        """Called now and then by whoever waits: notices a step that makes no progress. The watchdog is the waiters."""
        if not self._stepping:
            return
        stuck = time.monotonic() - self._engine.last_beat
        if stuck > DEAD and self._error is None:
            self._error = EngineDead(f"the engine made no progress for {stuck:.0f} s")
            for channel in list(self._channels.values()):
                self._refuse(channel)
        elif stuck > STALLED and not self._warned:
            self._warned = True
            frame = sys._current_frames().get(self._thread.ident or 0)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else "no stack"
            log.warning("the engine made no progress for %.0f s; it is in:\n%s", stuck, stack)

    @property
    def alive(self) -> bool:
        return self._error is None and os.getpid() == self._pid

    def _post(self, message: Callable[[], None]) -> None:
        self._mailbox.put(message)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._wake.set)

    # ---- the engine's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        while not self._stopping:
            self._read_mailbox()
            if self._stopping:
                break
            if self._engine.has_work:
                self._step()
                await asyncio.sleep(0)
            else:
                await self._sleep()
        self._shut(EngineClosed("this LLM was closed"))
        self._engine.close()

    def _read_mailbox(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._mailbox.get_nowait()()

    def _step(self) -> None:
        self._engine.last_beat = time.monotonic()
        self._stepping = True
        try:
            output = self._engine.step()
        except StepStopped:
            return
        except BaseException as error:  # EngineDead, or something nobody planned for
            dead = error if isinstance(error, EngineDead) else EngineDead(f"the engine failed: {error!r}")
            dead.__cause__ = error.__cause__ if dead is error else error
            log.error("engine dead", exc_info=error)
            self._shut(dead)
            return
        finally:
            self._stepping = False
        if self._error is not None:  # given up by whoever waited for this step
            self._shut(self._error)
            return
        self._deliver(output)
        if time.monotonic() >= self._next_reader_check:
            self._park_unread()

    async def _sleep(self) -> None:
        """Until a message comes or a deadline passes. An idle engine uses no CPU."""
        self._wake.clear()
        if not self._mailbox.empty():
            return
        deadline = self._engine.next_deadline
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout)
        if deadline is not None and time.monotonic() >= deadline:
            self._step()  # the engine ends what has expired

    def _deliver(self, output: StepOutput) -> None:
        """Write everything down, then wake each reader once."""
        touched: dict[int, Channel] = {}
        for update in output.updates:
            channel = self._channels.get(update.request_id)
            if channel is not None and channel.ended is None:
                channel.push(update)
                touched[update.request_id] = channel
        for ended in output.ended:
            channel = self._channels.pop(ended.request_id, None)
            if channel is not None and channel.ended is None:
                channel.end(ended)
                touched[ended.request_id] = channel
        waiters = [waiter for channel in touched.values() for waiter in channel.take_waiters()]
        if waiters:
            fire(waiters)

    def _park_unread(self) -> None:
        """A foreground request whose reader went away keeps its tokens and gives its blocks back for now."""
        now = time.monotonic()
        self._next_reader_check = now + 1.0
        for channel in self._channels.values():
            if channel.foreground and not channel.parked and now - channel.last_read > READER_PATIENCE:
                channel.parked = True
                self._engine.park(channel.request_id)

    def _refuse(self, channel: Channel) -> None:
        channel.end(Ended(channel.request_id, Usage(), Timing(), None, self._error))
        fire(channel.take_waiters())

    def _shut(self, error: Exception) -> None:
        """Take no more requests and end those there are with this error."""
        if self._error is None:
            self._error = error
        try:
            self._deliver(self._engine.end_all(self._error))
        except Exception:
            log.error("ending requests failed", exc_info=True)
        for channel in list(self._channels.values()):
            self._refuse(channel)
        self._channels.clear()
        self._read_mailbox()

    def _stop(self) -> None:
        self._stopping = True
