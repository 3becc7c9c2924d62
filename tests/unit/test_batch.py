"""Packing a plan: every view against a loop over the entries, in any order and any block size."""

import random
import time
from array import array

import pytest

from embedllm.batch import Batch, build, round_rows
from embedllm.errors import EngineError
from embedllm.plan_types import UNKNOWN, Entry, Plan


def random_plan(seed: int, block_size: int, most: int = 9) -> Plan:
    rng = random.Random(seed)
    entries = []
    for number in range(rng.randint(1, most)):
        count = rng.choice([1, 1, 1, 4, rng.randint(1, 30)])
        start = rng.randint(0, 50)
        num_blocks = -(-(start + count) // block_size) + rng.choice([0, 0, 2])
        draft = min(count - 1, 3) if rng.random() < 0.3 else 0
        wanted = rng.choice([0, 1 + draft])
        blocks = array("i", [rng.randrange(1_000) for _ in range(num_blocks)])
        tokens = [rng.randrange(50_000) for _ in range(count)]
        entries.append(Entry(number, 0, number, start, tokens, draft, wanted, blocks, rng.random() < 0.2))
    return Plan(0, entries, [(1, 2), (3, 4)])


def found(batch: Batch, plan: Plan, block_size: int) -> list[Entry]:
    """The plan's entries in the order the batch runs them, recognised by their slots."""
    first_slots = {}
    for entry in plan.entries:
        block = entry.blocks[entry.start // block_size]
        first_slots[block * block_size + entry.start % block_size] = entry
    assert len(first_slots) == len(plan.entries)
    return [first_slots[int(batch.slots[start])] for start in batch.starts[:-1]]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("number", range(20))
def test_views_say_what_the_plan_says(number: int, block_size: int, test_seed: int) -> None:
    plan = random_plan(test_seed, block_size)
    batch = build(plan, block_size)
    ran = found(batch, plan, block_size)
    assert [len(e.tokens) for e in ran] == sorted(len(e.tokens) for e in plan.entries)
    ids, positions, slots = [], [], []
    for entry in ran:
        ids += entry.tokens
        for position in range(entry.start, entry.start + len(entry.tokens)):
            positions.append(position)
            slots.append(entry.blocks[position // block_size] * block_size + position % block_size)
    assert batch.ids.tolist() == ids
    assert batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots
    assert batch.num_tokens == plan.num_tokens == len(ids)
    assert batch.seq_lens.tolist() == batch.lengths == [e.start + len(e.tokens) for e in ran]
    assert batch.query_starts.tolist() == batch.starts
    assert batch.starts[-1] == len(ids)
    for entry, row in zip(ran, batch.tables.tolist(), strict=True):
        assert row[: len(entry.blocks)] == list(entry.blocks)
        assert not any(row[len(entry.blocks) :])


@pytest.mark.parametrize("number", range(20))
def test_wanted_rows_are_in_the_plans_order(number: int, test_seed: int) -> None:
    plan = random_plan(test_seed, 4)
    batch = build(plan, 4)
    starts = {id(entry): start for entry, start in zip(found(batch, plan, 4), batch.starts, strict=False)}
    logits, hidden = [], []
    for entry in plan.entries:
        start, end = starts[id(entry)], starts[id(entry)] + len(entry.tokens)
        logits += range(end - entry.num_logits, end)
        hidden += range(start, end) if entry.wants_hidden else ()
    assert batch.logit_rows.tolist() == logits
    assert ([] if batch.hidden_rows is None else batch.hidden_rows.tolist()) == hidden


def test_one_buffer_holds_every_view(test_seed: int) -> None:
    batch = build(random_plan(test_seed, 4), 4)
    address = batch.buffer.untyped_storage().data_ptr()
    for name in ("padded_ids", "padded_positions", "slots", "tables", "query_starts", "seq_lens", "logit_rows"):
        assert getattr(batch, name).untyped_storage().data_ptr() == address


def test_padding_is_zero_and_of_a_kernel_friendly_size(test_seed: int) -> None:
    for seed in range(20):
        batch = build(random_plan(test_seed + seed, 4), 4)
        assert len(batch.padded_ids) == len(batch.padded_positions) == round_rows(batch.num_tokens)
        assert not batch.padded_ids[batch.num_tokens :].any()
        assert not batch.padded_positions[batch.num_tokens :].any()


def test_round_rows() -> None:
    assert [round_rows(n) for n in (0, 1, 2, 3, 4, 5, 9, 16, 17, 32, 33, 500)] == [
        1,
        1,
        2,
        4,
        4,
        8,
        16,
        16,
        32,
        32,
        48,
        512,
    ]
    assert all(round_rows(n) >= n for n in range(1, 2_000))


def test_nothing_to_run() -> None:
    batch = build(Plan(3, []), 16)
    assert batch.num_tokens == 0
    assert batch.starts == [0]
    assert batch.tables.shape[0] == 0


def test_unknown_ids_are_refused() -> None:
    with pytest.raises(EngineError, match="not known yet"):
        build(Plan(0, [Entry(0, 0, 0, 5, [UNKNOWN], 0, 1, array("i", [0]))]), 16)


@pytest.mark.serial
def test_cost_of_a_decode_entry() -> None:
    """Packing must stay small beside a step of milliseconds: about 3 µs for each entry and 60 µs for the step."""

    def seconds(entries: int) -> float:
        blocks = [array("i", range(i * 13, i * 13 + 13)) for i in range(entries)]
        plan = Plan(0, [Entry(i, 0, i, 200, [7], 0, 1, b) for i, b in enumerate(blocks)])
        runs = []
        for _ in range(30):
            began = time.thread_time()
            build(plan, 16)
            runs.append(time.thread_time() - began)
        return min(runs)

    seconds(1)
    one, many = seconds(1), seconds(257)
    each = (many - one) / 256
    print(f"\nbatch.build: {one * 1e6:.0f} µs + {each * 1e6:.2f} µs per decode entry")
    assert each < 6e-6
    assert one < 250e-6
