"""Who runs when, with which memory: each promise of the scheduler alone. All together: tests/engine/policy.py."""

import random
from collections.abc import Iterable

import pytest

from embedllm import events
from embedllm.config import Limits
from embedllm.invariants import check, check_idle
from embedllm.plan_types import UNKNOWN, Plan
from embedllm.scheduler import MAX_PREEMPTIONS, Scheduler
from embedllm.sequence import Sequence, State
from tests.engine.policy import World


def scheduler(**limits: object) -> Scheduler:
    return Scheduler(Limits(**{"block_size": 4, "num_blocks": 64, "max_num_seqs": 8, "max_batch_tokens": 64} | limits))


def sequence(i: int, num_prompt: int, max_tokens: int = 8, **options: object) -> Sequence:
    """A prompt that shares nothing with the others."""
    return Sequence(i, [1_000 * (i + 1) + j for j in range(num_prompt)], max_tokens, **options)


def sampled(plan: Plan) -> list[list[int]]:
    return [[7] * min(1, entry.num_logits) for entry in plan.entries]


def step(s: Scheduler, pinned: Iterable[int] = ()) -> Plan:
    plan = s.plan()
    assert plan is not None
    s.commit(plan, sampled(plan))
    check(s, pinned)
    return plan


def run(s: Scheduler, pinned: Iterable[int] = ()) -> None:
    """Until idle."""
    for _ in range(2_000):
        if not s.has_work:
            return
        step(s, pinned)
    raise AssertionError("not idle")


def parts(plan: Plan) -> dict[int, tuple[int, int, int]]:
    return {entry.sequence_id: (entry.start, entry.num_tokens, entry.num_logits) for entry in plan.entries}


# ---- catching up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 64])
@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8, 9])
def test_prompt_comes_in_chunks_that_fit_the_budget(num_prompt: int, budget: int) -> None:
    s = scheduler(max_num_seqs=1, max_batch_tokens=budget)
    s.add(sequence(0, num_prompt))
    reached = 0
    while reached < num_prompt:
        (start, num_tokens, num_logits) = parts(step(s))[0]
        assert start == reached and num_tokens == min(budget, num_prompt - reached)
        reached += num_tokens
        assert num_logits == (reached == num_prompt)
    assert parts(step(s)) == {0: (num_prompt, 1, 1)}


def test_budget_goes_round_and_what_is_left_goes_to_the_first() -> None:
    s = scheduler(max_batch_tokens=32)
    for i, num_prompt in enumerate((100, 100, 3)):
        s.add(sequence(i, num_prompt))
    assert parts(step(s)) == {0: (0, 16, 0), 1: (0, 8, 0), 2: (0, 3, 1)} | {0: (0, 21, 0)}


def test_whole_prompts_when_chunks_are_off() -> None:
    s = scheduler(chunked_prefill=False, max_model_len=40, max_batch_tokens=40)
    for i, num_prompt in enumerate((5, 30, 9)):
        s.add(sequence(i, num_prompt))
    assert parts(step(s)) == {0: (0, 5, 1), 1: (0, 30, 1)}  # the third does not fit and is not cut
    assert parts(step(s)) == {0: (5, 1, 1), 1: (30, 1, 1), 2: (0, 9, 1)}
    s.add(sequence(3, 38, 2))
    s.add(sequence(4, 5))
    assert parts(step(s)) == {3: (0, 38, 1)}  # there is no room for a token each of the others, for one step
    assert parts(step(s)) == {0: (6, 1, 1), 1: (31, 1, 1), 2: (9, 1, 1), 3: (38, 1, 1), 4: (0, 5, 1)}
    run(s)


def test_long_prompt_does_not_stall_those_who_speak() -> None:
    """63 short requests, then one of 32,768 tokens: each short one gets a token in every step."""
    limits = {"num_blocks": 4_000, "block_size": 16, "max_num_seqs": 64, "max_batch_tokens": 512}
    s = scheduler(max_model_len=40_000, **limits)
    shorts = [sequence(i, 32, 64) for i in range(63)]
    for short in shorts:
        s.add(short)
    while any(short.num_output < 1 for short in shorts):
        step(s)
    long = sequence(63, 32_768)
    s.add(long)
    num_steps = 0
    while long.num_computed < long.num_prompt:
        before = [short.num_output for short in shorts]
        step(s)
        num_steps += 1
        for short, num_output in zip(shorts, before, strict=True):
            assert short.state is State.FINISHED or short.num_output == num_output + 1
    assert num_steps <= 32_768 // (512 - 63) + 1  # and the long one takes all that they leave


def test_long_prompt_does_not_hold_back_short_ones() -> None:
    """One of 32,768 tokens, then 63 short: they share half of every step, so all speak within a few."""
    limits = {"num_blocks": 4_000, "block_size": 16, "max_num_seqs": 64, "max_batch_tokens": 512}
    s = scheduler(max_model_len=40_000, **limits)
    long = sequence(0, 32_768)
    s.add(long)
    step(s)
    shorts = [sequence(i, 32, 64) for i in range(1, 64)]
    for short in shorts:
        s.add(short)
    num_steps, progress = 0, []
    while any(short.num_output < 1 for short in shorts):
        before = long.num_computed
        step(s)
        num_steps += 1
        progress.append(long.num_computed - before)
    assert num_steps <= 63 * 32 // (256 - 63) + 1, num_steps
    assert min(progress) >= (512 - 63) // 2, progress


# ---- order and memory -----------------------------------------------------------------------------------------


def test_lower_priority_value_goes_first_then_arrival() -> None:
    s = scheduler(max_num_seqs=2)
    for i, priority in enumerate((1, 0, 1, -5, 0)):
        s.add(sequence(i, 4, priority=priority))
    order = []
    while s.has_work:
        step(s)
        order += [x.id for x in s.running if x.id not in order]
    assert order == [3, 1, 4, 0, 2]


def test_last_in_order_is_preempted_and_says_the_same_later() -> None:
    s = scheduler(num_blocks=6, max_num_seqs=2)
    first, last = sequence(0, 8, 16), sequence(1, 7, 10)
    s.add(first)
    s.add(last)
    while not s.num_preemptions:
        step(s)
    assert first.state is State.RUNNING and last.state is State.WAITING
    said = list(last.tokens)
    assert last.num_output and not last.blocks and last.row == -1
    run(s)
    assert last.tokens[: len(said)] == said and last.num_output == 10 and first.num_preemptions == 0


def test_more_urgent_request_takes_the_memory_of_a_less_urgent_one() -> None:
    s = scheduler(num_blocks=8, max_num_seqs=2)
    patient, urgent = sequence(0, 12, 16, priority=1), sequence(1, 12, 16)
    s.add(patient)
    step(s)
    s.add(urgent)
    while not s.num_preemptions:
        step(s)
    assert patient.num_preemptions == 1 and urgent.state is State.RUNNING
    run(s)
    assert urgent.num_preemptions == 0


def test_first_is_never_preempted_and_the_others_a_bounded_number_of_times() -> None:
    """Eight requests that grow to the size of the whole pool; memory for little more than one."""
    s = scheduler(num_blocks=12, block_size=2)
    requests = [sequence(i, 2, 22) for i in range(8)]
    for request in requests:
        s.add(request)
    while s.has_work:
        first = s.running[0] if s.running else None
        plan = s.plan()
        assert plan is not None and (first is None or first.state is State.RUNNING)
        check(s)
        s.commit(plan, sampled(plan))
    assert s.num_preemptions and max(r.num_preemptions for r in requests) <= MAX_PREEMPTIONS
    assert requests[0].num_preemptions == 0 and all(r.num_output == 22 for r in requests)


def test_request_preempted_often_comes_back_as_the_first_and_stays() -> None:
    s = scheduler(num_blocks=64)
    for i in range(3):
        s.add(sequence(i, 4, 30))
    step(s)
    unlucky = s.running[-1]
    for _ in range(MAX_PREEMPTIONS):
        s.preempt(unlucky)
        step(s)
    assert unlucky.state is State.WAITING  # the pool is nearly empty, but it would not be the first
    later = sequence(3, 4, 30)
    s.add(later)
    while unlucky.state is State.WAITING:
        step(s)
        assert later.state is State.WAITING or unlucky.state is State.RUNNING  # nobody passes it
    assert s.running[0] is unlucky
    urgent = sequence(4, 4, 4, priority=-1)
    s.add(urgent)
    step(s)
    assert s.running[0] is unlucky and urgent.state is State.WAITING
    run(s)
    assert unlucky.num_preemptions == MAX_PREEMPTIONS


def test_admission_waits_for_memory_for_all_that_is_known() -> None:
    s = scheduler(num_blocks=8)
    s.add(sequence(0, 16, 8))
    s.add(sequence(1, 16, 8))
    plan = step(s)
    assert list(parts(plan)) == [0]  # 4 blocks are left for the 4 it needs, but the first may grow
    assert s.waiting[0].id == 1
    run(s)
    assert s.num_preemptions == 0


def test_rows_are_numbers_below_the_limit_and_come_back() -> None:
    s = scheduler(max_num_seqs=3, max_batch_tokens=8)
    for i in range(7):
        s.add(sequence(i, 3, 1 + i % 3))
    seen = set()
    while s.has_work:
        plan = step(s)
        rows = [entry.row for entry in plan.entries]
        assert len(set(rows)) == len(rows) <= 3
        seen.update(rows)
    assert seen == {0, 1, 2}
    check_idle(s)


# ---- the prefix cache -----------------------------------------------------------------------------------------


def ask(s: Scheduler, i: int, tokens: list[int], **options: object) -> Sequence:
    request = Sequence(i, list(tokens), 2, **options)
    s.add(request)
    run(s)
    return request


def test_second_time_only_the_rest_is_computed() -> None:
    s = scheduler()
    prompt = list(range(18))
    assert ask(s, 0, prompt).num_cached == 0
    assert ask(s, 1, prompt).num_cached == 16
    assert ask(s, 2, [*prompt[:10], 99, 99, 99]).num_cached == 8
    assert (s.num_prefix_queries, s.num_prefix_hits) == (18 + 18 + 13, 24)


def test_last_prompt_token_is_always_computed() -> None:
    s = scheduler()
    prompt = list(range(16))
    ask(s, 0, prompt)
    assert ask(s, 1, prompt).num_cached == 12  # all 16 are cached, but the last one's logits are needed


def test_salt_separates_and_switching_off_works() -> None:
    s = scheduler()
    prompt = list(range(16))
    ask(s, 0, prompt, salt="a")
    assert ask(s, 1, prompt, salt="a").num_cached == 12
    assert ask(s, 2, prompt, salt="b").num_cached == 0 and ask(s, 3, prompt).num_cached == 0
    off = scheduler(prefix_caching=False)
    ask(off, 0, prompt)
    assert ask(off, 1, prompt).num_cached == 0 and off.pool.num_cached == 0


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    s = scheduler()
    prompt = list(range(16))
    ask(s, 0, prompt)
    assert ask(s, 1, prompt, wants_hidden=True).num_cached == 0


def test_output_is_found_again_as_the_next_turn_of_a_chat() -> None:
    s = scheduler()
    first = Sequence(0, list(range(7)), 9)
    s.add(first)
    run(s)
    assert ask(s, 1, [*first.tokens, 50, 51]).num_cached == 12  # 15 computed tokens make 3 whole blocks


def test_pinned_blocks_outlive_pressure() -> None:
    s = scheduler(num_blocks=16)
    prompt = list(range(17))
    ask(s, 0, prompt)
    blocks, _ = s.pool.find(prompt, None)
    s.pool.share(blocks)
    s.num_pinned = len(blocks)
    for i in range(1, 9):
        s.add(sequence(i, 40, 8))
        run(s, blocks)
    assert s.pool.find(prompt, None)[0] == blocks
    s.pool.release(blocks)
    assert ask(s, 9, prompt).num_cached == 16
    for i in range(10, 14):
        s.add(sequence(i, 40, 8))
        run(s)
    assert not s.pool.find(prompt, None)[0]


def test_preempted_sequence_finds_its_own_blocks() -> None:
    s = scheduler()
    s.add(sequence(0, 16, 12))
    s.add(sequence(1, 16, 12))
    for _ in range(6):
        step(s)
    s.preempt(s.running[1])
    plan = step(s)
    assert parts(plan)[1] == (20, 2, 1)  # of 16 + 6 tokens, 21 had been computed: 5 whole blocks


# ---- forks ----------------------------------------------------------------------------------------------------


def family(n: int, num_prompt: int, max_tokens: int = 8) -> list[Sequence]:
    prompt = list(range(num_prompt))
    members = [Sequence(i, list(prompt), max_tokens) for i in range(n)]
    members[0].forks = members[1:]
    return members


def most_blocks(s: Scheduler) -> int:
    most = 0
    while s.has_work:
        step(s)
        most = max(most, s.pool.num_used)
    return most


def test_forks_share_the_prompt() -> None:
    """Six samples of one prompt: the prompt is held once. Without sharing each would hold its own."""
    shared = scheduler(num_blocks=512, block_size=16, max_batch_tokens=512)
    shared.add(family(6, 500, 64)[0])
    alone = scheduler(num_blocks=512, block_size=16, max_batch_tokens=512, prefix_caching=False)
    for i in range(6):
        alone.add(sequence(i, 500, 64))
    shared_blocks, alone_blocks = most_blocks(shared), most_blocks(alone)
    saved = 1 - shared_blocks / alone_blocks
    print(f"n=6, 500 prompt and 64 output tokens: {shared_blocks} blocks, {alone_blocks} alone, {saved:.0%} saved")
    assert shared_blocks == 31 + 6 * 5 and saved > 0.7  # 31 whole blocks once, 5 of its own for each


def test_fork_copies_the_block_it_writes_into() -> None:
    s = scheduler()
    parent, fork = family(2, 7)
    s.add(parent)
    assert fork.state is State.UNBORN
    step(s)
    assert fork.state is State.RUNNING and fork.num_computed == 6 and fork.blocks[0] == parent.blocks[0]
    source, copy = parent.blocks[1], fork.blocks[1]
    assert source != copy and fork.copy == (source, copy) and s.pool.refs(source) == 2
    plan = s.plan()
    assert plan is not None and plan.copies == [(source, copy)] and parts(plan) == {0: (7, 1, 1), 1: (6, 1, 1)}
    s.commit(plan, sampled(plan))
    assert fork.copy is None and s.pool.refs(source) == 1
    assert step(s).copies == []


@pytest.mark.parametrize("num_prompt", [1, 5, 9])
def test_nothing_is_copied_if_the_last_token_begins_a_block(num_prompt: int) -> None:
    s = scheduler()
    parent, fork = family(2, num_prompt)
    s.add(parent)
    step(s)
    plan = step(s)
    assert plan.copies == [] and parts(plan)[fork.id] == (num_prompt - 1, 1, 1)
    run(s)


def test_fork_without_a_row_comes_in_by_the_prefix_cache() -> None:
    s = scheduler(max_num_seqs=2)
    members = family(4, 9, 3)
    s.add(members[0])
    step(s)
    assert [m.state for m in members] == [State.RUNNING, State.RUNNING, State.WAITING, State.WAITING]
    run(s)
    assert [m.num_cached for m in members] == [0, 8, 8, 8] and all(m.num_output == 3 for m in members)


def test_forks_of_an_aborted_parent_go_their_own_way() -> None:
    s = scheduler()
    members = family(3, 9, 3)
    s.add(members[0])
    s.finish(members[1], "cancelled")
    assert members[0].forks == members[2:]
    s.finish(members[0], "cancelled")
    check(s)
    assert members[2].state is State.WAITING
    run(s)
    assert members[2].num_output == 3 and [m.num_output for m in members[:2]] == [0, 0]
    check_idle(s)


# ---- in flight ------------------------------------------------------------------------------------------------


def test_next_step_is_planned_before_the_last_one_is_read() -> None:
    s = scheduler()
    s.add(sequence(0, 3, 3))
    first = s.plan()
    second = s.plan()
    third = s.plan()
    assert first is not None and second is not None and third is not None
    assert [p.entries[0].tokens for p in (second, third)] == [[UNKNOWN], [UNKNOWN]]
    assert s.plan() is None  # the third token is the last
    for plan, token in ((first, 5), (second, 6), (third, 7)):
        assert [p.tokens for p in s.commit(plan, [[token]])] == [[token]]
    check_idle(s)


def test_results_for_those_who_left_are_dropped() -> None:
    s = scheduler()
    gone, back, stays = (sequence(i, 3) for i in range(3))
    for request in (gone, back, stays):
        s.add(request)
    plan = s.plan()
    assert plan is not None
    s.finish(gone, "cancelled")
    s.preempt(back)
    again = s.plan()
    assert again is not None and parts(again)[1] == (0, 3, 1)
    assert [p.sequence for p in s.commit(plan, [[5], [5], [5]])] == [stays]
    assert [p.sequence for p in s.commit(again, [[6]] * len(again.entries))] == [stays, back]
    assert (gone.num_output, back.tokens[3:], stays.tokens[3:]) == (0, [6], [5, 6])


def test_blocks_are_back_at_once() -> None:
    s = scheduler()
    for i in range(4):
        s.add(sequence(i, 20))
    plan = s.plan()
    for request in list(s.sequences.values()):
        s.finish(request, "cancelled")
        s.finish(request, "error")  # the second word changes nothing
        assert request.finish_reason == "cancelled"
    check_idle(s)
    assert plan is not None and s.commit(plan, sampled(plan)) == []
    check_idle(s)


def test_rollback_leaves_no_trace() -> None:
    s = scheduler(max_batch_tokens=16)
    for i in range(3):
        s.add(sequence(i, 11))
    step(s)
    used = s.pool.num_used
    plans = [s.plan(), s.plan()]
    for plan in reversed(plans):
        assert plan is not None
        s.rollback(plan)
        check(s)
    assert s.pool.num_used == used
    again = [s.plan(), s.plan()]
    assert [[e.tokens for e in p.entries] for p in again if p] == [[e.tokens for e in p.entries] for p in plans if p]


# ---- drafts ---------------------------------------------------------------------------------------------------


def drafting(num_blocks: int = 64, max_tokens: int = 20, budget: int = 64) -> tuple[Scheduler, Sequence]:
    s = scheduler(num_blocks=num_blocks, max_batch_tokens=budget)
    request = sequence(0, 3, max_tokens)
    s.add(request)
    step(s)
    return s, request


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_accepted_drafts_stay_and_rejected_ones_leave_no_kv(accepted: int) -> None:
    s, request = drafting()
    request.draft = [1, 2, 3]
    plan = s.plan()
    assert plan is not None and parts(plan) == {0: (3, 4, 4)} and len(request.blocks) == 2
    (progress,) = s.commit(plan, [[*range(1, accepted + 1), 9]])
    check(s)
    assert progress.tokens == [*range(1, accepted + 1), 9] and not request.draft
    assert request.num_computed == 4 + accepted and len(request.blocks) == 1 + (accepted > 0)


def test_end_inside_accepted_drafts() -> None:
    s = scheduler()
    request = sequence(0, 3, 20, stop_ids=frozenset([2]))
    s.add(request)
    step(s)
    request.draft = [1, 2, 3]
    plan = s.plan()
    assert plan is not None
    assert [p.tokens for p in s.commit(plan, [[1, 2, 3, 4]])] == [[1, 2]]
    assert (request.finish_reason, request.stop_reason) == ("stop", 2)
    check_idle(s)


def test_draft_never_computes_what_nobody_needs() -> None:
    s, request = drafting(max_tokens=4)
    request.draft = [1] * 9
    assert parts(step(s)) == {0: (3, 3, 3)}  # of 4 tokens 1 is there and 1 is sampled anyway


def test_draft_takes_no_budget_from_a_prompt() -> None:
    s, request = drafting(budget=16)
    s.add(sequence(1, 30))
    request.draft = [1, 2, 3]
    assert parts(step(s)) == {0: (3, 1, 1), 1: (0, 15, 0)}
    assert parts(step(s)) == {0: (4, 1, 1), 1: (15, 15, 1)}


def test_draft_takes_no_memory_from_others() -> None:
    s = scheduler(num_blocks=6)
    first, second = sequence(0, 7), sequence(1, 8)
    s.add(first)
    s.add(second)
    step(s)
    first.draft, second.draft = [1] * 7, [1] * 7
    plan = step(s)  # 4 blocks are full, 1 goes to the second's next token, 1 is left for drafts
    assert s.num_preemptions == 0 and parts(plan) == {0: (7, 1 + 4, 5), 1: (8, 1 + 3, 4)}


# ---- parking, events, totals ----------------------------------------------------------------------------------


def test_parked_sequence_holds_nothing_until_it_is_resumed() -> None:
    s = scheduler()
    runs, waits = sequence(0, 9), sequence(1, 9)
    s.add(runs)
    step(s)
    s.add(waits)
    for request in (runs, waits):
        s.park(request)
        s.park(request)
        check(s)
    assert s.pool.num_used == 0 and not s.has_work and s.plan() is None and len(s.sequences) == 2
    s.resume(runs)
    s.resume(runs)
    assert runs.num_preemptions == 0
    step(s)
    assert runs.num_output == 2 and waits.num_output == 0
    s.resume(waits)
    run(s)
    assert runs.num_output == waits.num_output == 8


def test_events_of_one_request() -> None:
    s = scheduler(max_batch_tokens=8)
    recorder: list[events.Event] = []
    s.recorder = recorder
    parent, fork = family(2, 9, 2)
    s.add(parent)
    step(s)
    s.preempt(parent)
    s.park(parent)
    s.resume(parent)
    run(s)
    assert recorder == [
        (events.QUEUE, 0, 9, 2),
        (events.ADMIT, 0, 0, 0),
        (events.TABLE, 0, 0, 1),
        (events.COMMIT, 0, 8, 0),
        (events.PREEMPT, 0),
        (events.QUEUE, 0, 9, 2),
        (events.PARK, 0),
        (events.QUEUE, 0, 9, 2),
        (events.TABLE, 0, 0, 1),
        (events.ADMIT, 0, 0, 8),
        (events.TABLE, 0, 2),
        (events.COMMIT, 0, 9, 1),
        (events.FORK, 0, 1),
        (events.TABLE, 1, 0, 1),
        (events.TABLE, 1, 3),
        (events.COMMIT, 0, 10, 1),
        (events.FINISH, 0, "length"),
        (events.COMMIT, 1, 9, 1),
        (events.COMMIT, 1, 10, 1),
        (events.FINISH, 1, "length"),
    ]
    assert fork.num_cached == 8


def test_successor_keeps_the_totals_and_nothing_else() -> None:
    s = scheduler()
    for i in range(2):
        ask(s, i, list(range(16)))
    s.add(sequence(5, 9))
    step(s)
    s.recorder = s.pool.recorder = []
    s.num_preemptions = 3
    new = s.successor(s.limits)
    check_idle(new)
    assert (new.num_prefix_queries, new.num_prefix_hits, new.num_preemptions) == (41, 12, 3)
    assert new.recorder is s.recorder is new.pool.recorder


def test_pinned_half_and_a_request_of_the_other_half() -> None:
    """What was admitted beside the pins can always run."""
    world = World(Limits(block_size=2, num_blocks=16, max_model_len=64, max_num_seqs=4, max_batch_tokens=16))
    (job,) = world.add(list(range(17)), 1)
    while not job.ended:
        world.step()
    world.pin(job)
    assert world.scheduler.num_pinned == 8
    assert world.add([50] * 10, 7) and not world.add([51] * 10, 8)
    world.run()


def ids(sequences: Iterable[Sequence]) -> list[int]:
    return [s.id for s in sequences]


def test_arrival_order_survives_preemption() -> None:
    s = scheduler()
    for i in range(4):
        s.add(sequence(i, 4))
    step(s)
    for i in (3, 1, 2):
        s.preempt(s.sequences[i])
    assert ids(s.waiting) == [1, 2, 3]
    step(s)
    assert ids(s.running) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_blocks", [400, 8_000])
def test_memory_is_used_and_little_is_computed_twice(num_blocks: int) -> None:
    """Lengths as in a chat log, memory for a fraction of them: hardly a slot lies empty, few tokens are recomputed."""
    s = scheduler(block_size=16, num_blocks=num_blocks, max_num_seqs=256, max_batch_tokens=2_048, max_model_len=4_096)
    r = random.Random(0)
    needed = 0
    for i in range(150):
        num_prompt = min(2_000, max(4, int(r.lognormvariate(4.5, 1.1))))
        max_tokens = min(2_000, max(2, int(r.lognormvariate(5.3, 0.9))))
        needed += num_prompt + max_tokens - 1
        s.add(Sequence(i, [r.randrange(32_000) for _ in range(num_prompt)], max_tokens))
    computed, waste = 0, []
    while s.has_work:
        plan = s.plan()
        assert plan is not None
        computed += plan.num_tokens
        slots = 16 * sum(len(x.blocks) for x in s.running)
        waste.append(1 - sum(x.num_computed + x.num_in_flight for x in s.running) / slots)
        s.commit(plan, sampled(plan))
    mean = sum(waste) / len(waste)
    print(f"{num_blocks} blocks: {mean:.2%} of slots empty, {computed / needed - 1:.1%} recomputed")
    assert mean < 0.04 and computed <= (1.25 if num_blocks == 400 else 1) * needed
    assert (s.num_preemptions > 0) == (num_blocks == 400)
