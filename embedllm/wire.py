"""Events and states as bytes, for a browser and for files.

Owns the format, version 1: little-endian 32-bit words, a header of 8 and a body, which view/player.js reads too. Knows
no widget and no file. Invariant: what is decoded is what was encoded; anything else is refused as a whole.

Header: magic, version, kind, number, words of the body, time (2 words, microseconds), flags. Bit 0 of the flags: events
were lost before this message; bits 8 to 31: those of the crc32 of the message without them. An event is a word
`op | num_arguments << 8` and its arguments; `op` counts OPS from 1.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

from embedllm import events
from embedllm.errors import InvalidRequest
from embedllm.events import Event
from embedllm.replay import SequenceState, State, Totals, as_int31, to_bytes

MAGIC, VERSION = 0x31564B45, 1  # "EKV1"
KEYFRAME, EVENTS = 0, 1
HEADER = struct.Struct("<IIIIIQI")  # 8 words
LOST = 1
MAX_BLOCKS = 2**24  # believed of a record
# Names in the order of their codes, and how many arguments each has on the wire; None: one and any number of blocks.
OPS: tuple[tuple[str, int | None], ...] = (
    (events.STEP, 5),
    (events.QUEUE, 3),
    (events.ADMIT, 3),
    (events.SCHEDULE, 3),
    (events.COMMIT, 3),
    (events.PREEMPT, 1),
    (events.FORK, 2),
    (events.TABLE, None),
    (events.TRIM, 2),
    (events.PARK, 1),
    (events.FINISH, 2),
    (events.ALLOCATE, 1),
    (events.SHARE, 2),
    (events.RELEASE, 2),
    (events.FREE, 1),
    (events.CACHE, 2),
    (events.EVICT, 2),
    (events.IDLE, 1),
    (events.PIN, None),
    (events.UNPIN, 1),
    (events.COPY, 2),
    (events.RESIZE, 1),
    (events.START_OVER, 0),
)
REASONS = ("stop", "length", "tool_calls", "cancelled", "error")
_HEADS: dict[object, int] = {name: code | (num or 0) << 8 for code, (name, num) in enumerate(OPS, 1)}
_OF_BLOCKS = (events.ALLOCATE, events.SHARE, events.RELEASE, events.FREE, events.CACHE, events.EVICT, events.IDLE)
_BLOCKS_AT: dict[object, slice] = {name: slice(1) for name in _OF_BLOCKS}  # which arguments are blocks
_BLOCKS_AT |= {events.TABLE: slice(1, None), events.PIN: slice(1, None), events.COPY: slice(None)}
_OF_SEQUENCES = {events.ADMIT, events.SCHEDULE, events.COMMIT, events.PREEMPT, events.FORK}
_OF_SEQUENCES |= {events.TABLE, events.TRIM, events.PARK}


@dataclass(frozen=True, slots=True)
class Message:
    """One message: a keyframe has a `state`, the others have `events`. `time`: microseconds of the engine's clock."""

    number: int
    time: int
    lost: bool
    state: State | None
    events: list[Event]


def is_keyframe(message: bytes) -> bool:
    """Whether a message of ours is a keyframe."""
    return bool(HEADER.unpack_from(message)[2] == KEYFRAME)


# ---- to bytes -------------------------------------------------------------------------------------------------


def encode_events(happened: Iterable[Event], number: int, time: int, lost: bool = False) -> bytes:
    """A message of events. `number` is one more than that of the message before."""
    words: list[Any] = []
    heads = _HEADS
    for event in happened:
        name = event[0]
        words.append(heads[name])
        words += event[1:]
        if name == events.STEP:
            words[-1:] = _halves(event[4])
        elif name == events.FINISH:
            words[-1] = REASONS.index(event[2])
        elif name == events.CACHE or name == events.EVICT:
            words[-1] = as_int31(event[2])  # type: ignore[arg-type]
        elif name == events.TABLE or name == events.PIN:
            words[-len(event)] |= (len(event) - 1) << 8
    return _message(EVENTS, number, time, LOST if lost else 0, array("i", words))


def encode_keyframe(state: State, number: int) -> bytes:
    """A message that stands for everything before it."""
    words = array("i", [state.step, state.block_size, state.num_blocks, len(state.sequences), len(state.pins)])
    words.extend(total % 2**31 for total in astuple(state.totals))
    for column in (state.refs, state.node, state.since):
        words += column
    for s in state.sequences.values():
        counts = (s.id, s.state, s.num_prompt, s.num_output, s.max_tokens, s.num_computed)
        words.extend((*counts, -1 if s.is_new else s.num_cached, s.parent, s.num_preemptions, len(s.blocks)))
        words += s.blocks
    for pin, blocks in state.pins.items():
        words.extend((pin, len(blocks)))
        words += blocks
    return _message(KEYFRAME, number, state.time, 0, words)


def _message(kind: int, number: int, time: int, flags: int, body: array[int]) -> bytes:
    content = to_bytes(body)
    header = HEADER.pack(MAGIC, VERSION, kind, number % 2**32, len(body), time, flags)
    return header[:-4] + struct.pack("<I", flags | _check(header, content)) + content


def _check(header: bytes, content: bytes | memoryview) -> int:
    return zlib.crc32(content, zlib.crc32(header)) & 0xFFFFFF00


def _halves(time: Any) -> tuple[int, int]:
    low = time & 0xFFFFFFFF
    return low - ((low & 0x80000000) << 1), time >> 32


# ---- from bytes -----------------------------------------------------------------------------------------------


def decode_all(data: bytes) -> Iterator[Message]:
    """The messages that `data` is made of. Events are checked against the state that they follow, if nothing is lost.

    Raises InvalidRequest for anything that `encode_events` and `encode_keyframe` do not make.
    """
    start = 0
    num_blocks = MAX_BLOCKS
    known: set[Any] | None = None  # sequences, where none can have been missed
    while start < len(data):
        if len(data) - start < HEADER.size:
            raise InvalidRequest(f"{len(data) - start} bytes are no header of a message, which has {HEADER.size}")
        magic, version, kind, number, num_words, time, flags = HEADER.unpack_from(data, start)
        content = memoryview(data)[start + HEADER.size : start + HEADER.size + 4 * num_words]
        if magic != MAGIC:
            raise InvalidRequest("this is no record of an engine")
        if version > VERSION:
            raise InvalidRequest(f"this record is in format {version}: it was made by a newer embedllm")
        if len(content) < 4 * num_words:
            raise InvalidRequest(f"a message of {num_words} words is cut off after {len(content)} bytes")
        header = data[start : start + HEADER.size - 4] + struct.pack("<I", flags & 0xFF)
        if flags & 0xFFFFFF00 != _check(header, content) or kind not in (KEYFRAME, EVENTS) or version != VERSION:
            raise InvalidRequest("this record is damaged")
        words = array("i", content.tobytes())
        if sys.byteorder == "big":
            words.byteswap()
        try:
            if kind == KEYFRAME:
                state = _state(words, time)
                num_blocks, known = state.num_blocks, set(state.sequences)
                yield Message(number, time, False, state, [])
            else:
                happened = list(_events(words))
                if flags & LOST:
                    num_blocks, known = MAX_BLOCKS, None
                num_blocks = _follow(happened, num_blocks, known)
                yield Message(number, time, bool(flags & LOST), None, happened)
        except (IndexError, ValueError, OverflowError, MemoryError) as error:
            raise InvalidRequest("this record is damaged") from error
        start += HEADER.size + 4 * num_words


def _events(words: array[int]) -> Iterator[Event]:
    i = 0
    while i < len(words):
        head = words[i]
        name, arity = OPS[(head & 0xFF) - 1] if head & 0xFF else OPS[len(OPS)]
        args = words[i + 1 : i + 1 + (head >> 8)]
        if head < 0 or len(args) != head >> 8 or (len(args) != arity if arity is not None else not args):
            raise ValueError
        i += 1 + len(args)
        if name == events.STEP:
            yield (name, *args[:3], args[3] & 0xFFFFFFFF | args[4] << 32)
        elif name == events.FINISH:
            if args[1] < 0:
                raise ValueError
            yield (name, args[0], REASONS[args[1]])
        else:
            yield (name, *args)


def _follow(happened: list[Event], num_blocks: int, known: set[Any] | None) -> int:
    """Check that these events can follow; brings `known` sequences up to date and returns the number of blocks."""
    for event in happened:
        name = event[0]
        args: tuple[Any, ...] = event[1:]
        if any(value < 0 for value in args if isinstance(value, int)):
            raise ValueError
        if name == events.RESIZE:
            num_blocks = min(MAX_BLOCKS, *args)
            if num_blocks != args[0]:
                raise ValueError
        blocks = args[_BLOCKS_AT[name]] if name in _BLOCKS_AT else ()
        if blocks and max(blocks) >= num_blocks:
            raise ValueError
        if (name == events.CACHE or name == events.EVICT) and not args[1]:
            raise ValueError
        if known is None:
            continue
        if name in _OF_SEQUENCES and args[0] not in known:
            raise ValueError
        if name == events.QUEUE or name == events.FORK:
            known.add(args[name == events.FORK])
        elif name == events.FINISH:
            known.discard(args[0])
    return num_blocks


def _state(words: array[int], time: int) -> State:
    """The state of a keyframe. Raises ValueError or IndexError where its words do not add up."""
    step, block_size, num_blocks, num_sequences, num_pins = words[:5]
    if min(step, num_blocks, num_sequences, num_pins) < 0 or block_size < 1 or len(words) < 11 + 3 * num_blocks:
        raise ValueError
    state = State(0, block_size)
    state.step, state.time, state.totals = step, time, Totals(*words[5:11])
    columns = [words[11 + i * num_blocks : 11 + (i + 1) * num_blocks] for i in range(3)]
    state.refs, state.node, state.since = columns
    i = 11 + 3 * num_blocks
    for _ in range(num_sequences):
        id_, stage, num_prompt, num_output, max_tokens, num_computed, num_cached, parent, num_preempted, n = words[
            i : i + 10
        ]
        blocks = words[i + 10 : i + 10 + n]
        if not 0 <= stage <= 2 or n < 0 or len(blocks) != n or min(id_, num_computed) < 0 or id_ in state.sequences:
            raise ValueError
        state.sequences[id_] = SequenceState(
            id_,
            stage,
            num_prompt,
            num_output,
            max_tokens,
            num_computed,
            max(0, num_cached),
            num_cached < 0,
            parent,
            num_preempted,
            blocks,
        )
        i += 10 + n
    for _ in range(num_pins):
        pin, n = words[i : i + 2]
        state.pins[pin] = words[i + 2 : i + 2 + n]
        if n < 0 or len(state.pins[pin]) != n:
            raise ValueError
        i += 2 + n
    tables = (block for held in (*(s.blocks for s in state.sequences.values()), *state.pins.values()) for block in held)
    if i != len(words) or any(not 0 <= block < num_blocks for block in tables):
        raise ValueError
    return state
