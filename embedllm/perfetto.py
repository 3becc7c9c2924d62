"""A recording as rows of the Chrome trace format, which Perfetto draws.

Owns the names of tracks and counters. Knows no file. Invariant: rows hold ids and counts, never text. Format:
"Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from embedllm import events
from embedllm.events import Event
from embedllm.replay import RUNNING, WAITING, State

ENGINE, SEQUENCES = 1, 2  # process ids: they group tracks
Row = dict[str, Any]


def rows(state: State, steps: Iterable[list[Event]]) -> Iterator[Row]:
    """Rows of a recording that begins with `state`, which this follows. `steps`: its events, grouped by step.

    A slice per sequence and step lasts until the next step begins; times are microseconds of the engine's clock.
    """
    yield _name("process_name", ENGINE, 0, "KV cache")
    yield _name("process_name", SEQUENCES, 0, "sequences")
    for sequence in state.sequences.values():
        yield _name("thread_name", SEQUENCES, sequence.id, f"sequence {sequence.id}")
    slices: list[Row] = []  # of the newest step, until it is known how long it took
    for group in steps:
        state.apply(group[:1])  # its time, if it is a step's
        if group[0][0] == events.STEP:
            yield from ({**row, "dur": state.time - row["ts"]} for row in slices)
            slices = []
        for event in group:
            if event[0] == events.SCHEDULE:
                slices.append(_slice(event, state))
            else:
                yield from _row(event, state.time)
        state.apply(group[1:])
        yield from _counters(state)
    yield from ({**row, "dur": 0} for row in slices)


def _name(what: str, process: int, track: Any, name: str) -> Row:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _slice(event: Event, state: State) -> Row:
    _, sequence, start, num_tokens = event
    args = {"step": state.step, "start": start, "tokens": num_tokens}
    name = f"{num_tokens} token{'s' if num_tokens != 1 else ''}"
    return {"ph": "X", "name": name, "pid": SEQUENCES, "tid": sequence, "ts": state.time, "args": args}


def _row(event: Event, time: int) -> Iterator[Row]:
    """What an event is by itself: the name of a track, or an instant on one."""
    name, *args = event
    row: Row = {"ph": "i", "name": name, "ts": time}
    if name == events.QUEUE or name == events.FORK:
        sequence = args[name == events.FORK]
        yield _name("thread_name", SEQUENCES, sequence, f"sequence {sequence}")
    elif name in (events.PREEMPT, events.PARK, events.FINISH):
        what = {"reason": args[1]} if name == events.FINISH else {}
        yield {**row, "s": "t", "pid": SEQUENCES, "tid": args[0], "args": what}
    elif name == events.EVICT:
        yield {**row, "s": "p", "pid": ENGINE, "tid": 0, "args": {"block": args[0]}}
    elif name == events.COPY:
        yield {**row, "s": "p", "pid": ENGINE, "tid": 0, "args": {"from": args[0], "to": args[1]}}


def _counters(state: State) -> Iterator[Row]:
    used, cached = state.num_used, state.num_idle
    stages = [sequence.state for sequence in state.sequences.values()]
    blocks = {"used": used, "cached": cached, "free": state.num_blocks - used - cached}
    queues = {"running": stages.count(RUNNING), "waiting": stages.count(WAITING)}
    for name, args in (("KV blocks", blocks), ("requests", queues)):
        yield {"ph": "C", "name": name, "pid": ENGINE, "ts": state.time, "args": args}
