"""The handle on one request: iterate it, await it, ask it, cancel it; from any thread and any event loop.

Owns the reader's side of a request. Knows nothing of how tokens are made. Invariant: every cursor yields deltas that
join to the completion, and no reader can slow the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from embedllm.channel import HEARTBEAT, SLICE, Channel
from embedllm.display import show, views
from embedllm.models.progress import in_notebook
from embedllm.outputs import Completion, Delta

if TYPE_CHECKING:
    from embedllm.worker import Worker

TURN = 0.001  # seconds; a turn of the loop long enough for a cancellation that is under way to arrive


class Generation:
    """A running request.

    A background one (`submit`) lives until it ends, is cancelled, or this handle is dropped. A foreground one
    (`stream`) also ends when its last started cursor is closed or dropped, or a wait for it is interrupted.
    Iteration always replays from the first token. All methods may be called from any thread.
    """

    def __init__(self, worker: Worker, channel: Channel, prompt: list[int]) -> None:
        self._worker = worker
        self._channel = channel
        self._prompt = prompt
        request_id = channel.request_id
        # Not a finalizer of the weakref module: nothing of Python's runs before this callback, where an interrupt that
        # lands there could lose it.
        channel.handle = weakref.ref(self, lambda _: worker.cancel(request_id))

    # ---- ask --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way. Looking at it counts as reading, as do the next three."""
        self._worker.note_reader(self._channel)
        return self._channel.ended is not None

    @property
    def text(self) -> str:
        """The text of sample 0 so far."""
        self._worker.note_reader(self._channel)
        return self._channel.samples[0].delta(0, 0)[0].text

    @property
    def partial(self) -> Any:
        """What the text of sample 0 says so far, where JSON was asked for: plain data that grows, strings in it too.

        None while there is nothing to read.
        """
        from pydantic_core import from_json

        with contextlib.suppress(ValueError):
            return from_json(self.text.lstrip(), allow_partial="trailing-strings")
        return None

    @property
    def embedding(self) -> Any:
        """Of a request that pools its prompt's hidden states: their tensor, float32 [hidden], once it has ended."""
        return None if self._channel.ended is None else self._channel.ended.embedding

    @property
    def tokens(self) -> list[int]:
        """The tokens of sample 0 so far."""
        self._worker.note_reader(self._channel)
        return self._channel.samples[0].delta(0, 0)[0].tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples so far."""
        self._worker.note_reader(self._channel)
        return sum(sample.num_tokens for sample in self._channel.samples)

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt as token ids."""
        return list(self._prompt)

    def cancel(self) -> None:
        """End the request now; a no-op once it has ended. Returns at once, its blocks are back within one step."""
        if self._channel.ended is None:
            self._worker.cancel(self._channel.request_id)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the completion.

        Raises TimeoutError after `timeout` seconds (the request goes on), RequestFailed or RequestCancelled with the
        partial completion attached. An interrupt of a foreground request's wait cancels it.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"request {self._channel.request_id} is not done after {timeout} s")
        return self._channel.result()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the request has ended, however; False if `timeout` seconds passed first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                seen = self._channel.version  # before `done`: news that comes between ends the wait
                if self.done:
                    return True
                self.touch()
                left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._channel.wait(seen, left)
        except BaseException:
            self._interrupted()
            raise

    def touch(self) -> None:
        """Note that somebody follows this request, so that it is not set aside as unread.

        Raises EngineReentered on the engine's own thread, EngineForked in a forked child: nothing would ever come.
        """
        self._worker.attend(self._channel)

    def _interrupted(self) -> None:
        if self._channel.foreground:
            self.cancel()

    # ---- iterate and await ------------------------------------------------------------------------------------

    def __iter__(self) -> Cursor:
        return Cursor(self)

    def __aiter__(self) -> AsyncCursor:
        return AsyncCursor(self)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._wait().__await__()

    async def _wait(self) -> Completion:
        self._channel.keep_awake(asyncio.get_running_loop())
        try:
            while True:
                seen = self._channel.version
                if self.done:
                    break
                self.touch()
                await self._channel.wait_async(seen, SLICE)
        except BaseException:
            self._interrupted()
            raise
        return self._channel.result()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.cancel()

    # ---- show -------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = "running" if self._channel.ended is None else (self._channel.samples[0].finish_reason or "error")
        return f"<Generation {self._channel.request_id}: {state}, {len(self.tokens)} tokens>"

    def _repr_markdown_(self) -> str:
        return views(self._channel)["text/markdown"]

    def _repr_html_(self) -> str:
        return views(self._channel)["text/html"]

    def _ipython_display_(self) -> None:
        if not in_notebook():
            raise NotImplementedError  # IPython asks for the other views then
        show(self)


class _Reading:
    """Where one reader is: the next piece of each sample, and which samples are read to their end.

    For one thread or task at a time; others take cursors of their own.
    """

    closed = False
    _started = False

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._channel = generation._channel
        self._next = [0] * len(self._channel.samples)
        self._over: set[int] = set()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            cursors = self._channel.cursors
            cursors.append(weakref.ref(self, cursors.remove))
            self._channel.was_read = True

    def _look(self) -> tuple[Delta | None, int]:
        """The next delta there is, or None, and the version to wait on for more. Closes at the end of the record."""
        channel = self._channel
        seen, over = channel.version, channel.ended is not None  # before the deltas: the last is written before these
        if not over:
            self._generation.touch()
        delta = self._take()
        if delta is None and over:
            channel.raise_error()
            self.closed = True
        return delta, seen

    def _take(self) -> Delta | None:
        for index, sample in enumerate(self._channel.samples):
            if index in self._over:
                continue
            delta, following = sample.delta(index, self._next[index])
            if delta.tokens or delta.text or delta.finish_reason is not None:
                self._next[index] = following
                if delta.finish_reason is not None:
                    self._over.add(index)
                return delta
        return None

    def close(self) -> None:
        """Stop reading. The last cursor of a foreground request takes the request with it."""
        self.closed = True
        if self._started and self._channel.foreground and not self._channel.has_readers:
            self._generation.cancel()

    def __del__(self) -> None:
        try:
            self.close()
        except BaseException:  # an interrupt that landed in here
            self.close()
            raise


class Cursor(_Reading):
    """Reads deltas from the start, blocking in slices. Not a generator: dropping it runs no code of the caller's."""

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> Delta:
        try:
            self._start()
            while not self.closed:
                delta, seen = self._look()
                if delta is not None:
                    return delta
                if not self.closed:
                    self._channel.wait(seen, SLICE)
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncCursor(_Reading):
    """The same for `async for`, in whatever loop awaits it. A reader who is behind still gives the loop its turns."""

    _last_turn = 0.0

    def __aiter__(self) -> AsyncCursor:
        return self

    async def __anext__(self) -> Delta:
        self._channel.keep_awake(asyncio.get_running_loop())
        try:
            self._start()
            if time.monotonic() - self._last_turn > HEARTBEAT:
                await asyncio.sleep(TURN)
                self._last_turn = time.monotonic()
            while not self.closed:
                delta, seen = self._look()
                if delta is not None:
                    return delta
                if not self.closed:
                    await self._channel.wait_async(seen, SLICE)
                    self._last_turn = time.monotonic()
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop reading; see `close`."""
        self.close()

    async def __aenter__(self) -> AsyncCursor:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()
