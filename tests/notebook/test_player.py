"""What the browser makes of the messages equals the engine's truth, at every step and at every step gone back to.

Scheduler and pool are the real ones; state.js and player.js run in Chromium without a page around them.
"""

import base64
import itertools
import random
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from embedllm import events, wire
from embedllm.errors import InvalidRequest
from embedllm.replay import RUNNING, WAITING, State
from tests.notebook.recorded import Recording, run
from tests.rules.tree import ROOT

NUM_STEPS = 1_000
NAMES = "KVState, Player, OPS, REASONS, MAX_BLOCKS, HEADER_WORDS, crc32"
SETTING = """async (source) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  Object.assign(window, await import(url));
  window.bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  window.push = (text) => player.push(new DataView(bytes(text).buffer));
  window.start = (options) => { window.player = new Player(options); };
}"""


@pytest.fixture(scope="module")
def recordings() -> list[Recording]:
    """One with a step in flight, one with two."""
    found = [run(seed, NUM_STEPS) for seed in (6, 3)]
    happened = Counter(name for recording in found for name, count in recording.counts.items() if count)
    names = {name for name, _ in wire.OPS} - {events.START_OVER}
    assert names <= set(happened), "something never happened"
    return found


@pytest.fixture(scope="module")
def shared_page(browser: Any) -> Iterator[Any]:
    source = "\n".join((ROOT / "embedllm" / "view" / name).read_text() for name in ("state.js", "player.js"))
    page = browser.new_page()
    page.evaluate(SETTING, f"{source}\nexport {{ {NAMES} }};")
    yield page
    page.close()


@pytest.fixture
def page(shared_page: Any) -> Any:
    shared_page.evaluate("() => start()")
    return shared_page


def text(messages: list[bytes]) -> list[str]:
    return [base64.b64encode(message).decode() for message in messages]


def push(page: Any, messages: list[bytes]) -> list[Any]:
    """The answers, each with the newest digest after it."""
    return page.evaluate("(all) => all.map((one) => [push(one), player.newest?.digest()])", text(messages))


def feed(page: Any, recording: Recording) -> None:
    assert {answer for answer, _ in push(page, recording.messages)} == {"ok"}


def test_both_sides_have_the_same_codes(page: Any) -> None:
    ops = page.evaluate("() => OPS")
    assert [tuple(op) for op in ops] == [(name, -1 if arity is None else arity) for name, arity in wire.OPS]
    assert tuple(page.evaluate("() => REASONS")) == wire.REASONS
    assert page.evaluate("() => [MAX_BLOCKS, 4 * HEADER_WORDS]") == [wire.MAX_BLOCKS, wire.HEADER.size]
    assert page.evaluate("() => crc32(bytes('aGVsbG8='))") == zlib.crc32(b"hello")


@pytest.mark.parametrize("index", [0, 1])
def test_a_thousand_steps_are_the_engines_at_every_step(page: Any, recordings: list[Recording], index: int) -> None:
    recording = recordings[index]
    assert len(recording.at_step) > NUM_STEPS and len(set(recording.digests)) > NUM_STEPS / 2
    assert push(page, recording.messages) == [["ok", digest] for digest in recording.digests]
    assert page.evaluate("() => [player.first, player.last, player.live]") == [
        recording.steps[0],
        recording.steps[-1],
        True,
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_every_step_can_be_gone_back_to(page: Any, recordings: list[Recording], index: int) -> None:
    """In order, backwards and in any order; and messages that come meanwhile do not move what is shown."""
    recording = recordings[index]
    steps = sorted(recording.at_step)
    shuffled = random.Random(0).sample(steps, len(steps))
    feed(page, recording)
    look = "(step) => { player.seek(step); return [player.state.step, player.state.digest(), player.live]; }"
    for order in (steps, steps[::-1], shuffled):
        found = page.evaluate(f"(steps) => steps.map({look})", order)
        assert found == [[step, recording.at_step[step], False] for step in order]
    walk = "(n) => Array.from({length: n}, () => { player.%s(); return player.state.digest(); })"
    page.evaluate("(step) => player.seek(step)", steps[400])
    expected = [recording.at_step[step] for step in steps]
    assert page.evaluate(walk % "forward", 300) == expected[401:701]
    assert page.evaluate(walk % "back", 600) == expected[700 - 600 : 700][::-1]
    assert page.evaluate("() => { player.seek(-5); player.back(); return player.state.digest(); }") == expected[0]
    assert page.evaluate("() => { player.seek(1e9); player.forward(); return player.state.digest(); }") == expected[-1]
    assert page.evaluate("() => [player.live, player.goLive(), player.live]") == [False, None, True]


def test_what_is_shown_stays_while_messages_come(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    half = len(recording.messages) // 2
    step = recording.steps[half // 2]
    push(page, recording.messages[:half])
    page.evaluate("(step) => player.seek(step)", step)
    for message, digest in zip(recording.messages[half : half + 50], recording.digests[half:], strict=False):
        assert push(page, [message]) == [["ok", digest]]
        assert page.evaluate("() => [player.state.step, player.state.digest()]") == [step, recording.at_step[step]]
    assert page.evaluate("() => { player.forward(); return player.state.digest(); }") == recording.at_step[step + 1]


def test_a_gap_is_waited_out(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    states, state = [], State(0, 1)
    for message in wire.decode_all(b"".join(recording.messages)):
        state = message.state or state
        state.apply(message.events)
        states.append(state.copy())
    assert push(page, recording.messages[5:7]) == [["gap", None]] * 2, "events before any keyframe"
    push(page, recording.messages[:100])
    was = recording.digests[99]
    assert push(page, recording.messages[110:120]) == [["gap", was]] * 10
    assert push(page, [wire.encode_keyframe(states[50], 7 + 50)]) == [["gap", was]], "a keyframe of before the gap"
    healed = [wire.encode_keyframe(states[130], 7 + 130), *recording.messages[131:400]]
    assert push(page, healed) == [["ok", digest] for digest in recording.digests[130:400]]
    kept = {step: digest for step, digest in recording.at_step.items() if step < recording.steps[99]}
    kept |= {s: d for s, d in recording.at_step.items() if recording.steps[130] < s < recording.steps[399]}
    assert page.evaluate("(steps) => steps.map((s) => { player.seek(s); return player.state.digest(); })", [*kept]) == [
        *kept.values()
    ]
    between = (recording.steps[99] + recording.steps[130]) // 2
    assert page.evaluate("(step) => { player.seek(step); return player.state.step; }", between) == recording.steps[99]


def test_a_keyframe_without_a_gap_changes_nothing(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    state = wire_state(recording, 100)
    push(page, recording.messages[:101])
    between = [wire.encode_keyframe(state, 7 + 100), wire.encode_keyframe(state, 7 + 101)]
    later = [
        wire.encode_events(m.events, m.number + 1, 0) for m in wire.decode_all(b"".join(recording.messages[101:200]))
    ]
    answers = push(page, between + later)
    assert answers == [["ok", digest] for digest in [recording.digests[100]] * 2 + recording.digests[101:200]]
    steps = [step for step in recording.at_step if step < recording.steps[199]]
    assert page.evaluate("(steps) => steps.map((s) => { player.seek(s); return player.state.digest(); })", steps) == [
        recording.at_step[step] for step in steps
    ]


def wire_state(recording: Recording, last: int) -> State:
    state = State(0, 1)
    for message in wire.decode_all(b"".join(recording.messages[: last + 1])):
        state = message.state or state
        state.apply(message.events)
    return state


def test_loss_and_starting_over_wait_for_a_keyframe(page: Any) -> None:
    state = State(8, 4)
    keyframe = wire.encode_keyframe(state, 1)
    said = [(events.ALLOCATE, 1)]
    assert push(page, [keyframe, wire.encode_events(said, 2, 0, lost=True)])[1][0] == "gap"
    assert push(page, [wire.encode_events(said, 3, 0), wire.encode_keyframe(state, 4)]) == [
        ["gap", state.digest()],
        ["ok", state.digest()],
    ]
    over = wire.encode_events([(events.START_OVER,)], 5, 0)
    assert [a for a, _ in push(page, [over, wire.encode_events(said, 6, 0), wire.encode_keyframe(state, 7)])] == [
        "ok",
        "gap",
        "ok",
    ]
    assert [a for a, _ in push(page, [wire.encode_events(said, 8, 0)])] == ["ok"]


def test_numbers_begin_again_after_the_last(page: Any) -> None:
    state = State(8, 4)
    messages = [wire.encode_keyframe(state, 2**32 - 2)]
    messages += [wire.encode_events([(events.ALLOCATE, i)], 2**32 - 1 + i, 0) for i in range(4)]
    assert {answer for answer, _ in push(page, messages)} == {"ok"}


def with_check(words: list[int]) -> bytes:
    """A message of these words, header first, with the check that is right for them."""
    words[7] &= 0xFF
    words[7] |= zlib.crc32(struct.pack(f"<{len(words)}I", *words)) & 0xFFFFFF00
    return struct.pack(f"<{len(words)}I", *words)


def test_newer_and_damaged_messages_change_nothing(page: Any, recordings: list[Recording]) -> None:
    recording, r = recordings[1], random.Random(1)
    push(page, recording.messages[:20])
    following = recording.messages[20]
    words = list(struct.unpack(f"<{len(following) // 4}I", following))
    assert push(page, [with_check([*words[:1], 2, *words[2:]])]) == [["newer", recording.digests[19]]]
    damaged = [following[:n] for n in range(len(following))]
    for message in (following, recording.messages[0]):
        for _ in range(400):
            wrong = bytearray(message)
            for _ in range(r.randint(1, 3)):
                wrong[r.randrange(len(wrong))] ^= 1 << r.randrange(8)
            damaged.append(bytes(wrong))
    damaged = [message for message in damaged if message not in (following, recording.messages[0])]
    answers = push(page, damaged + [r.randbytes(r.randrange(90)) for _ in range(400)])
    assert {answer for answer, _ in answers} <= {"bad", "newer"}
    assert {digest for _, digest in answers} == {recording.digests[19]}
    assert push(page, [following]) == [["ok", recording.digests[20]]]


def test_both_sides_take_and_refuse_the_same(page: Any, recordings: list[Recording]) -> None:
    """Messages with a right check and wrong content, as nobody but an attacker sends: Python and the browser agree."""
    r, cases, expected = random.Random(2), [], []
    for _ in range(2_000):
        state = State(16, 4)
        state.apply([(events.QUEUE, 9, 5, 7), (events.QUEUE, 3, 5, 7), (events.ALLOCATE, 4), (events.TABLE, 9, 4)])
        keyframe, words = wire.encode_keyframe(state, 1), []
        for _ in range(r.randint(1, 4)):
            code, (_, arity) = r.choice(list(enumerate(wire.OPS, 1)))
            number = r.randint(0, 4) if arity is None else arity + r.choice([0] * 15 + [1])
            words += [code | number << 8, *(r.choice([0, 1, 3, 3, 4, 9, 9, 9, 15, 16, -1]) for _ in range(number))]
        if r.random() < 0.1:
            words.append(r.choice([0, 24, 1 | 5 << 8, 2**31 - 1]))
        kind = 1
        if r.random() < 0.3:  # a keyframe with one wrong word
            kind, words = 0, list(struct.unpack(f"<{len(keyframe) // 4 - 8}i", keyframe[32:]))
            words[r.randrange(len(words))] = r.choice([-1, 0, 1, 2, 3, 4, 16, 17, 2**30])
        body = [word % 2**32 for word in words]
        message = with_check([wire.MAGIC, 1, kind, 3 - kind, len(body), 0, 0, 0, *body])
        try:
            read = list(wire.decode_all(keyframe + message))[1]
            state = read.state or state
            state.apply(read.events)
            expected.append(state.digest())
        except InvalidRequest:
            expected.append("bad")
        cases.append(text([keyframe, message]))
    found = page.evaluate(
        "(cases) => cases.map((both) => { start(); const last = both.map(push).at(-1);"
        " return last === 'ok' ? player.newest.digest() : last; })",
        cases,
    )
    assert 300 < expected.count("bad") < 1_700
    assert found == expected


def test_a_view_of_a_larger_buffer_is_read(page: Any, recordings: list[Recording]) -> None:
    """Jupyter hands out a DataView at any offset, of a buffer that is used for other things too."""
    found = page.evaluate(
        """([text, digest]) => [0, 1, 2, 3, 7].map((offset) => {
          const one = bytes(text), all = new Uint8Array(offset + one.length + 5).fill(7);
          all.set(one, offset);
          start();
          const answer = player.push(new DataView(all.buffer, offset, one.length));
          all.fill(9);
          return answer === "ok" && player.state.digest() === digest;
        }).concat(player.push(bytes(text).buffer))""",
        [text(recordings[0].messages[:1])[0], recordings[0].digests[0]],
    )
    assert found == [True] * 5 + ["ok"]


def test_memory_is_bounded_and_what_is_kept_is_exact(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[1]
    most = 260_000
    assert sum(map(len, recording.messages)) > 2 * most
    page.evaluate("(most) => { start({ maxBytes: most, partBytes: 8192 }); }", most)
    largest = page.evaluate(
        "(all) => all.reduce((largest, one) => { push(one); return Math.max(largest, player.bytes); }, 0)",
        text(recording.messages),
    )
    assert most / 2 < largest <= most
    steps = page.evaluate("() => Array.from(player.series().step)")
    assert steps[0] == page.evaluate("() => player.first") and steps[-1] == recording.steps[-1]
    assert steps == sorted(set(steps)) and 300 < len(steps) < len(recording.at_step)
    assert page.evaluate("(steps) => steps.map((s) => { player.seek(s); return player.state.digest(); })", steps) == [
        recording.at_step[step] for step in steps
    ]
    assert steps[-1] - steps[-300] == 299, "of the newest part every step is kept"
    assert any(b - a > 1 for a, b in itertools.pairwise(steps)), "nothing was thinned out"


def test_what_is_old_thins_out(page: Any, recordings: list[Recording]) -> None:
    """A step of these recordings takes a millisecond."""
    recording = recordings[1]
    page.evaluate("() => { start({ maxSeconds: 0.2, partBytes: 8192 }); }")
    feed(page, recording)
    steps = page.evaluate("() => Array.from(player.series().step)")
    last = recording.steps[-1]
    assert set(range(last - 150, last)) <= set(steps)
    assert len([step for step in steps if step < last - 400]) < 200
    assert page.evaluate("(steps) => steps.map((s) => { player.seek(s); return player.state.digest(); })", steps) == [
        recording.at_step[step] for step in steps
    ]


def test_the_series_counts_what_was_so(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    feed(page, recording)
    series = page.evaluate(
        "() => Object.fromEntries(Object.entries(player.series()).map(([name, column]) => [name, Array.from(column)]))"
    )
    expected: dict[int, dict[str, int]] = {}
    state, counts = State(0, 1), {"tokens": 0, "preempts": 0, "evicts": 0, "copies": 0}
    names = {events.PREEMPT: "preempts", events.EVICT: "evicts", events.COPY: "copies"}

    def row() -> dict[str, int]:
        used = sum(1 for refs in state.refs if refs)
        idle = sum(1 for refs, node in zip(state.refs, state.node, strict=True) if node and not refs)
        stages = [sequence.state for sequence in state.sequences.values()]
        running, waiting = stages.count(RUNNING), stages.count(WAITING)
        shared = sum(1 for refs in state.refs if refs > 1)
        blocks = {"free": state.num_blocks - used - idle, "idle": idle, "used": used, "shared": shared}
        return {"step": state.step, "time": state.time, "running": running, "waiting": waiting, **blocks, **counts}

    for message in wire.decode_all(b"".join(recording.messages)):
        state = message.state or state
        for event in message.events:
            if event[0] == events.STEP:
                expected[state.step] = row()
                counts = {"tokens": event[3], "preempts": 0, "evicts": 0, "copies": 0}
            elif event[0] in names:
                counts[names[event[0]]] += 1
            state.apply([event])
    expected[state.step] = row()
    assert [dict(zip(series, values, strict=True)) for values in zip(*series.values(), strict=True)] == [
        *expected.values()
    ]
    assert sum(series["preempts"]) and sum(series["copies"]) and sum(series["shared"])


def test_events_come_back_with_their_steps(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    feed(page, recording)
    expected, step = [], recording.steps[0]
    for message in wire.decode_all(b"".join(recording.messages)):
        for event in message.events:
            step = event[1] if event[0] == events.STEP else step
            expected.append([step, *event])
    codes = {name: code for code, (name, _) in enumerate(wire.OPS, 1)}
    for first, last in [(0, 10**9), (300, 420), (777, 777)]:
        found = page.evaluate("([a, b]) => player.events(a, b)", [first, last])
        assert [[e["step"], e["name"], *e["args"]] for e in found] == [e for e in expected if first <= e[0] <= last]
        assert all(codes[e["name"]] == e["op"] for e in found)


def test_a_state_answers_for_its_blocks(page: Any, recordings: list[Recording]) -> None:
    recording = recordings[0]
    feed(page, recording)
    answers = """([step]) => {
      player.seek(step);
      const { state } = player, fills = {}, parents = [];
      for (const s of state.seqs.values()) {
        fills[s.id] = s.blocks.map((_, i) => state.fill(s.id, i));
        parents.push(s.parent);
      }
      return { owners: state.owners(), fills, parents, waste: state.waste() };
    }"""
    size = 4
    for last in range(50, len(recording.messages) - 1, 171):
        state = wire_state(recording, last)
        step = recording.steps[last]
        if recording.at_step[step] != state.digest():
            continue
        found = page.evaluate(answers, [step])
        owners: list[list[int]] = [[] for _ in range(state.num_blocks)]
        empty = reserved = computed = 0
        for s in state.sequences.values():
            for block in s.blocks:
                owners[block].append(s.id)
            fills = [max(0, min(size, s.num_computed - i * size)) for i in range(len(s.blocks))]
            assert found["fills"][str(s.id)] == fills
            if s.state == RUNNING:
                empty += len(s.blocks) * size - sum(fills)
                reserved, computed = reserved + s.num_prompt + s.max_tokens, computed + s.num_computed
        assert [sorted(ids) for ids in found["owners"]] == [sorted(ids) for ids in owners]
        used = sum(1 for refs in state.refs if refs)
        assert found["waste"]["paged"] == pytest.approx(empty / (used * size))
        assert found["waste"]["contiguous"]["max"] == pytest.approx(1 - computed / reserved)
        assert sorted(found["parents"]) == sorted(s.parent for s in state.sequences.values())


def test_a_clone_and_an_event_applied_alone(page: Any) -> None:
    found = page.evaluate(
        """() => {
          const state = new KVState(4, 16), other = state.clone(), before = state.digest();
          other.applyEvent(2, [1, 5, 7]);
          other.applyEvent(12, [3]);
          other.applyEvent(8, [1, 3]);
          const third = other.clone();
          third.applyEvent(9, [1, 0]);
          return [state.digest() === before, other.digest(), other.seqs.get(1).blocks, third.seqs.get(1).blocks];
        }"""
    )
    state = State(4, 16)
    state.apply([(events.QUEUE, 1, 5, 7), (events.ALLOCATE, 3), (events.TABLE, 1, 3)])
    assert found == [True, state.digest(), [3], []]


def test_a_large_pool_is_followed_quickly(page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """65,536 blocks, all cached: a keyframe, events and the way back stay far below what a person notices."""
    state, r = State(65_536, 16), random.Random(3)
    state.apply((events.CACHE, i, i + 1) for i in range(65_536))
    messages = [wire.encode_keyframe(state, 1)]
    for step in range(1, 600):
        happened: list[tuple] = [(events.STEP, step, 1, 1, step * 10_000)]
        happened += [(events.ALLOCATE, r.randrange(65_536)) for _ in range(40)]
        state.apply(happened)
        messages.append(wire.encode_events(happened, step + 1, state.time))
    keyframe, events_, back, digest = page.evaluate(
        """(all) => {
          const [keyframe, ...others] = all.map((one) => bytes(one).buffer), times = [performance.now()];
          player.push(keyframe); times.push(performance.now());
          others.forEach((one) => player.push(one)); times.push(performance.now());
          player.seek(1); times.push(performance.now());
          return [...times.slice(1).map((time, i) => time - times[i]), player.newest.digest()];
        }""",
        text(messages),
    )
    with capsys.disabled():
        print(f"\n65,536 blocks: keyframe {keyframe:.1f} ms, 599 messages {events_:.0f} ms, back {back:.1f} ms")
    assert digest == state.digest()
    assert keyframe < 100 and events_ / 599 < 1 and back < 100
