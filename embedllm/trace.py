"""A record of every block and scheduler event of the engine, step by step.

Owns the ring the events go into and how it is read. The engine builds an event only while a recorder is
attached, and never waits for anybody. Invariant: events are in order; when the ring overflows, `num_lost` says how
many of the oldest are gone.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from embedllm import events
from embedllm.errors import InvalidRequest
from embedllm.events import Event, Recorder
from embedllm.plan_types import Plan

DEFAULT_CAPACITY = 1_000_000  # events; about 100 MB


def record_plan(recorder: Recorder, plan: Plan, now: float) -> None:
    """Write down what a step will run. now: seconds of the engine's clock."""
    recorder.append((events.STEP, plan.number, len(plan.entries), plan.num_tokens, int(now * 1e6)))
    for source, destination in plan.copies:
        recorder.append((events.COPY, source, destination))
    for entry in plan.entries:
        recorder.append((events.SCHEDULE, entry.sequence_id, entry.start, entry.num_tokens))


class Recorders:
    """Several recorders as one."""

    def __init__(self, members: Sequence[Recorder]) -> None:
        self.members = tuple(members)

    def append(self, event: Event) -> None:
        for member in self.members:
            member.append(event)


class Ring:
    """The newest events and how many there ever were. The engine holds this, never the Trace that reads it."""

    def __init__(self, capacity: int) -> None:
        self.num_recorded = 0
        self.events: deque[Event] = deque(maxlen=capacity)

    def append(self, event: Event) -> None:
        self.num_recorded += 1
        self.events.append(event)


class Trace:
    """Events of one engine since it was attached; iterate it for tuples `(name, *numbers)`.

    It records until `stop()`, until it is dropped, or until the LLM it came from is closed. Where the engine had to
    start over after a fault of its own, the last event is "start_over".
    """

    def __init__(self, num_blocks: int, block_size: int, capacity: int = DEFAULT_CAPACITY) -> None:
        if type(capacity) is not int or capacity < 1:
            raise InvalidRequest(f"capacity must be an integer of at least 1, got {capacity!r}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ring = Ring(capacity)
        self._finalizer: weakref.finalize[[], Trace] | None = None

    def on_stop(self, detach: Callable[[], None]) -> None:
        """What ends the recording; it must neither block nor hold this trace."""
        self._finalizer = weakref.finalize(self, detach)
        self._finalizer.atexit = False

    def stop(self) -> None:
        """End the recording; what was recorded stays. Idempotent."""
        if self._finalizer is not None:
            self._finalizer()

    @property
    def num_recorded(self) -> int:
        """Events since the beginning, lost ones included."""
        return self.ring.num_recorded

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def num_lost(self) -> int:
        return self.num_recorded - len(self.ring.events)

    def __len__(self) -> int:
        return len(self.ring.events)

    def __iter__(self) -> Iterator[Event]:
        while True:
            with contextlib.suppress(RuntimeError):  # the engine went on recording meanwhile
                return iter(list(self.ring.events))

    def steps(self) -> Iterator[list[Event]]:
        """The events grouped by step: each group begins with its "step" event, the first with what came before."""
        group: list[Event] = []
        for event in self:
            if event[0] == events.STEP and group:
                yield group
                group = []
            group.append(event)
        if group:
            yield group

    def counts(self) -> dict[str, int]:
        """How often each kind of event happened."""
        return dict(Counter(str(event[0]) for event in self))

    def save(self, path: str | Path) -> None:
        """Write it as JSON lines: a header, then one event per line. Holds ids and counts, never prompt text."""
        with open(path, "w", encoding="utf-8") as file:
            header = {"num_blocks": self.num_blocks, "block_size": self.block_size, "num_lost": self.num_lost}
            file.write(json.dumps(header) + "\n")
            file.writelines(json.dumps(event) + "\n" for event in self)
