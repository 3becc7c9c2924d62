"""The truth, recounted: everything the scheduler and the pool believe, derived again from scratch.

Owns no state and is never needed to run; tests call it after every step, and so does an engine with
EMBEDLLM_CHECK=1. Invariant: it only reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

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
    everyone = {s.id: s for s in scheduler}
    rows = [s.row for s in scheduler.running]
    free_rows = scheduler.limits.max_num_seqs - len(set(rows))
    assert len(set(rows)) == len(rows) and scheduler.num_free_rows == free_rows, "rows are lost or shared"
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
