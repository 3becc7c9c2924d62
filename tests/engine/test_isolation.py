"""A request only hurts itself: bad numbers, bad callbacks, bad tokenizers, and an engine that hangs or dies."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import embedllm
from embedllm import edits, watchdog, worker
from embedllm.channel import Channel
from embedllm.errors import EngineDead, EngineReentered, RequestCancelled, RequestFailed
from embedllm.plan_types import Plan
from embedllm.runner import ModelOutput
from embedllm.testing import ByteTokenizer
from tests.engine.faultlab import Lab
from tests.engine.hooked import LONG, Hooked, engine_of, opened, prompt_of, right, until


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "embedllm")


# ---- numbers that are none --------------------------------------------------------------------------------------


def spoil(lab: Lab, victims: set[int], value: float, from_position: int = 0) -> None:
    """Write `value` over the logits of these requests, once they have reached a position."""

    def after(plan: Plan, output: ModelOutput) -> None:
        rows = [entry for entry in plan.entries if entry.num_logits]
        for row, entry in enumerate(rows):
            sample = lab.engine._samples[entry.sequence_id]
            if sample.live.request.id in victims and entry.start + entry.num_tokens > from_position:
                output.logits[row] = value

    lab.model.after = after


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_its_request_only(value: float, temperature: float) -> None:
    lab = Lab()
    told = [lab.submit(prompt_of(number, 9), 10, temperature=temperature, logprobs=0) for number in range(4)]
    spoil(lab, {1, 2}, value, from_position=13)
    lab.run()
    assert lab.check(lambda one: one in told[1:3]) == told[1:3]
    error = lab.error_of(told[1])
    assert isinstance(error, RequestFailed) and "not finite" in str(error)
    assert len(told[1].tokens[0]) >= 4
    assert lab.engine.metrics.num_step_faults == 0  # no step failed: a row did
    lab.model.after = lambda plan, output: None
    lab.check_alive()


def test_one_nan_among_good_logits_is_seen() -> None:
    lab = Lab()

    def after(plan: Plan, output: ModelOutput) -> None:
        output.logits[0, 5] = math.nan

    lab.model.after = after
    told = lab.submit(prompt_of(1), 5)
    lab.run()
    assert "not finite" in str(lab.error_of(told))


def test_all_rows_not_finite_fails_all_and_the_next_are_right() -> None:
    lab = Lab()
    told = [lab.submit(prompt_of(number), 10) for number in range(12)]
    spoil(lab, set(range(12)), math.nan)
    lab.run()
    assert len(lab.check(lambda one: one in told)) == 12 and lab.dead is None
    lab.model.after = lambda plan, output: None
    lab.check_alive()


def test_what_is_not_finite_is_never_cached() -> None:
    """Also not the blocks of the chunks that came before the row was seen."""
    lab = Lab()
    prompt = prompt_of(1, 100)  # five chunks, of which the last gives logits
    spoil(lab, {0}, math.nan)
    bad = lab.submit(prompt, 5)
    lab.run()
    assert lab.error_of(bad) is not None and lab.engine.metrics.num_steps >= 4
    assert lab.engine.scheduler.pool.num_cached == 0
    lab.model.after = lambda plan, output: None
    again, third = lab.submit(prompt, 5), None
    lab.run()
    assert again.ended is not None and again.ended.usage.cached_tokens == 0
    third = lab.submit(prompt, 5)
    lab.run()
    assert third.ended is not None and third.ended.usage.cached_tokens == 96
    lab.check(lambda one: one is bad)


def test_blocks_of_a_shared_prefix_stay_cached_when_a_guest_fails() -> None:
    """A failure takes back what it put into the cache, not what it found there."""
    lab = Lab()
    lab.submit(prompt_of(1, 40), 3)
    lab.run()
    cached = lab.engine.scheduler.pool.num_cached
    spoil(lab, {1}, math.nan)
    guest = lab.submit([*prompt_of(1, 40), *prompt_of(9, 30)], 3)
    lab.run()
    assert lab.error_of(guest) is not None
    assert lab.engine.scheduler.pool.num_cached == cached
    lab.model.after = lambda plan, output: None
    third = lab.submit(prompt_of(1, 40), 3)
    lab.run()
    assert third.ended is not None and third.ended.usage.cached_tokens >= 36
    lab.check(lambda one: one is guest)


def test_neighbours_that_hit_the_blocks_of_a_failing_request() -> None:
    """It found the blocks of one that failed later; they are right, only the logits of the other were not."""
    lab = Lab()
    spoil(lab, {0}, math.nan)
    first = lab.submit(prompt_of(1, 60), 6)
    lab.step()
    lab.step()
    lab.submit([*prompt_of(1, 40), 7, 7], 6)
    lab.run()
    assert lab.check(lambda one: one is first) == [first]
    lab.model.after = lambda plan, output: None
    lab.check_alive()


def test_prompt_logprobs_that_fail_cost_nobody_else_a_step() -> None:
    lab = Lab()
    victim = lab.submit(prompt_of(1, 12), 5, prompt_logprobs=1)
    lab.submit(prompt_of(2, 12), 5, prompt_logprobs=1)

    def after(plan: Plan, output: ModelOutput) -> None:
        if output.hidden is not None and plan.entries[0].sequence_id == 0:
            output.hidden[3] = math.nan

    lab.model.after = after
    lab.run()
    assert lab.check(lambda one: one is victim) == [victim]
    assert "not finite" in str(lab.error_of(victim)) and lab.engine.metrics.num_step_faults == 0
    lab.model.after = lambda plan, output: None
    lab.check_alive()


# ---- callbacks --------------------------------------------------------------------------------------------------


class Own(Exception):
    """What a caller's code raises."""


def raising(error: BaseException) -> Callable[..., Any]:
    def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) >= 2:
            raise error
        return logits

    return processor


def returning(make: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> Any:
        return make(logits) if len(output) >= 2 else logits

    return processor


BAD_PROCESSORS: dict[str, Callable[..., Any]] = {
    "raises": raising(Own("mine")),
    "SystemExit": raising(SystemExit(3)),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "CancelledError": raising(asyncio.CancelledError()),
    "EngineDead": raising(EngineDead("I say so")),
    "None": returning(lambda logits: None),
    "a list": returning(lambda logits: logits.tolist()),
    "too long": returning(lambda logits: torch.zeros(len(logits) + 1)),
    "two rows": returning(lambda logits: torch.zeros(2, len(logits))),
    "a scalar": returning(lambda logits: logits[0]),
    "integers": returning(lambda logits: logits.long()),
    "sparse": returning(lambda logits: logits.to_sparse()),
    "NaN": returning(lambda logits: logits * math.nan),
    "one NaN": returning(lambda logits: torch.where(logits == logits.max(), math.nan, logits)),
    "infinite": returning(lambda logits: logits + math.inf),
    "nothing allowed": returning(lambda logits: torch.full_like(logits, -math.inf)),
}


@pytest.mark.parametrize("name", BAD_PROCESSORS)
def test_a_bad_logits_processor_fails_its_request_only(name: str) -> None:
    model = Hooked()
    with opened(model) as llm:
        others = [llm.submit(prompt_of(number), max_tokens=12) for number in range(3)]
        with pytest.raises(RequestFailed) as caught:
            llm.generate(prompt_of(7), max_tokens=12, logits_processor=BAD_PROCESSORS[name])
        completion = caught.value.completion
        assert completion is not None and completion.tokens == model.expected(prompt_of(7), 2)
        assert completion.finish_reason == "error"
        if name == "raises":
            assert isinstance(caught.value.__cause__, Own)
        for number, other in enumerate(others):
            assert other.result(5).tokens == model.expected(prompt_of(number), 12)
        assert llm.stats().num_step_faults == 0
        right(llm, model, 7)


def test_a_logits_processor_cannot_reach_others_through_what_it_is_given() -> None:
    """It gets copies: of its prompt, its output and its row."""
    model = Hooked()

    def vandal(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        assert (logits.dim(), logits.dtype, logits.device.type) == (1, torch.float32, "cpu")
        answer = logits.clone()
        prompt[:] = [0]
        output[:] = [1, 2, 3]
        logits.fill_(math.nan)
        return answer

    with opened(model) as llm:
        ours = [llm.submit(prompt_of(n), max_tokens=10, logits_processor=vandal) for n in range(3)]
        others = [llm.submit(prompt_of(n + 3), max_tokens=10) for n in range(3)]
        for n, generation in enumerate([*ours, *others]):
            assert generation.result(5).tokens == model.expected(prompt_of(n), 10)


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([1, 2], max_tokens=2),
        lambda llm: llm.generate([[1, 2], [3]], max_tokens=2),
        lambda llm: list(llm.stream([1, 2], max_tokens=2)),
        lambda llm: llm.submit([1, 2], max_tokens=2).result(),
        lambda llm: llm.submit([1, 2], max_tokens=2).wait(1),
        lambda llm: llm.stats(),
        lambda llm: llm.cache.explain([1, 2, 3]),
        lambda llm: llm.cache.pin([1, 2, 3, 4, 5]),
        lambda llm: llm.cache.reset(),
        lambda llm: llm.trace(),
    ],
    ids=["generate", "list", "stream", "result", "wait", "stats", "explain", "pin", "reset", "trace"],
)
def test_a_callback_that_waits_for_its_own_engine_is_told(call: Callable[[embedllm.LLM], object]) -> None:
    model = Hooked()
    with opened(model) as llm:

        def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            call(llm)
            return logits

        with pytest.raises(RequestFailed) as caught:
            llm.generate(prompt_of(1), max_tokens=5, logits_processor=processor)
        assert isinstance(caught.value.__cause__, EngineReentered)
        right(llm, model)


def test_a_callback_that_closes_the_llm() -> None:
    """It does not wait for itself; the request is cancelled, the thread ends."""
    model = Hooked()
    with opened(model) as llm:
        thread = llm._core.worker._thread if llm._core else None

        def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            llm.close()
            return logits

        with pytest.raises((RequestCancelled, RequestFailed)):
            llm.generate(prompt_of(1), max_tokens=5, logits_processor=processor)
        assert thread is not None
        until(lambda: not thread.is_alive())
        assert model.closed


def test_a_slow_logits_processor_is_logged_and_a_stuck_one_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(edits, "SLOW_PROCESSOR", 0.01)
    monkeypatch.setattr(edits, "STUCK_PROCESSOR", 0.1)
    model = Hooked()

    def sleeps(seconds: float) -> Callable[..., torch.Tensor]:
        def processor(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            time.sleep(seconds if len(output) == 1 else 0)
            return logits

        return processor

    with opened(model) as llm:
        bystander = llm.submit(prompt_of(1), max_tokens=30)
        slow = llm.generate(prompt_of(2), max_tokens=4, logits_processor=sleeps(0.03))
        assert slow.tokens == model.expected(prompt_of(2), 4)
        assert "logits_processor took" in caplog.text
        with pytest.raises(RequestFailed, match="limit is"):
            llm.generate(prompt_of(3), max_tokens=4, logits_processor=sleeps(0.15))
        assert bystander.result(5).tokens == model.expected(prompt_of(1), 30)


# ---- text -------------------------------------------------------------------------------------------------------


class Broken(ByteTokenizer):
    """Raises when it decodes one byte."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.byte = -1

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        if self.byte in ids:
            raise self.error
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize(
    "error", [Own("no such byte"), SystemExit(1), RecursionError()], ids=lambda e: type(e).__name__
)
def test_a_tokenizer_that_fails_fails_the_request(error: BaseException) -> None:
    model, tokenizer = Hooked(vocab_size=259), Broken(error)
    with opened(model, tokenizer=tokenizer) as llm:
        expected = model.expected(prompt_of(1), 20)
        others = [model.expected(prompt_of(n), 20) for n in range(2, 30)]
        number = next(n for n, tokens in enumerate(others, start=2) if not set(tokens) & set(expected[:6]))
        tokenizer.byte = next(token for token in expected if token < 256)
        bystander = llm.submit(prompt_of(number), max_tokens=20)
        with pytest.raises(RequestFailed):
            llm.generate(prompt_of(1), max_tokens=20)
        tokenizer.byte = -1
        assert bystander.result(5).tokens == model.expected(prompt_of(number), 20)
        right(llm, model, 1)


# ---- delivery ---------------------------------------------------------------------------------------------------


def test_a_record_that_cannot_be_written_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked()
    push = Channel.push
    with opened(model) as llm:
        bystander = llm.submit(prompt_of(1), max_tokens=30)
        victim = llm.submit(prompt_of(2), max_tokens=LONG)

        def broken(self: Channel, update: Any) -> None:
            if self is victim._channel and len(self.samples[0].pieces) >= 3:
                raise MemoryError
            push(self, update)

        monkeypatch.setattr(Channel, "push", broken)
        with pytest.raises(RequestFailed) as caught:
            victim.result(5)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert bystander.result(5).tokens == model.expected(prompt_of(1), 30)


def test_a_readers_loop_that_refuses_calls_hurts_nobody() -> None:
    """Whatever a loop raises when it is woken stays there; its reader looks again by itself."""
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        loop = asyncio.new_event_loop()
        wake = loop.call_soon_threadsafe

        def refuse(callback: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name.startswith("embedllm-"):
                raise OSError("no")
            return wake(callback, *args, **kwargs)

        loop.call_soon_threadsafe = refuse  # type: ignore[method-assign]
        bystander = llm.submit(prompt_of(1), max_tokens=60)

        async def read() -> list[int]:
            return (await llm.submit(prompt_of(2), max_tokens=20)).tokens

        try:
            assert loop.run_until_complete(read()) == model.expected(prompt_of(2), 20)
        finally:
            loop.close()
        assert bystander.result(5).tokens == model.expected(prompt_of(1), 60)


# ---- the end of an engine ---------------------------------------------------------------------------------------

WAITS: dict[str, Callable[[embedllm.LLM, embedllm.Generation], object]] = {
    "result": lambda llm, generation: generation.result(),
    "wait": lambda llm, generation: generation.wait() and generation.result(),
    "iterate": lambda llm, generation: list(generation),
    "await": lambda llm, generation: asyncio.run(generation._wait()),
    "generate": lambda llm, generation: llm.generate(prompt_of(8), max_tokens=LONG),
    "list": lambda llm, generation: llm.generate([prompt_of(8), prompt_of(9)], max_tokens=LONG),
    "stats": lambda llm, generation: [llm.stats() and time.sleep(0.001) for _ in range(100_000)],
}


def wait_in_threads(llm: embedllm.LLM) -> tuple[list[threading.Thread], dict[str, BaseException | None]]:
    """One thread per way to wait, with what each gets to hear."""
    heard: dict[str, BaseException | None] = {}

    def run(name: str, wait: Callable[[embedllm.LLM, embedllm.Generation], object], generation: Any) -> None:
        try:
            wait(llm, generation)
            heard[name] = None
        except BaseException as error:
            heard[name] = error

    threads = []
    for name, wait in WAITS.items():
        generation = llm.submit(prompt_of(len(threads)), max_tokens=LONG)
        threads.append(threading.Thread(target=run, args=(name, wait, generation), daemon=True))
        threads[-1].start()
    return threads, heard


def check_dead(llm: embedllm.LLM, threads: list[threading.Thread], heard: dict[str, Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert sorted(heard) == sorted(WAITS), "somebody still waits"
    assert all(isinstance(error, EngineDead) for error in heard.values()), heard
    began = time.monotonic()
    for call in (lambda: llm.submit(prompt_of(1)), llm.stats, lambda: llm.cache.reset()):
        with pytest.raises(EngineDead):
            call()
    assert time.monotonic() - began < 0.5


@pytest.fixture
def hook() -> Iterator[threading.Event]:
    """Set at the end of the test, so that no hook hangs for ever."""
    event = threading.Event()
    yield event
    event.set()


def test_a_step_that_hangs_is_noticed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, hook: threading.Event
) -> None:
    monkeypatch.setattr(watchdog, "STALLED", 0.2)
    monkeypatch.setattr(watchdog, "DEAD", 0.8)
    model = Hooked(delay=0.002)
    llm = embedllm.LLM(model)
    threads, heard = wait_in_threads(llm)
    until(lambda: len(engine_of(llm).scheduler.running) >= len(WAITS))

    def hang(plan: Plan) -> None:
        hook.wait(30)

    model.before = hang
    check_dead(llm, threads, heard, 0.8 + 1.0 + 0.5)
    assert "made no progress" in caplog.text and "in hang" in caplog.text  # the stack was logged first
    assert all(not error.__cause__ for error in heard.values() if error)
    # Another LLM of the same model is a new engine; the old one's memory comes back when its step does.
    fresh = embedllm.LLM(model)
    assert fresh._core is not llm._core
    model.before = lambda plan: None
    right(fresh, model)
    dying = llm._core.worker._thread if llm._core else threading.current_thread()
    fresh.close()
    hook.set()
    until(lambda: not dying.is_alive())
    llm.close()


@pytest.mark.parametrize("place", ["_sweep", "deliver", "_read_mailbox", "_step"])
def test_a_fault_outside_of_a_step_kills_nobody_silently(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the thread, everybody who waits hears of it within a second, with the first cause."""
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.01)
    model = Hooked(delay=0.002)
    llm = embedllm.LLM(model)
    threads, heard = wait_in_threads(llm)
    until(lambda: len(engine_of(llm).scheduler.running) >= len(WAITS))
    its = llm._core.worker if llm._core else None
    assert its is not None

    owner: Any = its._channels if place == "deliver" else its
    original, struck = getattr(owner, place), []

    def broken(*args: Any) -> None:
        if not struck:
            struck.append(threading.current_thread())
            raise ZeroDivisionError(place)
        original(*args)

    monkeypatch.setattr(owner, place, broken)
    check_dead(llm, threads, heard, 1.0 + 0.5)
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in heard.values() if error)
    until(lambda: not its._thread.is_alive())
    assert model.closed  # and the memory is back
    llm.close()


def test_a_runner_that_is_broken_for_good_ends_the_engine_with_the_first_cause() -> None:
    model = Hooked(delay=0.002)
    llm = embedllm.LLM(model)
    generations = [llm.submit(prompt_of(number), max_tokens=LONG) for number in range(12)]
    until(lambda: len(engine_of(llm).scheduler.running) == 12)
    count = iter(range(10_000))

    def broken(plan: Plan) -> None:
        raise Own(f"fault {next(count)}")

    model.before = broken
    causes = set()
    for generation in generations:
        with pytest.raises((EngineDead, RequestFailed)) as caught:
            generation.result(1)
        causes.add(type(caught.value.__cause__))
    assert causes == {Own}
    with pytest.raises(EngineDead) as dead:
        llm.generate([1, 2, 3])
    assert isinstance(dead.value.__cause__, Own)
    model.before = lambda plan: None
    with embedllm.LLM(model) as fresh:  # what the error says to do
        right(fresh, model)
    llm.close()


def test_a_message_that_fails_is_a_policy_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling finds the policy broken: everybody's KV is recomputed, nobody's tokens change."""
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        bystanders = [llm.submit(prompt_of(number), max_tokens=60) for number in range(4)]
        victim = llm.submit(prompt_of(9), max_tokens=LONG)
        until(lambda: len(engine_of(llm).scheduler.running) == 5)
        scheduler = engine_of(llm).scheduler
        monkeypatch.setattr(scheduler, "finish", lambda *args: 1 / 0)
        victim.cancel()
        with pytest.raises(RequestCancelled):
            victim.result(5)
        for number, generation in enumerate(bystanders):
            assert generation.result(5).tokens == model.expected(prompt_of(number), 60)
        assert engine_of(llm).scheduler is not scheduler and llm.stats().num_step_faults == 1


def test_a_failing_call_is_the_callers() -> None:
    model = Hooked()
    with opened(model) as llm:
        its = llm._core.worker if llm._core else None
        assert its is not None
        with pytest.raises(ZeroDivisionError):
            its.call(lambda engine: 1 // 0)
        assert llm.stats().num_step_faults == 0
        right(llm, model)
