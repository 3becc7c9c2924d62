"""The handle on one request: iterate it, await it, ask it, cancel it; from any thread and any event loop.

Owns the reader's side of a request. Knows nothing of how tokens are made. Invariant: every cursor yields deltas that
join to the completion, and no reader can slow the engine.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from embedllm.channel import Channel
from embedllm.outputs import Completion, Delta

if TYPE_CHECKING:
    from embedllm.worker import Worker


class Generation:
    """A running request.

    A background one (`submit`) lives until it ends, is cancelled, or this handle is dropped. A foreground one
    (`stream`) also ends when its last started cursor is closed or dropped, or a wait for it is interrupted.
    Iteration always replays from the first token. All methods may be called from any thread.
    """

    def __init__(self, worker: Worker, channel: Channel, prompt: list[int], keep_alive: object = None) -> None:
        self._worker = worker
        self._channel = channel
        self._prompt = prompt
        self._keep_alive = keep_alive  # the LLM the request came from: it stays open while somebody waits
        self._num_cursors = 0
        weakref.finalize(self, _dropped, worker, channel).atexit = False

    # ---- ask --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._channel.ended is not None

    @property
    def text(self) -> str:
        """The text of sample 0 so far."""
        return self._channel.samples[0].delta(0, 0)[0].text

    @property
    def tokens(self) -> list[int]:
        """The tokens of sample 0 so far."""
        return self._channel.samples[0].delta(0, 0)[0].tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples so far."""
        return sum(sample.num_tokens for sample in self._channel.samples)

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt as token ids."""
        return list(self._prompt)

    def cancel(self) -> None:
        """End the request now; a no-op once it has ended. Returns at once, its blocks are back within one step."""
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
        self._worker.check_caller("wait()")
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                seen = self.touch()  # before `done`: news that comes between is then seen by the wait
                if self.done:
                    return True
                left = None if deadline is None else deadline - time.monotonic()
                if not self._channel.wait(seen, left):
                    return self.done
        except BaseException:
            self._interrupted()
            raise

    def touch(self) -> int:
        """Note that somebody follows this request; returns the version of what there is to read."""
        seen = self._channel.version
        self._channel.last_read = time.monotonic()
        if self._channel.parked:
            self._worker.resume(self._channel)
        return seen

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
        try:
            while True:
                seen = self.touch()
                if self.done:
                    break
                await self._channel.wait_async(seen)
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
        return self._channel.completion()._repr_markdown_()

    def _repr_html_(self) -> str:
        return self._channel.completion()._repr_html_()


def _dropped(worker: Worker, channel: Channel) -> None:
    if channel.ended is None:
        worker.cancel(channel.request_id)


class _Reading:
    """Where one reader is: the next piece of each sample, and which samples are read to their end."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._next = [0] * len(generation._channel.samples)
        self._over: set[int] = set()
        self._started = self._closed = False

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._generation._num_cursors += 1

    def _take(self) -> Delta | None:
        """The next delta there is, or None."""
        for index, sample in enumerate(self._generation._channel.samples):
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
        if self._closed:
            return
        self._closed = True
        if self._started:
            self._generation._num_cursors -= 1
            if self._generation._num_cursors == 0 and self._generation._channel.foreground:
                self._generation.cancel()

    def __del__(self) -> None:
        self.close()


class Cursor(_Reading):
    """Reads deltas from the start, blocking in slices. Not a generator: dropping it runs no code of the caller's."""

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> Delta:
        generation = self._generation
        generation._worker.check_caller("iteration")
        self._start()
        try:
            while not self._closed:
                seen = generation.touch()
                over = generation.done  # looked at before the deltas: the last one is written before it
                delta = self._take()
                if delta is not None:
                    return delta
                if over:
                    generation._channel.raise_error()
                    break
                generation._channel.wait(seen)
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncCursor(_Reading):
    """The same for `async for`, in whatever loop awaits it."""

    def __aiter__(self) -> AsyncCursor:
        return self

    async def __anext__(self) -> Delta:
        generation = self._generation
        self._start()
        try:
            while not self._closed:
                seen = generation.touch()
                over = generation.done  # looked at before the deltas: the last one is written before it
                delta = self._take()
                if delta is not None:
                    return delta
                if over:
                    generation._channel.raise_error()
                    break
                await generation._channel.wait_async(seen)
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Stop reading; see `close`."""
        self.close()

    async def __aenter__(self) -> AsyncCursor:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()
