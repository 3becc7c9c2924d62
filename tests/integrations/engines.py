"""Engines whose requests end when a test says so, and what was in flight in them."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import embedllm
from embedllm.testing import ScriptedModel
from tests.integrations import oracle

PATIENCE = 30.0  # seconds until a test that waits for something has failed


class CountingLLM(embedllm.LLM):
    """Opens a gate once so many requests were submitted, and records what is in flight."""

    def __init__(self, open_after: int, reply: str = "Yes.", **options: Any) -> None:
        gate, tokenizer = threading.Event(), oracle.HermesTokenizer()

        def said(prompt: list[int]) -> list[int]:
            gate.wait(PATIENCE)
            return tokenizer.encode(reply)

        super().__init__(ScriptedModel(said, tokenizer, max_model_len=16_384), tokenizer=tokenizer, **options)
        self._gate, self._left, self._lock = gate, open_after, threading.Lock()

    def _enqueue(self, *args: Any, **kwargs: Any) -> embedllm.Generation:
        generation = super()._enqueue(*args, **kwargs)
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                self._gate.set()
        return generation


@contextlib.contextmanager
def peak(llm: embedllm.LLM) -> Iterator[Callable[[], int]]:
    """How many requests were in flight at once while the block ran, as the engine saw it."""
    with llm.trace() as trace:
        yield lambda: _peak(trace)


def _peak(trace: embedllm.Trace) -> int:
    running: set[object] = set()
    most = 0
    for name, *values in trace:
        if name == "queue":
            running.add(values[0])
        elif name == "finish":
            running.discard(values[0])
        most = max(most, len(running))
    return most


@contextlib.contextmanager
def endless() -> Iterator[embedllm.LLM]:
    """A model that goes on for minutes unless it is stopped, or asked something short."""
    tokenizer = oracle.HermesTokenizer()
    long, short = list(b"word " * 3_000), list(b"Yes.")

    def said(prompt: list[int]) -> list[int]:
        return short if "short" in tokenizer.decode(prompt) else long

    model = ScriptedModel(said, tokenizer, delay=0.005, max_model_len=16_384)
    with embedllm.LLM(model, tokenizer=tokenizer) as llm:
        yield llm


def ended(llm: embedllm.LLM) -> dict[str, int]:
    """How the requests of this engine ended, once none runs."""
    deadline = time.monotonic() + PATIENCE
    while True:
        stats = llm.stats()
        if not stats.num_requests_running and not stats.num_requests_waiting:
            return stats.request_finished
        assert time.monotonic() < deadline, stats
        time.sleep(0.005)
