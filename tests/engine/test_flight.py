"""Steps in flight: the next one is launched before the last one is read, and nobody can tell but by the clock."""

import asyncio
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from embedllm.errors import RequestFailed
from embedllm.faults import StepStopped
from embedllm.flight import Flight
from embedllm.plan_types import UNKNOWN, Plan
from tests.engine.faultlab import Fault, Injected, Lab
from tests.engine.hooked import Hooked, HookedRunner, opened, prompt_of

DEEP = pytest.mark.parametrize("depth", [2, 3])


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRunner, "depth", 2)


# ---- the order of things ----------------------------------------------------------------------------------------


class Script:
    """A device whose steps fail when told to; writes down what is asked of it."""

    def __init__(self, depth: int) -> None:
        self.log: list[str] = []
        self.bad: set[str] = set()
        self.flight: Flight[str] = Flight(depth, self.launch, self.take, self.rollback, self.blame)

    def _do(self, what: str) -> None:
        self.log.append(what)
        if what in self.bad:
            raise Injected

    def launch(self, plan: Plan) -> Callable[[], str]:
        self._do(f"launch {plan.number}")

        def read() -> str:
            self._do(f"read {plan.number}")
            return f"result {plan.number}"

        return read

    def take(self, plan: Plan, result: str) -> None:
        assert result == f"result {plan.number}"
        self.log.append(f"take {plan.number}")

    def rollback(self, plan: Plan) -> None:
        self.log.append(f"rollback {plan.number}")

    def blame(self, error: BaseException) -> None:
        assert isinstance(error, Injected)
        self.log.append("blame")

    def run(self, *numbers: int | None) -> list[bool]:
        return [self.flight.advance(None if number is None else Plan(number, [])) for number in numbers]


def test_a_step_is_read_when_the_next_is_on_its_way() -> None:
    script = Script(2)
    assert script.run(1, 2, 3, None, None, None) == [True] * 6
    assert script.log == [
        "launch 1", "launch 2", "read 1", "take 1", "launch 3", "read 2", "take 2", "read 3", "take 3"
    ]  # fmt: skip
    assert len(script.flight) == 0


def test_a_failed_launch_costs_nothing_that_was_launched_before() -> None:
    script = Script(3)
    script.bad = {"launch 3"}
    assert script.run(1, 2, 3) == [True, True, False]
    assert script.log[2:] == ["launch 3", "rollback 3", "blame", "read 1", "take 1", "read 2", "take 2"]
    assert len(script.flight) == 0


def test_a_failed_read_takes_what_came_after_it_along() -> None:
    script = Script(3)
    script.bad = {"read 1"}
    assert script.run(1, 2, 3) == [True, True, False]
    assert script.log[3:] == ["read 1", "rollback 3", "rollback 2", "rollback 1", "blame"]
    script = Script(3)
    script.bad = {"launch 3", "read 2"}
    assert script.run(1, 2, 3) == [True, True, False]
    assert script.log[2:] == [
        "launch 3", "rollback 3", "blame", "read 1", "take 1", "read 2", "rollback 2", "blame"
    ]  # fmt: skip
    assert len(script.flight) == 0


def test_being_stopped_is_no_fault() -> None:
    flight: Flight[str] = Flight(2, lambda plan: _stop(), lambda *a: None, lambda plan: None, lambda error: None)
    with pytest.raises(StepStopped):
        flight.advance(Plan(1, []))


def _stop() -> Any:
    raise StepStopped


# ---- in the engine ----------------------------------------------------------------------------------------------


@DEEP
def test_steps_really_run_ahead(depth: int) -> None:
    """A decoding step is launched with ids that nobody on the host knows yet, and the answers are right."""
    lab = Lab(depth=depth)
    unknown, ahead = 0, 0

    def look(plan: Plan) -> None:
        nonlocal unknown, ahead
        unknown += sum(token == UNKNOWN for entry in plan.entries for token in entry.tokens)
        ahead = max(ahead, len(lab.engine._flight))

    lab.model.before = look
    lab.workload()
    lab.run()
    assert lab.check() == []
    assert unknown > 20 and ahead == depth - 1
    lab.check_alive()


@DEEP
@pytest.mark.parametrize("point", ["launch", "read"])
def test_a_fault_in_flight_costs_nobody_a_token(point: str, depth: int) -> None:
    for first in range(1, 16):
        lab = Lab(depth=depth)
        fault = Fault(first)
        if point == "launch":
            fault.wrap(lab.engine._flight, "_launch")
        else:
            launch = lab.engine._flight._launch

            def launching(plan: Plan, launch: Any = launch, fault: Fault = fault) -> Any:
                holder = type("Holder", (), {"read": staticmethod(launch(plan))})()
                num_calls = fault.num_calls
                fault.wrap(holder, "read")
                assert fault.num_calls == num_calls
                return holder.read

            lab.engine._flight._launch = launching
        lab.workload()
        lab.run()
        assert lab.check() == []
        assert fault.num_struck == 1, "the workload is too short for this test"
        lab.check_alive()


def test_a_request_that_poisons_its_steps_is_found() -> None:
    lab = Lab(depth=2)
    lab.workload()
    for _ in range(4):
        lab.step()
    victim = lab.engine._live[3].samples[0].sequence.id

    def poison(plan: Plan) -> None:
        if any(entry.sequence_id == victim for entry in plan.entries):
            raise Injected

    lab.model.before = poison
    lab.run()
    assert lab.check(lambda told: told is lab.told[3]) == [lab.told[3]]
    assert isinstance(lab.error_of(lab.told[3]), RequestFailed)
    lab.model.before = lambda plan: None
    lab.check_alive()


def test_rows_of_nan_fail_alone_one_step_late() -> None:
    lab = Lab(depth=2)
    lab.workload()
    for _ in range(5):
        lab.step()
    row = lab.engine._live[3].samples[0].sequence.row

    def spoil(plan: Plan, output: Any) -> None:
        wanted = [entry for entry in plan.entries if entry.num_logits]
        for place, entry in enumerate(wanted):
            if entry.row == row and entry.sequence_id == 5:
                output.logits[place] = torch.nan

    lab.model.after = spoil
    lab.run()
    assert all(told is lab.told[3] for told in lab.check(lambda told: told is lab.told[3]))
    lab.model.after = lambda plan, output: None
    lab.check_alive()


@DEEP
def test_tokens_that_need_those_before_them_are_not_planned_ahead(depth: int) -> None:
    """Penalties, bad words and processors see every id before the one they choose; neighbours go on ahead."""
    lab = Lab(depth=depth)
    seen: list[int] = []

    def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        seen.append(len(output))
        return logits

    lab.submit(prompt_of(1), 8, logits_processor=processor)
    lab.submit(prompt_of(2), 8, repetition_penalty=1.0001)
    lab.submit(prompt_of(3), 8)
    ahead = [0, 0, 0]

    def look(plan: Plan) -> None:
        for entry in plan.entries:
            ahead[entry.sequence_id] += UNKNOWN in entry.tokens

    lab.model.before = look
    lab.run()
    assert lab.check() == []
    assert seen == list(range(8))
    assert ahead[0] == ahead[1] == 0 and ahead[2] > 3


@pytest.mark.usefixtures("deep")
def test_many_readers_cancels_and_stops(test_seed: int) -> None:
    """Threads and tasks at once, some of whom leave: the rest is right, and nothing is lost."""
    model = Hooked()
    rng = random.Random(test_seed)
    with opened(model, num_kv_blocks=160) as llm:

        def work(number: int) -> None:
            for turn in range(6):
                prompt, most = prompt_of(number * 7 + turn, 4 + number % 9), 3 + (number + turn) % 20
                if (number + turn) % 4 == 0:
                    for delta in llm.stream(prompt, max_tokens=500):
                        if len(delta.tokens) > -1:
                            break
                    continue
                done.append(
                    llm.generate(prompt, max_tokens=most, n=1 + turn % 2).tokens == model.expected(prompt, most)
                )

        async def task(number: int) -> None:
            handle = llm.submit(prompt_of(number), max_tokens=400)
            await asyncio.sleep(rng.random() / 50)
            handle.cancel()

        async def tasks() -> None:
            await asyncio.gather(*(task(100 + number) for number in range(20)))

        done: list[bool] = []
        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join()
        assert len(done) > 40 and all(done)


def test_text_is_made_while_the_next_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detokenising and committing a step come after the launch of the one behind it."""
    lab = Lab(depth=2)
    told = [lab.submit(prompt_of(number), 12) for number in range(3)]
    in_flight: list[int] = []
    decode = lab.tokenizer.decode

    def watched(*given: Any) -> str:
        in_flight.append(len(lab.engine._flight))
        return decode(*given)

    monkeypatch.setattr(lab.tokenizer, "decode", watched)
    lab.run()
    lab.check()
    assert all(one.ended is not None for one in told) and len(in_flight) > 12
    assert in_flight.count(1) > 0.8 * len(in_flight)  # all but the last step, behind which there is none
