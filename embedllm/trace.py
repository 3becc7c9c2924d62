"""A record of every block and scheduler event of the engine, step by step.

Owns the ring the events go into, how it is read and replayed, and its files. The engine builds an event only while a
recorder is attached, and never waits for anybody. Invariant: events are in order; when the ring overflows, `num_lost`
says how many of the oldest are gone.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embedllm import events, perfetto, wire
from embedllm.errors import InvalidRequest
from embedllm.events import Event
from embedllm.replay import State
from embedllm.view.page import page

if TYPE_CHECKING:
    from embedllm.engine import Engine

DEFAULT_CAPACITY = 1_000_000  # events; about 100 MB
BINARY = ".ekv"  # suffix of the compact form: this header, then messages of the wire, deflated
FILE_HEADER = struct.Struct("<4sIIIQ")  # magic, version, num_blocks, block_size, num_lost
FILE_MAGIC = b"EKVF"
PER_MESSAGE = 65_536  # events


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
    start over after a fault of its own, the last event is "start_over". `beginning` is the moment that the first event
    follows; None if it is not known.
    """

    def __init__(self, num_blocks: int, block_size: int, capacity: int = DEFAULT_CAPACITY) -> None:
        if type(capacity) is not int or capacity < 1:
            raise InvalidRequest(f"capacity must be an integer of at least 1, got {capacity!r}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ring = Ring(capacity)
        self.beginning: State | None = None
        self._finalizer: weakref.finalize[[], Trace] | None = None

    def begin(self, engine: Engine) -> None:
        """Record this engine from here on; called on its thread."""
        self.beginning = State.of(engine)
        engine.attach(self.ring)

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

    # ---- replay -----------------------------------------------------------------------------------------------

    def states(self) -> Iterator[State]:
        """The blocks and sequences step by step: as they were when the next step began, or the recording ended.

        The first is that of the step before the recording. Raises InvalidRequest where events are lost.
        """
        state = self._beginning()
        for group in self.steps():
            state.apply(group)
            yield state.copy()

    def at(self, step: int) -> State:
        """What `states()` gives for this step, or for the last one if that was before it.

        Raises InvalidRequest for a step before the recording, and where events are lost.
        """
        state = self._beginning()
        if step < state.step:
            raise InvalidRequest(f"step {step} is not in this trace, which begins after step {state.step}")
        for group in self.steps():
            if group[0][0] == events.STEP and group[0][1] > step:  # type: ignore[operator]
                break
            state.apply(group)
        return state

    def _beginning(self) -> State:
        if self.num_lost:
            raise InvalidRequest(
                f"the oldest {self.num_lost} events are lost, so this trace cannot be replayed; "
                "give trace() more capacity or stop it sooner"
            )
        if self.beginning is None:
            raise InvalidRequest("it is not known what this trace began with, so it cannot be replayed")
        return self.beginning.copy()

    def to_perfetto(self, path: str | Path) -> None:
        """Write it for ui.perfetto.dev or chrome://tracing: a track per sequence, and counters of the blocks.

        Holds ids and counts, never text. Raises InvalidRequest where events are lost.
        """
        rows = perfetto.rows(self._beginning(), self.steps())
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"displayTimeUnit": "ms", "traceEvents": list(rows)}, file)

    # ---- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write it for `embedllm.open_trace`: compact if the name ends in ".ekv", else as JSON lines, a header and
        then one event per line. Holds ids and counts, never prompt text."""
        keyframe = b"" if self.beginning is None else wire.encode_keyframe(self.beginning, 0)
        if Path(path).suffix == BINARY:
            header = FILE_HEADER.pack(FILE_MAGIC, wire.VERSION, self.num_blocks, self.block_size, self.num_lost)
            Path(path).write_bytes(header + zlib.compress(keyframe + b"".join(self._messages())))
            return
        facts = {"num_blocks": self.num_blocks, "block_size": self.block_size, "num_lost": self.num_lost}
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps({**facts, "beginning": base64.b64encode(zlib.compress(keyframe)).decode()}) + "\n")
            file.writelines(json.dumps(event) + "\n" for event in self)

    def to_html(self, path: str | Path) -> None:
        """Write one file that replays it in a browser, from any disk without a network. Raises InvalidRequest where
        events were lost: there is no beginning to replay from."""
        messages = [wire.encode_keyframe(self._beginning(), 0), *self._messages()]
        about = {"num_blocks": self.num_blocks, "block_size": self.block_size}
        Path(path).write_text(page(messages, about, "embedllm: a trace of the KV cache"), encoding="utf-8")

    def _messages(self) -> Iterator[bytes]:
        recorded = list(self)
        for number, start in enumerate(range(0, len(recorded), PER_MESSAGE), 1):
            lost = number == 1 and (self.num_lost > 0 or self.beginning is None)
            yield wire.encode_events(recorded[start : start + PER_MESSAGE], number, 0, lost)


def open_trace(path: str | Path) -> Trace:
    """Read what `Trace.save` wrote, in either form. Raises InvalidRequest for anything else, OSError if unreadable."""
    data = Path(path).read_bytes()
    try:
        return _from_binary(data) if data.startswith(FILE_MAGIC) else _from_lines(data.decode())
    except Exception as error:
        raise InvalidRequest(f"{path} is no trace that can be read: {error}") from error


def _from_binary(data: bytes) -> Trace:
    _, version, num_blocks, block_size, num_lost = FILE_HEADER.unpack_from(data)
    if version > wire.VERSION:
        raise InvalidRequest(f"it is in format {version}, made by a newer embedllm")
    messages = list(wire.decode_all(zlib.decompress(data[FILE_HEADER.size :])))
    recorded = [event for message in messages for event in message.events]
    return _opened(num_blocks, block_size, num_lost, messages[0].state if messages else None, recorded)


def _from_lines(text: str) -> Trace:
    header, *lines = [json.loads(line) for line in text.splitlines()]
    recorded: list[Event] = [tuple(line) for line in lines]
    keyframe = zlib.decompress(base64.b64decode(header["beginning"]))
    messages = list(wire.decode_all(keyframe + wire.encode_events(recorded, 1, 0, header["num_lost"] > 0)))
    beginning = messages[0].state
    return _opened(header["num_blocks"], header["block_size"], header["num_lost"], beginning, messages[-1].events)


def _opened(
    num_blocks: int, block_size: int, num_lost: int, beginning: State | None, recorded: Sequence[Event]
) -> Trace:
    trace = Trace(num_blocks, block_size, max(1, len(recorded)))
    trace.beginning = beginning
    trace.ring.events.extend(recorded)
    trace.ring.num_recorded = num_lost + len(recorded)
    return trace
