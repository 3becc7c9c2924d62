"""A trace can be replayed to each of its steps, comes back from its files as it was, and holds no text."""

import json
from pathlib import Path

import pytest

import embedllm
from embedllm import events
from embedllm.errors import InvalidRequest
from embedllm.trace import PER_MESSAGE, Trace, open_trace
from tests.notebook.recorded import LIVELY, Recording, WatchedWorld, act


def recorded(num_steps: int = 120, capacity: int = 100_000, seed: int = 4) -> tuple[Trace, Recording]:
    """A trace of a lively world, attached in the middle of it, and the truth at each step."""
    import random

    r = random.Random(seed)
    world = WatchedWorld(LIVELY, eos_every=40)
    for _ in range(15):
        act(world, r, resizing=True)
    world.take()
    trace, truth = Trace(LIVELY.num_blocks, LIVELY.block_size, capacity), Recording()
    trace.beginning = world.truth()
    follower = world.truth()
    while world.step_number < 15 + num_steps:
        act(world, r, resizing=True)
        for event in world.take():
            trace.ring.append(event)
            if event[0] == events.STEP:
                truth.at_step[follower.step] = follower.digest()
            follower.apply([event])
        assert follower.digest() == world.truth().digest()
    truth.at_step[follower.step] = follower.digest()
    return trace, truth


def test_a_trace_is_replayed_step_by_step() -> None:
    trace, truth = recorded()
    assert {state.step: state.digest() for state in trace.states()} == truth.at_step
    for step, digest in truth.at_step.items():
        assert trace.at(step).digest() == digest
    assert trace.at(10**9).digest() == truth.at_step[max(truth.at_step)]
    with pytest.raises(InvalidRequest, match="begins after step"):
        trace.at(min(truth.at_step) - 1)


@pytest.mark.parametrize("name", ["run.ekv", "run.jsonl"])
def test_a_file_brings_back_the_same_trace(tmp_path: Path, name: str) -> None:
    trace, truth = recorded()
    trace.save(tmp_path / name)
    back = embedllm.open_trace(tmp_path / name)
    assert list(back) == list(trace) and (back.num_blocks, back.block_size) == (trace.num_blocks, trace.block_size)
    assert {state.step: state.digest() for state in back.states()} == truth.at_step
    back.save(tmp_path / f"again-{name}")
    assert list(open_trace(tmp_path / f"again-{name}")) == list(trace)


@pytest.mark.parametrize("name", ["run.ekv", "run.jsonl"])
def test_what_is_lost_is_said(tmp_path: Path, name: str) -> None:
    trace, _ = recorded(capacity=300)
    assert trace.num_lost > 0
    trace.save(tmp_path / name)
    back = open_trace(tmp_path / name)
    assert list(back) == list(trace) and back.num_lost == trace.num_lost
    for one in (trace, back):
        with pytest.raises(InvalidRequest, match="events are lost"):
            next(one.states())
        with pytest.raises(InvalidRequest, match="events are lost"):
            one.to_perfetto(tmp_path / "no.json")


def test_a_long_trace_goes_into_several_messages(tmp_path: Path) -> None:
    trace = Trace(8, 4, 10 * PER_MESSAGE)
    for i in range(2 * PER_MESSAGE + 5):
        trace.ring.append((events.ALLOCATE, i % 8))
    trace.save(tmp_path / "long.ekv")
    assert list(open_trace(tmp_path / "long.ekv")) == list(trace)
    with pytest.raises(InvalidRequest, match="not known what this trace began with"):
        trace.at(0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    trace, _ = recorded(num_steps=20)
    trace.save(tmp_path / "run.ekv")
    whole = (tmp_path / "run.ekv").read_bytes()
    version = whole[:4] + b"\x02\0\0\0" + whole[8:]
    lines = [
        "[]",
        "{}",
        '{"num_blocks": 1}',
        "not json",
        "",
        '{"num_blocks":4,"block_size":4,"num_lost":0,"beginning":""}',
    ]
    lost = lines[-1].replace('"beginning":""', '"beginning":"eJwDAAAAAAE="')
    texts = [
        *lines,
        lost + '\n["no_such_event", 1]',
        lost + '\n["allocate", "x"]',
        lost + '\n["allocate", -1]',
        "[" * 10_000,
    ]
    for data in [whole[:20], whole[:-7], version, b"EKVF", b"\xff\xfe", *(text.encode() for text in texts)]:
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(InvalidRequest, match="is no trace that can be read"):
            open_trace(tmp_path / "bad")
    damaged = bytearray(whole)
    for at in range(28, len(whole), 41):
        damaged[at] ^= 4
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(InvalidRequest):
            open_trace(tmp_path / "bad")
        damaged[at] ^= 4
    with pytest.raises(FileNotFoundError):
        open_trace(tmp_path / "nothing")


def test_perfetto_gets_a_track_per_sequence_and_counters(tmp_path: Path) -> None:
    trace, _ = recorded()
    trace.to_perfetto(tmp_path / "run.json")
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    slices = [row for row in rows if row["ph"] == "X"]
    scheduled = [event for event in trace if event[0] == events.SCHEDULE]
    assert [(row["tid"], row["args"]["start"], row["args"]["tokens"]) for row in slices] == [e[1:] for e in scheduled]
    named = {row["tid"] for row in rows if row["ph"] == "M" and row["name"] == "thread_name"}
    assert {row["tid"] for row in slices} <= named
    counts = trace.counts()
    for name in (events.PREEMPT, events.EVICT, events.COPY, events.FINISH):
        assert sum(row["ph"] == "i" and row["name"] == name for row in rows) == counts[name] > 0
    blocks = [row["args"] for row in rows if row["ph"] == "C" and row["name"] == "KV blocks"]
    assert [sum(row.values()) for row in blocks] == [state.num_blocks for state in trace.states()]
    assert blocks[-1]["used"] == sum(1 for refs in trace.at(10**9).refs if refs)
    assert all(row["dur"] >= 0 for row in slices)
    starts = sorted({row["ts"] for row in slices})
    assert {row["ts"] + row["dur"] for row in slices} <= {*starts, starts[-1]}


def test_an_engines_trace_is_exact_and_holds_no_text(tmp_path: Path) -> None:
    secret = "zebra quartz"
    with embedllm.LLM(progress=False) as llm:
        first = llm.submit(f"{secret} one", max_tokens=200, ignore_eos=True)
        next(iter(first))  # it runs already when the trace begins
        with llm.trace() as trace:
            llm.generate([secret * 8, secret * 8, "def two():"], max_tokens=6, n=2)
        first.cancel()
        ids = llm.tokenize(secret)
    for name in ("run.ekv", "run.jsonl"):
        trace.save(tmp_path / name)
    trace.to_perfetto(tmp_path / "run.json")
    assert trace.beginning is not None and len(trace.beginning.sequences) == 1
    last = list(trace.states())[-1]
    assert last.digest() == list(open_trace(tmp_path / "run.ekv").states())[-1].digest()
    assert last.totals.finished >= 6
    for name in ("run.jsonl", "run.json"):
        text = (tmp_path / name).read_text()
        assert "zebra" not in text and ", ".join(map(str, ids)) not in text
