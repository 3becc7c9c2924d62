"""Shapes to grammars, beside the engine: each compiled once, in threads of its own, with a deadline.

Owns the compiler's threads and the cache of what they made. Knows no requests. A compile that does not end cannot be
ended: its thread is left behind, and a backend that leaves two is not used any more. Invariant: whoever waits for a
shape hears of it, and neither callers nor the engine ever wait for a lock that a compile holds.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import weakref
from collections.abc import Callable

from embedllm.errors import InvalidRequest, RequestFailed
from embedllm.structured import available
from embedllm.structured.backend import Backend, Grammar, Shape, Vocabulary
from embedllm.structured.lower import key_of, lower
from embedllm.structured_output import StructuredOutput

COMPILE_SECONDS = 10.0
MAX_STUCK = 2  # compiles that one backend may leave behind
MAX_CACHED = 64  # grammars
SYNTAX_SECONDS = 1.0  # how long a caller waits to hear that the grammar he wrote is malformed

log = logging.getLogger("embedllm")


class CompilingShape:
    """A shape on its way to a grammar; see request.CompiledShape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._answer: tuple[Grammar, Vocabulary] | None = None
        self._error: Exception | None = None
        self._waiting: list[Callable[[], None]] = []

    @property
    def compiled(self) -> tuple[Grammar, Vocabulary]:
        """The grammar and its vocabulary; raises why there is none. For whoever was told that it is done."""
        if self._answer is None:
            raise self._error or RuntimeError("the shape is not compiled yet")
        return self._answer

    def when_done(self, call: Callable[[], None]) -> None:
        """Call this once, now or on the compiler's thread."""
        self._waiting.append(call)
        if self._answer is not None or self._error is not None:
            self._tell()

    def finish(self, answer: tuple[Grammar, Vocabulary] | None, error: Exception | None) -> None:
        """What came of it; the first word counts."""
        if self._answer is None and self._error is None:
            self._answer, self._error = answer, error
            self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(IndexError):  # another thread took the last one
            while True:
                self._waiting.pop()()

    def wait(self, seconds: float) -> bool:
        """Whether it is done within so many seconds."""
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.when_done(lambda: bell.put(None))
        try:
            bell.get(timeout=seconds)
        except queue.Empty:
            return False
        return True


class Grammars:
    """The grammars of one model.

    vocabulary: makes its Vocabulary, on the compiler's thread. backends: makes what compiles, best first.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        backends: Callable[[Vocabulary], list[Backend]] = available,
        compile_seconds: float = COMPILE_SECONDS,
    ) -> None:
        self._compiler = _Compiler(vocabulary, backends, compile_seconds)
        self._cache: dict[str, CompilingShape] = {}
        self._starting = threading.Lock()
        self._started = False
        weakref.finalize(self, self._compiler.jobs.put, None).atexit = False

    def shape(self, asked: StructuredOutput) -> CompilingShape:
        """What compiles this shape, or did already. Raises InvalidRequest where it is malformed or too large."""
        key = key_of(asked)
        found = self._cache.pop(key, None)
        if found is None:
            found = CompilingShape(lower(asked))
            with self._starting:
                if not self._started:
                    threading.Thread(target=self._compiler.run, name="embedllm-grammars", daemon=True).start()
                    self._started = True
            self._compiler.jobs.put(found)
        self._cache[key] = found
        with contextlib.suppress(KeyError, StopIteration, RuntimeError):  # others may evict at the same time
            while len(self._cache) > MAX_CACHED:
                del self._cache[next(iter(self._cache))]
        if found.shape.rules is None and found.wait(SYNTAX_SECONDS):
            found.compiled  # noqa: B018  raises what is wrong with a grammar that the caller wrote
        return found


class _Compiler:
    """The thread's side."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        backends: Callable[[Vocabulary], list[Backend]],
        compile_seconds: float,
    ) -> None:
        self.jobs: queue.SimpleQueue[CompilingShape | None] = queue.SimpleQueue()
        self._make_vocabulary, self._make_backends = vocabulary, backends
        self._seconds = compile_seconds
        self._vocabulary: Vocabulary | None = None
        self._backends: list[Backend] = []
        self._stuck: dict[str, int] = {}

    def run(self) -> None:
        """Compile one after the other until there is None."""
        while (job := self.jobs.get()) is not None:
            try:
                self._compile(job)
            except Exception as error:
                job.finish(None, error)
            del job

    def _compile(self, job: CompilingShape) -> None:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
            self._backends = self._make_backends(self._vocabulary)
        backend, vocabulary = self._choose(job.shape), self._vocabulary
        backend.prepare()
        done: queue.SimpleQueue[None] = queue.SimpleQueue()

        def compile_it() -> None:
            try:
                job.finish((backend.compile(job.shape), vocabulary), None)
            except Exception as error:
                job.finish(None, error)
            done.put(None)

        threading.Thread(target=compile_it, name="embedllm-compile", daemon=True).start()
        try:
            done.get(timeout=self._seconds)
        except queue.Empty:
            job.finish(None, RequestFailed(f"its shape was not compiled within {self._seconds:g} s: make it simpler"))
            self._note_stuck(backend)

    def _choose(self, shape: Shape) -> Backend:
        reasons = []
        for backend in self._backends:
            reason = backend.refuses(shape)
            if reason is None:
                return backend
            reasons.append(reason)
        raise InvalidRequest("; ".join(reasons) or "no grammar backend is left: each had compiles that did not end")

    def _note_stuck(self, backend: Backend) -> None:
        self._stuck[backend.name] = self._stuck.get(backend.name, 0) + 1
        if self._stuck[backend.name] >= MAX_STUCK:
            self._backends.remove(backend)
            log.error("%s left %d compiles that did not end: it is not used any more", backend.name, MAX_STUCK)
