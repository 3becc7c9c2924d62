"""Faults at every point: a step that fails is run again, whoever makes it fail is found, and nobody else notices."""

import gc
import logging
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from embedllm.errors import EngineDead, RequestFailed
from embedllm.faults import contain, let_go
from embedllm.plan_types import Entry, Plan
from tests.engine.faultlab import Fault, Injected, Lab, Told
from tests.engine.hooked import prompt_of

Arm = Callable[[Lab, Fault], Fault]

# Where a fault may strike. Before the commit it costs an attempt; in policy it costs everybody's KV; never a token.
ATTEMPT: dict[str, Arm] = {
    "run": lambda lab, fault: fault.wrap(lab.engine, "_run"),
    "copy": lambda lab, fault: fault.wrap(lab.runner.memory, "write"),
    "between layers": lambda lab, fault: fault.wrap(lab.engine, "_beat"),
    "sample": lambda lab, fault: fault.wrap(lab.engine._readout._sampler, "launch"),
    "bind": lambda lab, fault: fault.wrap(lab.engine._readout._sampler, "bind"),
}
POLICY: dict[str, Arm] = {
    "plan": lambda lab, fault: fault.wrap(lab.engine.scheduler, "plan"),
    "admit": lambda lab, fault: fault.wrap(lab.engine.scheduler, "_admit"),
    "allocate": lambda lab, fault: fault.wrap(lab.engine.scheduler.pool, "allocate"),
    "share": lambda lab, fault: fault.wrap(lab.engine.scheduler.pool, "share"),
    "find": lambda lab, fault: fault.wrap(lab.engine.scheduler.pool, "find"),
    "commit": lambda lab, fault: fault.wrap(lab.engine.scheduler, "commit"),
    "fork": lambda lab, fault: fault.wrap(lab.engine.scheduler, "_bear_forks"),
    "cache": lambda lab, fault: fault.wrap(lab.engine.scheduler.pool, "cache"),
    "finish": lambda lab, fault: fault.wrap(lab.engine.scheduler, "finish"),
    "release": lambda lab, fault: fault.wrap(lab.engine.scheduler.pool, "release"),
    "expire": lambda lab, fault: fault.wrap(lab.engine, "_expire"),
    "record": lambda lab, fault: fault.wrap(lab.runner.memory, "append"),
}
LAST = 300  # calls; every point is called less often in one workload


def strike(arm: Arm, fault: Fault) -> Lab:
    """One workload in which the fault may strike."""
    lab = Lab()
    arm(lab, fault)
    lab.workload()
    lab.run()
    return lab


def first_calls(arm: Arm) -> range:
    """Every call the workload makes, or 25 of them spread out."""
    probe = Fault(first=LAST * 10)
    strike(arm, probe)
    assert 0 < probe.num_calls < LAST
    return range(1, probe.num_calls + 1, max(1, probe.num_calls // 25))


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "embedllm")


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("point", [*ATTEMPT, *POLICY])
def test_a_fault_that_strikes_once_costs_nobody_anything(point: str, late: bool) -> None:
    """At every call in turn, as SQLite does with its allocator."""
    arm = ATTEMPT.get(point) or POLICY[point]
    for first in first_calls(arm):
        fault = Fault(first, late=late)
        lab = strike(arm, fault)
        assert fault.num_struck == 1, f"call {first} of {fault.num_calls} was not reached"
        assert lab.check() == []
        assert lab.engine.metrics.num_step_faults == 1
        fault.armed = False
        if first % 5 == 1:
            lab.check_alive()


@pytest.mark.parametrize("point", ATTEMPT)
@pytest.mark.parametrize("times", [2, 3, 4, 7])
def test_a_fault_that_strikes_some_times_costs_at_most_those_it_strikes_alone(point: str, times: int) -> None:
    for first in first_calls(ATTEMPT[point])[::4]:
        fault = Fault(first, times)
        lab = strike(ATTEMPT[point], fault)
        failed = lab.check(lambda told: True)
        assert len(failed) <= times - 2 + 1  # two attempts of the whole step came first
        for told in failed:
            error = lab.error_of(told)
            assert isinstance(error, RequestFailed) and isinstance(error.__cause__, Injected)
        fault.armed = False
        lab.check_alive()


@pytest.mark.parametrize("point", [*ATTEMPT, *POLICY])
def test_a_fault_that_stays_resolves_everybody(point: str) -> None:
    """Each request fails by itself, or the engine is dead; either way everybody hears the first cause."""
    arm = ATTEMPT.get(point) or POLICY[point]
    for first in first_calls(arm)[::6]:
        fault = Fault(first, None)
        lab = Lab()
        arm(lab, fault)
        for _ in range(3):
            lab.workload()
        lab.run()
        for told in lab.check(lambda told: True):
            error = lab.error_of(told)
            assert isinstance(error, (RequestFailed, EngineDead))
            assert isinstance(error.__cause__, Injected), repr(error.__cause__)
        if point == "run":
            assert lab.dead is not None
            assert isinstance(lab.dead.__cause__, Injected)
            assert lab.engine.has_work is False


@pytest.mark.parametrize("late", [False, True], ids=["before KV", "after KV"])
@pytest.mark.parametrize("at", [0, 3, 9, 15, 25])
@pytest.mark.parametrize("victim", range(5))
def test_bisection_finds_the_request_that_poisons_its_steps(victim: int, at: int, late: bool) -> None:
    """It fails from its `at`-th position on, whoever runs beside it."""
    lab = Lab()

    def poison(plan: Plan, *rest: Any) -> None:
        for entry in plan.entries:
            sample = lab.engine._samples.get(entry.sequence_id)
            if sample is not None and sample.live.request.id == victim and entry.start + entry.num_tokens > at:
                raise Injected

    lab.model.after = poison if late else lab.model.after
    lab.model.before = lab.model.before if late else poison
    lab.workload()
    lab.run()
    culprit = lab.told[victim]
    failed = lab.check(lambda told: told is culprit)
    reached = len(culprit.prompt) + len(lab.model.expected(culprit.prompt, culprit.max_tokens)) - 1 > at
    assert failed == ([culprit] if reached else [])
    lab.model.before = lab.model.after = lambda *rest: None
    lab.check_alive()


def test_many_poisoned_requests_do_not_kill_the_engine() -> None:
    """Twenty in a row that fail alone, and nothing else: the engine sees that it still works."""
    lab = Lab()

    def poison(plan: Plan) -> None:
        if any(entry.sequence_id in lab.engine._samples for entry in plan.entries):
            raise Injected

    lab.model.before = poison
    told = [lab.submit(prompt_of(number), 4) for number in range(20)]
    lab.run()
    assert lab.dead is None and len(lab.check(lambda one: one in told)) == 20
    lab.model.before = lambda plan: None
    lab.check_alive()


def test_samples_of_a_failed_request_are_left_out_of_the_rest_of_the_step() -> None:
    """One sample is blamed; its siblings, in the other half of the same step, are gone by then."""
    lab = Lab()
    lab.submit(prompt_of(2, 6), 12, n=6)
    bystander = lab.submit(prompt_of(3, 6), 12)
    for _ in range(4):
        lab.step()
    victim = lab.engine._live[0].samples[1].sequence.id
    seen: list[tuple[int, ...]] = []

    def poison(plan: Plan) -> None:
        seen.append(tuple(entry.sequence_id for entry in plan.entries))
        if victim in seen[-1]:
            raise Injected

    lab.model.before = poison
    lab.run()
    assert lab.check(lambda told: told is not bystander) == [lab.told[0]]
    after_blame = seen[seen.index((victim,)) + 1 :]
    siblings = {0, 2, 3, 4, 5} | {victim}
    assert after_blame and not any(set(ids) & siblings for ids in after_blame)


def test_nobody_finds_what_a_failed_request_computed() -> None:
    """Also the prompt's blocks, where the sample that computed them has ended and another one fails."""
    lab = Lab()
    prompt = prompt_of(5, 12)
    told = lab.submit(prompt, 12, n=2)
    first, second = (sample.sequence for sample in lab.engine._live[0].samples)
    first.max_tokens = 2
    for _ in range(6):
        lab.step()
    find = lab.engine.scheduler.pool.find
    assert first.finish_reason == "length" and second.blocks and find(prompt, None)[0]

    def poison(plan: Plan) -> None:
        if any(entry.sequence_id == second.id for entry in plan.entries):
            raise Injected

    lab.model.before = poison
    lab.run()
    assert isinstance(lab.error_of(told), RequestFailed)
    assert find(prompt, None)[0] == []


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError,
        lambda: torch.OutOfMemoryError("CUDA out of memory"),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["host", "device", "torch on the host"],
)
@pytest.mark.parametrize("point", ["run", "sample"])
def test_out_of_memory_is_a_fault_like_any_other(point: str, error: Callable[[], BaseException]) -> None:
    for first in (1, 2, 9):
        lab = strike(ATTEMPT[point], Fault(first, error=error))
        assert lab.check() == []
        lab.check_alive()


def test_what_a_failed_attempt_took_is_free_before_the_next() -> None:
    lab = Lab()
    refs: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class Activations(list[int]):
        pass

    def run_out(plan: Plan) -> None:
        alive.append(sum(ref() is not None for ref in refs))
        if len(refs) < 2:
            activations = Activations([1])
            refs.append(weakref.ref(activations))
            raise MemoryError(len(activations))

    lab.model.before = run_out
    gc.disable()
    try:
        lab.submit(prompt_of(1), 4)
        lab.submit(prompt_of(2), 4)
        lab.run()
    finally:
        gc.enable()
    assert len(refs) == 2 and len(alive) > 2 and not any(alive)
    assert lab.check() == []


def test_an_error_lets_go_of_what_its_frames_hold() -> None:
    class Weights:
        pass

    refs = []

    def deep() -> None:
        weights = Weights()
        refs.append(weakref.ref(weights))
        try:
            raise ValueError("first")
        except ValueError as first:
            raise KeyError("second") from first

    def outer() -> BaseException:
        held = Weights()
        refs.append(weakref.ref(held))
        try:
            deep()
        except KeyError as error:
            return let_go(error)
        raise AssertionError

    gc.disable()
    try:
        error = outer()
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()
    assert error.__traceback__ is None and isinstance(error.__cause__, ValueError)
    if sys.version_info >= (3, 11):
        told = "".join(traceback.format_exception(error))
        assert "in deep" in told and 'KeyError("second")' in told and 'ValueError("first")' in told


# ---- what is not an Exception -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit], ids=lambda error: error.__name__)
@pytest.mark.parametrize("point", ["run", "sample"])
def test_base_exceptions_in_a_step_are_faults(point: str, error: type[BaseException]) -> None:
    lab = strike(ATTEMPT[point], Fault(3, error=error))
    assert lab.check() == []
    lab.check_alive()


# ---- containment by itself --------------------------------------------------------------------------------------


def entries_of(count: int) -> list[Entry]:
    from array import array

    return [Entry(i, 0, i, 0, [1], 0, 1, array("i", [i])) for i in range(count)]


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4}, {0, 7}, set(range(8))], ids=str)
def test_contain_runs_or_blames_each_entry_once(bad: set[int]) -> None:
    plan = Plan(1, entries_of(8), [(90 + i, i) for i in range(8)])
    ran: list[int] = []
    blamed: list[int] = []
    copied: list[tuple[int, int]] = []
    num_attempts = 0

    def run(part: Plan) -> list[int]:
        nonlocal num_attempts
        num_attempts += 1
        ids = [entry.sequence_id for entry in part.entries]
        if bad & set(ids):
            raise Injected
        copied.extend(part.copies)
        return ids

    for _part, result in contain(plan, run, lambda entry: True, lambda entry, error: blamed.append(entry.sequence_id)):
        ran += result
    assert sorted(ran) == sorted(set(range(8)) - bad) and sorted(blamed) == sorted(bad)
    assert sorted(copied) == [(90 + i, i) for i in sorted(ran)]  # each copy comes with the entry that needs it
    assert num_attempts == 1 if not bad else num_attempts <= 2 + 2 * 3 * len(bad)


def test_contain_leaves_out_what_is_not_wanted_any_more() -> None:
    wanted = {0, 1, 2, 3}
    seen: list[list[int]] = []

    def run(part: Plan) -> None:
        seen.append([entry.sequence_id for entry in part.entries])
        wanted.discard(2)
        raise Injected

    assert list(contain(Plan(1, entries_of(4)), run, lambda e: e.sequence_id in wanted, lambda e, error: None)) == []
    assert seen[0] == [0, 1, 2, 3] and seen[1] == [0, 1, 3]
    wanted.clear()
    seen.clear()
    assert list(contain(Plan(1, entries_of(4)), run, lambda e: e.sequence_id in wanted, lambda e, error: None)) == []
    assert seen == []


def test_a_policy_fault_twice_in_a_row_is_the_end() -> None:
    lab = Lab()
    told = [lab.submit(prompt_of(number), 6) for number in range(3)]
    lab.step()
    Fault(1, None).wrap(lab.engine.scheduler, "commit")
    successor = lab.engine.scheduler.successor

    def broken(*given: Any) -> Any:
        scheduler = successor(*given)
        Fault(1, None).wrap(scheduler, "commit")
        return scheduler

    lab.engine.scheduler.successor = broken  # type: ignore[method-assign]
    lab.run()
    assert lab.dead is not None and isinstance(lab.dead.__cause__, Injected)
    assert all(lab.error_of(one) is lab.dead for one in told)


def test_policy_faults_with_a_good_step_between_are_survived() -> None:
    lab = Lab()
    lab.workload()
    for number in range(40):
        if number % 3 == 0 and lab.engine.has_work:
            Fault(1).wrap(lab.engine.scheduler, "plan")
        lab.step()
    lab.run()
    assert lab.check() == []
    lab.check_alive()


def test_starting_over_leaves_aside_what_was_set_aside_and_tells_who_watched() -> None:
    lab = Lab()
    events: list[Any] = []
    lab.engine.attach(events)
    parked = lab.submit(prompt_of(1), 6)
    running = lab.submit(prompt_of(2), 6)
    lab.step()
    lab.engine.park(0)
    Fault(1).wrap(lab.engine.scheduler, "plan")
    lab.run()
    assert events[-1] == ("start_over",)
    assert running.ended is not None and parked.ended is None
    lab.engine.resume(0)
    lab.run()
    assert lab.check() == []


def test_a_cancel_that_meets_a_fault_still_ends_the_request() -> None:
    for point in ("finish", "release"):
        lab = Lab()
        lab.workload()
        for _ in range(5):
            lab.step()
        fault = POLICY[point](lab, Fault(1))
        victim: Told = lab.told[1]
        lab.cancel(victim)
        fault.armed = False
        lab.run()
        assert lab.check(victim.__eq__) == [victim]
        lab.check_alive()


def test_a_fault_while_recovering_from_a_fault() -> None:
    lab = Lab()
    lab.workload()
    for _ in range(4):
        lab.step()
    ATTEMPT["run"](lab, Fault(1, 2))
    POLICY["commit"](lab, Fault(1))
    lab.cancel(lab.told[4])
    lab.run()
    lab.check(lambda told: told is lab.told[4])
    lab.check_alive()


def test_no_thread_is_needed_for_any_of_this() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedllm-")]
