"""Messages: what goes in comes out, and what did not come from here is refused as a whole."""

import random
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedllm import events, wire
from embedllm.errors import InvalidRequest
from embedllm.replay import State
from tests.notebook.recorded import run

SAMPLES = [
    (events.STEP, 12, 3, 40, 2**40 + 2**31 + 5),
    (events.QUEUE, 0, 5, 7),
    (events.QUEUE, 9, 5, 7),
    (events.ADMIT, 9, 2, 4),
    (events.SCHEDULE, 9, 0, 5),
    (events.COMMIT, 9, 5, 1),
    (events.FORK, 9, 10),
    (events.TABLE, 9, 3, 1, 2),
    (events.TABLE, 9),
    (events.TRIM, 9, 1),
    (events.PREEMPT, 9),
    (events.PARK, 9),
    (events.ALLOCATE, 3),
    (events.SHARE, 3, 2),
    (events.RELEASE, 3, 1),
    (events.FREE, 3),
    (events.CACHE, 3, 77),
    (events.EVICT, 3, 77),
    (events.IDLE, 3),
    (events.PIN, 1, 3, 4),
    (events.UNPIN, 1),
    (events.COPY, 1, 2),
    (events.RESIZE, 9),
    (events.START_OVER,),
    *((events.FINISH, i, reason) for i, reason in enumerate(wire.REASONS)),
]


def state_of(*happened: tuple) -> State:
    state = State(16, 4)
    state.apply(happened)
    return state


def read(*messages: bytes) -> list[wire.Message]:
    return list(wire.decode_all(b"".join(messages)))


def fixed(message: bytes, **fields: int) -> bytes:
    """The message with other fields, words or flags, and the check that then is right."""
    words = list(struct.unpack(f"<{len(message) // 4}I", message))
    names = ["magic", "version", "kind", "number", "num_words", "low", "high", "flags"]
    for name, value in fields.items():
        words[names.index(name) if name in names else 8 + int(name[1:])] = value % 2**32
    words[7] &= 0xFF
    bare = struct.pack(f"<{len(words)}I", *words)
    words[7] |= zlib.crc32(bare) & 0xFFFFFF00
    return struct.pack(f"<{len(words)}I", *words)


def test_every_event_comes_back() -> None:
    names = {value for name, value in vars(events).items() if name.isupper() and isinstance(value, str)}
    assert {event[0] for event in SAMPLES} == names == {name for name, _ in wire.OPS}
    keyframe, message = read(wire.encode_keyframe(state_of(), 41), wire.encode_events(SAMPLES, 42, 2**41 + 3))
    assert message.events == SAMPLES
    assert (keyframe.number, message.number, message.time, message.lost) == (41, 42, 2**41 + 3, False)
    assert read(wire.encode_events(SAMPLES, 2**32, 0, lost=True))[0].lost


def test_a_keyframe_comes_back_whole() -> None:
    state = state_of(*SAMPLES[:-6])
    state.totals.generated = 2**31 + 7
    back = read(wire.encode_keyframe(state, 1))[0].state
    assert back is not None and back.digest() == state.digest()
    assert (back.step, back.time, back.since, back.pins) == (state.step, state.time, state.since, state.pins)
    assert back.sequences == state.sequences
    assert back.totals.generated == 7 and back.totals.preemptions == state.totals.preemptions


def test_a_life_decodes_to_the_truth_at_every_step() -> None:
    recording = run(seed=5, num_steps=200)
    state = State(0, 1)
    for message, digest, step in zip(read(*recording.messages), recording.digests, recording.steps, strict=True):
        state = message.state or state
        state.apply(message.events)
        assert (state.digest(), state.step) == (digest, step)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    if noise:
        with pytest.raises(InvalidRequest):
            read(noise)


@given(st.randoms(use_true_random=False), st.integers(0, 3))
def test_a_damaged_record_is_refused(r: random.Random, kind: int) -> None:
    """Whatever byte is changed, wherever it is cut: an error, and never another state."""
    data = b"".join(MESSAGES)
    if kind == 0:
        damaged = data[: r.randrange(1, len(data))]
        if len(damaged) in ENDS:
            return
    else:
        damaged = bytearray(data)
        for _ in range(kind):
            damaged[r.randrange(len(data))] ^= 1 << r.randrange(8)
        if damaged == data:
            return
    with pytest.raises(InvalidRequest):
        read(bytes(damaged))


MESSAGES = run(seed=2, num_steps=4).messages
ENDS = {sum(map(len, MESSAGES[:i])) for i in range(len(MESSAGES) + 1)}


@st.composite
def plausible(draw: st.DrawFn) -> list[int]:
    """Words of an event with as many arguments as it should have, or of none."""
    code, (_, arity) = draw(st.sampled_from(list(enumerate(wire.OPS, 1))))
    arguments = draw(
        st.lists(st.sampled_from([0, 1, 3, 9, 9, 15, 16, -1, 2**24]), min_size=arity or 0, max_size=arity or 4)
    )
    return [code | len(arguments) << 8, *arguments]


@given(st.lists(plausible(), max_size=12))
def test_events_from_anybody_are_refused_or_can_be_followed(happened: list[list[int]]) -> None:
    words = [word for event in happened for word in event]
    header = wire.HEADER.pack(wire.MAGIC, 1, wire.EVENTS, 2, len(words), 0, 0)
    message = fixed(header + struct.pack(f"<{len(words)}i", *words))
    state = state_of(*SAMPLES[:3])
    try:
        messages = read(wire.encode_keyframe(state, 1), message)
    except InvalidRequest:
        return
    assert wire.encode_events(messages[1].events, 2, 0) == message
    state.apply(messages[1].events)
    back = read(wire.encode_keyframe(state, 1))[0].state
    assert back is not None and back.digest() == state.digest()


@pytest.mark.parametrize(
    "event",
    [
        (events.ALLOCATE, 16),
        (events.FREE, -1),
        (events.TABLE, 9, 3, 16),
        (events.TABLE, 8, 3),
        (events.COMMIT, 8, 1, 1),
        (events.COMMIT, 9, -1, 1),
        (events.COPY, 3, 99),
        (events.PIN, 3, 99),
        (events.RESIZE, wire.MAX_BLOCKS + 1),
    ],
)
def test_events_that_cannot_follow_are_refused(event: tuple) -> None:
    with pytest.raises(InvalidRequest):
        read(wire.encode_keyframe(state_of((events.QUEUE, 9, 5, 7)), 1), wire.encode_events([event], 2, 0))


def test_a_resize_moves_the_bounds() -> None:
    keyframe = wire.encode_keyframe(state_of(), 1)
    read(keyframe, wire.encode_events([(events.RESIZE, 20), (events.ALLOCATE, 19)], 2, 0))
    with pytest.raises(InvalidRequest):
        read(keyframe, wire.encode_events([(events.RESIZE, 4), (events.ALLOCATE, 4)], 2, 0))


def test_refusals_say_why() -> None:
    message = wire.encode_keyframe(state_of((events.QUEUE, 9, 5, 7)), 1)
    with pytest.raises(InvalidRequest, match="newer embedllm"):
        read(fixed(message, version=2))
    with pytest.raises(InvalidRequest, match="no record"):
        read(fixed(message, magic=7))
    with pytest.raises(InvalidRequest, match="cut off"):
        read(message[:-4])
    for wrong in [{"kind": 2}, {"w2": -1}, {"w2": 15}, {"w1": 0}, {"w3": 2}, {"w4": 1}, {"version": 0}]:
        with pytest.raises(InvalidRequest, match="damaged"):
            read(fixed(message, **wrong))
    assert read(fixed(message))[0].state is not None
