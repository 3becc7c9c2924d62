"""What a request has said so far, and who waits to hear more.

Owns the record of one request, written by the engine thread and read by any other. Shares no lock with anybody: the
engine appends and then bumps `version`; a reader leaves a waiter and then looks at `version` again, so either the
engine sees the waiter or the reader sees the news. Invariant: the record only grows, and never after `ended`.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from embedllm.errors import EmbedLLMError, RequestCancelled, RequestFailed
from embedllm.outputs import NOTHING, Completion, Delta, FinishReason, Said, TokenLogprobs
from embedllm.request import Ended, Update

SLICE = 0.25  # seconds a wait lasts before it looks whether the engine still lives
HEARTBEAT = 0.1  # seconds that an event loop sleeps at most while one of its coroutines reads


@dataclass(slots=True)
class SampleRecord:
    """One sample's pieces in order; piece i is (what it says, tokens, logprobs)."""

    pieces: list[tuple[Said, list[int], list[TokenLogprobs] | None]] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def delta(self, index: int, start: int) -> tuple[Delta, int]:
        """Everything from piece `start` on, merged, and where the next one starts."""
        finish_reason = self.finish_reason  # read before the pieces: it is written after them
        pieces = self.pieces[start:]
        text = "".join(piece[0].text for piece in pieces)
        tokens = [token for piece in pieces for token in piece[1]]
        logprobs = [found for piece in pieces for found in piece[2] or ()]
        reasoning = "".join(piece[0].reasoning for piece in pieces)
        calls = tuple(call for piece in pieces for call in piece[0].tool_calls)
        delta = Delta(index, text, tokens, logprobs or None, finish_reason, reasoning, calls)
        return delta, start + len(pieces)


class Waiter:
    """One reader's own alarm: a queue for a thread, a future for a coroutine of `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        if loop is None:
            self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        else:
            self.future: asyncio.Future[None] = loop.create_future()

    def fire(self) -> None:
        """Called by any thread for a thread's alarm, on the loop for a coroutine's."""
        if self.loop is None:
            self._bell.put(None)
        elif not self.future.done():
            self.future.set_result(None)

    def wait(self, timeout: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._bell.get(timeout=timeout)


def fire(waiters: Iterable[Waiter]) -> None:
    """Wake them all with one call per event loop. Never blocks; a closed loop is its owner's affair."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Waiter]] = {}
    for waiter in waiters:
        if waiter.loop is None:
            waiter.fire()
        else:
            by_loop.setdefault(waiter.loop, []).append(waiter)
    for loop, members in by_loop.items():
        with contextlib.suppress(Exception):  # closed, or not as loops should be: its readers look again by themselves
            loop.call_soon_threadsafe(_fire_each, members)


def _fire_each(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter.fire()


class Cursor(Protocol):
    """A reader's place in a record."""

    closed: bool


class Channel:
    """One request's record and the readers waiting for it."""

    def __init__(
        self,
        request_id: int,
        num_samples: int,
        *,
        foreground: bool,
        owner: object = None,
        ends_with_cell: bool = False,
        is_chat: bool = False,
        parse: Callable[[str], Any] | None = None,
    ) -> None:
        self.request_id = request_id
        self.foreground = foreground
        self.ends_with_cell = ends_with_cell  # where a notebook's cell began it, Stop in that cell ends it
        self.is_chat = is_chat  # the answer to a conversation, which is Markdown, as opposed to a text going on
        self.parse = parse  # makes the value of an answer's text
        self.began = time.monotonic()
        self.first_token: float | None = None  # when it came
        self.owner = owner  # the LLM the request came from: it stays open until the request has ended
        self.handle: weakref.ref[object] | None = None  # the Generation; nobody else can ever read this
        self.cursors: list[weakref.ref[Cursor]] = []  # those that were started and are still there
        self.was_read = False  # whether any was
        self.samples = [SampleRecord() for _ in range(num_samples)]
        self.ended: Ended | None = None
        self.version = 0
        self.last_read = time.monotonic()
        self.parked = False
        self._waiters: list[Waiter] = []
        self._awake: set[asyncio.AbstractEventLoop] = set()

    # ---- the engine's side ------------------------------------------------------------------------------------

    def push(self, update: Update) -> None:
        sample = self.samples[update.index]
        if update.said != NOTHING or update.tokens:
            self.first_token = self.first_token or time.monotonic()
            sample.pieces.append((update.said, update.tokens, update.logprobs))
            sample.num_tokens += len(update.tokens)
        if update.finish_reason is not None:
            sample.stop_reason = update.stop_reason
            sample.finish_reason = update.finish_reason

    def end(self, ended: Ended) -> None:
        """The last word. Whatever comes later is not heard."""
        if self.ended is None:
            self.ended = ended
        self.owner = self.handle = None

    def take_waiters(self) -> list[Waiter]:
        """Bump the version and return whoever waited for it, to be fired."""
        self.version += 1
        waiters, self._waiters = self._waiters, []
        return waiters

    @property
    def is_abandoned(self) -> bool:
        """Nobody can read it any more: the handle is gone, or the last cursor of a foreground request is."""
        if self.handle is not None and self.handle() is None:
            return True
        return self.foreground and self.was_read and not self.has_readers

    # ---- the readers' side ------------------------------------------------------------------------------------

    @property
    def has_readers(self) -> bool:
        """Whether a cursor was started and neither closed nor dropped."""
        return any(cursor is not None and not cursor.closed for cursor in [ref() for ref in self.cursors])

    def wait(self, seen: int, timeout: float) -> None:
        """Block until the version differs from `seen`, for `timeout` seconds at most."""
        waiter = Waiter(None)
        self._waiters.append(waiter)
        try:
            if self.version == seen:
                waiter.wait(timeout)
        finally:
            self._forget(waiter)

    async def wait_async(self, seen: int, timeout: float) -> None:
        """The same without blocking the caller's loop."""
        waiter = Waiter(asyncio.get_running_loop())
        self._waiters.append(waiter)
        try:
            if self.version == seen:
                await asyncio.wait({waiter.future}, timeout=timeout)
        finally:
            self._forget(waiter)

    def keep_awake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the running `loop` wake up every HEARTBEAT seconds until the request has ended.

        Stop in a notebook asks the loop to cancel the cell, and does not wake it from whatever it waits for.
        """
        if loop in self._awake:
            return

        def beat() -> None:
            if self.ended is None:
                loop.call_later(HEARTBEAT, beat)
            else:
                self._awake.discard(loop)

        self._awake.add(loop)
        beat()

    def _forget(self, waiter: Waiter) -> None:
        with contextlib.suppress(ValueError):  # the engine took it already
            self._waiters.remove(waiter)

    # ---- the end ----------------------------------------------------------------------------------------------

    def completion(self) -> Completion:
        """The answer so far; the whole answer once ended."""
        ended = self.ended
        outputs = []
        for index, sample in enumerate(self.samples):
            delta, _ = sample.delta(index, 0)
            reason = sample.finish_reason or ("cancelled" if ended is None else "error")
            outputs.append(
                Completion(
                    text=delta.text,
                    tokens=delta.tokens,
                    finish_reason=reason,
                    stop_reason=sample.stop_reason,
                    logprobs=delta.logprobs,
                    index=index,
                    tool_calls=list(delta.tool_calls) or None,
                    reasoning=delta.reasoning or None,
                    parse=self.parse,
                )
            )
        if ended is not None:
            outputs = [
                replace(o, usage=ended.usage, timing=ended.timing, prompt_logprobs=ended.prompt_logprobs)
                for o in outputs
            ]
        return replace(outputs[0], siblings=tuple(outputs[1:]))

    def result(self) -> Completion:
        """The completion of an ended request; raises its error with the partial completion attached."""
        self.raise_error()
        return self.completion()

    def raise_error(self) -> None:
        """If the request ended badly, raise why: a fresh exception for each reader, with the first cause behind it."""
        error = self.ended.error if self.ended is not None else None
        if error is None:
            return
        if isinstance(error, (RequestFailed, RequestCancelled)):
            raise type(error)(str(error), self.completion()) from error.__cause__
        if isinstance(error, EmbedLLMError):
            raise type(error)(*error.args) from error.__cause__
        raise RequestFailed(f"request {self.request_id} failed: {error!r}", self.completion()) from error
