"""The engine's blocks and sequences at one moment, followed from event to event.

Owns what each event changes. Knows no threads and no bytes; a browser follows the same events with the same rules
(view/state.js). Invariant: a State copied from an engine and given every event since equals a new copy, up to what
is not recorded: tokens in flight.
"""

from __future__ import annotations

import sys
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from embedllm import events
from embedllm.events import Event
from embedllm.sequence import Sequence
from embedllm.sequence import State as Stage

if TYPE_CHECKING:
    from embedllm.engine import Engine

WAITING, RUNNING, PARKED = range(3)
_STAGES = {Stage.WAITING: WAITING, Stage.RUNNING: RUNNING, Stage.PARKED: PARKED}


@dataclass(slots=True)
class SequenceState:
    """One unfinished sequence. `num_computed` counts tokens whose KV is there, `num_cached` those of the prompt that
    were found at its first admission; `is_new` until then. `parent`: what it was forked from, or -1."""

    id: int
    state: int = WAITING
    num_prompt: int = 0
    num_output: int = 0
    max_tokens: int = 0
    num_computed: int = 0
    num_cached: int = 0
    is_new: bool = True
    parent: int = -1
    num_preemptions: int = 0
    blocks: array[int] = field(default_factory=lambda: array("i"))

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceState:
        return cls(
            id=sequence.id,
            state=_STAGES[sequence.state],
            num_prompt=sequence.num_prompt,
            num_output=sequence.num_output,
            max_tokens=sequence.max_tokens,
            num_computed=sequence.num_computed,
            num_cached=sequence.num_cached,
            is_new=sequence.epoch == 0 and sequence.state is not Stage.RUNNING,
            num_preemptions=sequence.num_preemptions,
            blocks=sequence.blocks[:],
        )

    def leave(self, state: int) -> None:
        """Out of the running ones, with nothing held."""
        self.state, self.num_computed, self.blocks = state, 0, array("i")


@dataclass(slots=True)
class Totals:
    """Counted since the engine began: prompt tokens looked up and found in the prefix cache, preemptions, generated
    tokens, samples that ended, steps."""

    queries: int = 0
    hits: int = 0
    preemptions: int = 0
    generated: int = 0
    finished: int = 0
    steps: int = 0


class State:
    """One moment. `refs`, `node` and `since` have an int32 per block: references, the node it is findable by (0: none)
    and the step in which it last changed hands. `step` is the newest step, `time` its microseconds.

    `ended` once the engine started over: from there on the events say nothing of this state.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.step = self.time = 0
        self.block_size = block_size
        self.sequences: dict[int, SequenceState] = {}
        self.pins: dict[int, array[int]] = {}
        self.totals = Totals()
        self.ended = False
        self._empty(num_blocks)

    def _empty(self, num_blocks: int) -> None:
        self.refs, self.node = array("i", bytes(4 * num_blocks)), array("i", bytes(4 * num_blocks))
        self.since = array("i", [self.step]) * num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self.refs)

    @classmethod
    def of(cls, engine: Engine) -> State:
        """A copy of an engine between two steps, on its thread. O(cached blocks + unfinished sequences)."""
        scheduler, metrics = engine.scheduler, engine.metrics
        state = cls(scheduler.limits.num_blocks, scheduler.limits.block_size)
        state.step, state.time = scheduler.num_plans, int(engine.last_beat * 1e6)
        state.since = array("i", [state.step]) * state.num_blocks
        state.refs, nodes = scheduler.pool.copy()
        for block, node in nodes.items():
            state.node[block] = as_int31(node)
        state.sequences = {s.id: SequenceState.of(s) for s in scheduler.sequences.values() if s.state in _STAGES}
        state.pins = {pin: array("i", blocks) for pin, blocks in engine.pins.held.items()}
        state.totals = Totals(
            scheduler.num_prefix_queries,
            scheduler.num_prefix_hits,
            scheduler.num_preemptions,
            metrics.generation_tokens,
            metrics.finished.total(),
            metrics.num_steps,
        )
        return state

    def copy(self) -> State:
        """A moment of its own, which further events do not change."""
        other = State(0, self.block_size)
        other.step, other.time, other.ended = self.step, self.time, self.ended
        other.refs, other.node, other.since = self.refs[:], self.node[:], self.since[:]
        other.sequences = {s.id: replace(s, blocks=s.blocks[:]) for s in self.sequences.values()}
        other.pins = dict(self.pins)
        other.totals = replace(self.totals)
        return other

    def apply(self, happened: Iterable[Event]) -> None:
        """Follow events in order. They are an engine's own, or were checked where they were read (wire.py)."""
        for event in happened:
            change = _CHANGES.get(event[0])
            if change is not None:
                change(self, event)

    def digest(self) -> int:
        """crc32 of what is exact: blocks, sequences and pins as little-endian 32-bit words."""
        words = array("i", [self.num_blocks, self.block_size])
        words += self.refs
        words += self.node
        for _, s in sorted(self.sequences.items()):
            words.extend((s.id, s.state, s.num_prompt, s.num_output, s.num_computed, len(s.blocks)))
            words += s.blocks
        for pin, blocks in sorted(self.pins.items()):
            words.extend((pin, len(blocks)))
            words += blocks
        return zlib.crc32(to_bytes(words))

    # ---- what it says -------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[SequenceState]:
        """Those that run, in order of arrival."""
        return [s for _, s in sorted(self.sequences.items()) if s.state == RUNNING]

    @property
    def num_used(self) -> int:
        """Blocks that somebody refers to."""
        return sum(count > 0 for count in self.refs)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody refers to and that are findable by their content."""
        return sum(not count and bool(node) for count, node in zip(self.refs, self.node, strict=True))

    @property
    def num_shared(self) -> int:
        """Blocks that several refer to."""
        return sum(count > 1 for count in self.refs)

    def filled(self) -> dict[int, int]:
        """How many tokens each block of a sequence or a pin holds."""
        size = self.block_size
        filled = {block: size for blocks in self.pins.values() for block in blocks}
        for sequence in self.sequences.values():
            for i, block in enumerate(sequence.blocks):
                filled[block] = max(filled.get(block, 0), min(size, sequence.num_computed - i * size))
        return filled

    @property
    def waste(self) -> float:
        """Share of those blocks' slots that holds no token."""
        filled = self.filled()
        return 1 - sum(filled.values()) / (len(filled) * self.block_size) if filled else 0.0

    def __str__(self) -> str:
        from embedllm.picture import headline

        return headline(self)

    def __repr__(self) -> str:
        return f"<State at {self}>"

    def _repr_svg_(self) -> str:
        """How a notebook shows it."""
        from embedllm.picture import draw

        return draw(self)

    # ---- what each event changes ------------------------------------------------------------------------------

    def _step(self, event: tuple[Any, ...]) -> None:
        self.step, self.time = event[1], event[4]
        self.totals.steps += 1

    def _queue(self, event: tuple[Any, ...]) -> None:
        sequence = self.sequences.setdefault(event[1], SequenceState(event[1]))
        sequence.num_prompt, sequence.max_tokens = event[2], event[3]
        sequence.leave(WAITING)

    def _admit(self, event: tuple[Any, ...]) -> None:
        sequence = self.sequences[event[1]]
        sequence.state, sequence.num_computed = RUNNING, event[3]
        if sequence.is_new:
            sequence.is_new, sequence.num_cached = False, event[3]
            self.totals.queries += sequence.num_prompt
            self.totals.hits += event[3]

    def _fork(self, event: tuple[Any, ...]) -> None:
        parent = self.sequences[event[1]]
        last = parent.num_prompt - 1
        self.sequences[event[2]] = SequenceState(
            event[2], RUNNING, parent.num_prompt, 0, parent.max_tokens, last, last, False, parent.id
        )

    def _commit(self, event: tuple[Any, ...]) -> None:
        sequence = self.sequences[event[1]]
        sequence.num_computed = event[2]
        sequence.num_output += event[3]
        self.totals.generated += event[3]

    def _preempt(self, event: tuple[Any, ...]) -> None:
        sequence = self.sequences[event[1]]
        sequence.leave(WAITING)
        sequence.num_preemptions += 1
        self.totals.preemptions += 1

    def _park(self, event: tuple[Any, ...]) -> None:
        self.sequences[event[1]].leave(PARKED)

    def _finish(self, event: tuple[Any, ...]) -> None:
        self.sequences.pop(event[1], None)  # a fork that was never born is not known
        self.totals.finished += 1

    def _table(self, event: tuple[Any, ...]) -> None:
        self.sequences[event[1]].blocks.extend(event[2:])

    def _trim(self, event: tuple[Any, ...]) -> None:
        del self.sequences[event[1]].blocks[event[2] :]

    def _refer(self, event: tuple[Any, ...]) -> None:
        self.refs[event[1]] = event[2]
        self.since[event[1]] = self.step

    def _allocate(self, event: tuple[Any, ...]) -> None:
        self.refs[event[1]] = 1
        self.since[event[1]] = self.step

    def _retire(self, event: tuple[Any, ...]) -> None:
        self.refs[event[1]] = 0
        self.since[event[1]] = self.step

    def _cache(self, event: tuple[Any, ...]) -> None:
        self.node[event[1]] = as_int31(event[2])

    def _evict(self, event: tuple[Any, ...]) -> None:
        self.node[event[1]] = 0

    def _pin(self, event: tuple[Any, ...]) -> None:
        self.pins[event[1]] = array("i", event[2:])

    def _unpin(self, event: tuple[Any, ...]) -> None:
        self.pins.pop(event[1], None)

    def _resize(self, event: tuple[Any, ...]) -> None:
        self._empty(event[1])
        self.pins.clear()
        for sequence in self.sequences.values():
            sequence.leave(WAITING)

    def _start_over(self, event: tuple[Any, ...]) -> None:
        self.ended = True


_CHANGES: dict[object, Callable[[State, tuple[Any, ...]], None]] = {
    events.STEP: State._step,
    events.QUEUE: State._queue,
    events.ADMIT: State._admit,
    events.COMMIT: State._commit,
    events.PREEMPT: State._preempt,
    events.FORK: State._fork,
    events.TABLE: State._table,
    events.TRIM: State._trim,
    events.PARK: State._park,
    events.FINISH: State._finish,
    events.ALLOCATE: State._allocate,
    events.SHARE: State._refer,
    events.RELEASE: State._refer,
    events.FREE: State._retire,
    events.IDLE: State._retire,
    events.CACHE: State._cache,
    events.EVICT: State._evict,
    events.PIN: State._pin,
    events.UNPIN: State._unpin,
    events.RESIZE: State._resize,
    events.START_OVER: State._start_over,
}


def as_int31(node: int) -> int:
    """A node's id as it travels: modulo 2^31, and never 0."""
    return node % 2**31 or 1


def to_bytes(words: array[int]) -> bytes:
    """32-bit words as little-endian bytes."""
    if sys.byteorder == "big":
        words = words[:]
        words.byteswap()
    return words.tobytes()
