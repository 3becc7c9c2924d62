"""The truth, recounted: everything the scheduler and the pool believe, derived again from scratch.

Owns no state and is never needed to run; tests call it after every step, and so does an engine with
EMBEDLLM_CHECK=1. Invariant: it only reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.scheduler import MAX_PREEMPTIONS, Scheduler
from embedllm.sequence import Sequence, State


def check(scheduler: Scheduler, pinned: Iterable[int] = ()) -> None:
    """Recount blocks, rows, queues and the progress of everyone. `pinned` lists blocks held from outside.

    Raises AssertionError naming what is wrong. O(blocks + tokens).
    """
    held = list(pinned)
    held.extend(s.copy[0] for s in scheduler.running if s.copy is not None)
    tables = [block for s in scheduler.running for block in s.blocks]
    scheduler.pool.check([*held, *tables])
    _check_writes(scheduler, Counter(tables))
    _check_queues(scheduler)
    for sequence in scheduler.running:
        _check_progress(sequence, scheduler)


def check_plan(plan: Plan, scheduler: Scheduler) -> None:
    """A plan that was just made: within the budget, each entry where its sequence is, each copy into its own block."""
    assert plan.num_tokens <= scheduler.budget, f"{plan.num_tokens} tokens in one step of {scheduler.budget}"
    ids, rows = {entry.sequence_id for entry in plan.entries}, {entry.row for entry in plan.entries}
    assert len(ids) == len(rows) == len(plan.entries) > 0, "a sequence or a row is in the plan twice, or nobody is"
    for entry in plan.entries:
        sequence = scheduler.sequences.get(entry.sequence_id)
        assert sequence is not None and sequence.state is State.RUNNING, "planned, but not running"
        assert (entry.row, entry.epoch) == (sequence.row, sequence.epoch), "planned for another row or epoch"
        assert entry.blocks == sequence.blocks, f"sequence {sequence.id} was given a stale block table"
        _check_entry(entry, sequence)
    sequences = {s.id: s for s in scheduler.running}
    due = [s.copy for e in plan.entries if e.start == (s := sequences[e.sequence_id]).num_computed and s.copy]
    assert plan.copies == due, f"copies {plan.copies} are planned, {due} are due"


def _check_entry(entry: Entry, sequence: Sequence) -> None:
    end = entry.start + entry.num_tokens
    assert entry.num_tokens >= 1 and end == sequence.num_computed + sequence.num_in_flight, "it leaves a gap"
    assert end <= sequence.max_slots, f"sequence {sequence.id} computes KV that nobody will read"
    num_known = entry.num_tokens - entry.num_draft
    known = sequence.tokens[entry.start : entry.start + num_known]
    assert known == [token for token in entry.tokens[:num_known] if token != UNKNOWN], "not its tokens"
    assert entry.tokens[len(known) : num_known].count(UNKNOWN) == num_known - len(known) <= sequence.num_sampling
    assert entry.tokens[num_known:] == sequence.draft[: entry.num_draft], "not its draft"
    reached = entry.start + num_known == len(sequence.tokens) + sequence.num_sampling - (entry.num_logits > 0)
    assert entry.num_logits == (1 + entry.num_draft if reached else 0), "logits of a token that is known, or none"


def check_idle(scheduler: Scheduler, num_held: int = 0) -> None:
    """Nothing unfinished: everything is back but the `num_held` blocks held from outside."""
    limits = scheduler.limits
    assert not scheduler.waiting and not scheduler.running and not scheduler.sequences, "somebody is left"
    assert len(scheduler.free_rows) == limits.max_num_seqs, "a row is lost"
    assert scheduler.pool.num_available == limits.num_blocks - num_held, "a block is lost"


def _check_writes(scheduler: Scheduler, owners: Counter[int]) -> None:
    """No block that anybody else can read is written: writable blocks have one owner and are not cached."""
    size = scheduler.limits.block_size
    for sequence in scheduler.running:
        first = sequence.num_computed // size
        for i, block in enumerate(sequence.blocks):
            tokens = scheduler.pool.cached_tokens(block)
            if i >= first:
                assert owners[block] == 1, f"block {block} is writable and has {owners[block]} owners"
                assert tokens is None, f"cached block {block} would be written"
            elif tokens is not None:
                known = tuple(sequence.tokens[i * size : (i + 1) * size])
                assert known == tokens, f"block {block} is cached as other tokens than sequence {sequence.id} has"
        for i in range(sequence.num_chained):
            assert (i + 1) * size <= sequence.num_computed, "a block was cached before its KV was committed"


def _check_queues(scheduler: Scheduler) -> None:
    everyone = {s.id: s for s in scheduler.sequences.values()}
    rows = [s.row for s in scheduler.running]
    free_rows = scheduler.limits.max_num_seqs - len(set(rows))
    assert len(set(rows)) == len(rows) and len(scheduler.free_rows) == free_rows, "rows are lost or shared"
    for queue, state in ((scheduler.waiting, State.WAITING), (scheduler.running, State.RUNNING)):
        assert all(everyone.get(s.id) is s and s.state is state for s in queue), f"a stranger is {state.value}"
        assert [s.order for s in queue] == sorted(s.order for s in queue), f"{state.value} is out of order"
    unborn = [fork for s in everyone.values() for fork in s.forks]
    assert all(fork.state is State.UNBORN for fork in unborn), "a fork is born and still listed"
    states = Counter(s.state for s in everyone.values())
    counted = {State.WAITING: len(scheduler.waiting), State.RUNNING: len(scheduler.running), State.UNBORN: len(unborn)}
    assert all(states[state] == number for state, number in counted.items()), f"a sequence is lost: {states}"
    assert states[State.FINISHED] == 0, "a finished sequence is still listed"
    for sequence in everyone.values():
        if sequence.state is not State.RUNNING:
            assert not sequence.blocks and sequence.row < 0 and not sequence.num_in_flight, "idle, but holds something"
    for sequence in scheduler.running[1:]:
        assert sequence.num_preemptions < MAX_PREEMPTIONS, "a protected sequence is not the first in order"


def _check_progress(sequence: Sequence, scheduler: Scheduler) -> None:
    limits = scheduler.limits
    reached = sequence.num_computed + sequence.num_in_flight
    known = len(sequence.tokens) + sequence.num_sampling + len(sequence.draft)
    assert 0 <= sequence.num_computed <= len(sequence.tokens), f"sequence {sequence.id} computed what it does not know"
    assert sequence.num_in_flight >= 0 and reached <= known, f"sequence {sequence.id} overran"
    assert len(sequence.blocks) == limits.blocks_for(reached), f"sequence {sequence.id} has the wrong number of blocks"
    assert 0 <= sequence.num_output < sequence.max_tokens, f"sequence {sequence.id} is past its end"
    assert len(sequence.tokens) <= limits.max_model_len, f"sequence {sequence.id} is past the context"
    assert sequence.num_preemptions <= MAX_PREEMPTIONS, f"sequence {sequence.id} was preempted too often"
