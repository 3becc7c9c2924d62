"""When requests expire.

Owns a heap of (time, request id). Knows no requests: who has ended meanwhile is left out when its turn comes.
Invariant: the heap is never longer than twice the live requests and a few.
"""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Sized
from typing import Protocol


class Live(Sized, Container[int], Protocol):
    """The ids of the requests that have not ended."""


class Deadlines:
    """Times in monotonic seconds."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: float, request_id: int) -> None:
        """A live request expires at this time."""
        heapq.heappush(self._heap, (time, request_id))
        if len(self._heap) > 2 * len(self._live) + 64:  # most of them ended long before
            self._heap = [pair for pair in self._heap if pair[1] in self._live]
            heapq.heapify(self._heap)

    @property
    def next(self) -> float | None:
        """When the next live request expires."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> Iterator[int]:
        """The live requests whose time has come, each once."""
        while (time := self.next) is not None and time <= now:
            yield heapq.heappop(self._heap)[1]
