"""Stop means stop: however a reader goes away, its request is gone within one step and the next one is right."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

import embedllm
from embedllm import worker
from embedllm.errors import EngineClosed, RequestCancelled, RequestFailed
from embedllm.generation import AsyncCursor
from tests.engine.hooked import LONG, Hooked, assert_idle, engine_of, opened, prompt_of, right, until, until_async

Leave = Callable[[embedllm.LLM], object]


def started(llm: embedllm.LLM, **params: object) -> tuple[embedllm.Generation, Iterator[embedllm.Delta]]:
    """A foreground request that has said something."""
    generation = llm.stream(prompt_of(1), max_tokens=LONG, **params)  # type: ignore[arg-type]
    cursor = iter(generation)
    next(cursor)
    return generation, cursor


def leave_by_break(llm: embedllm.LLM) -> None:
    for _ in llm.stream(prompt_of(1), max_tokens=LONG):
        break


def leave_a_kept_handle_by_break(llm: embedllm.LLM) -> object:
    generation = llm.stream(prompt_of(1), max_tokens=LONG)
    for _ in generation:
        break
    return generation


def leave_by_return(llm: embedllm.LLM) -> object:
    def first() -> object:
        for delta in llm.stream(prompt_of(1), max_tokens=LONG):
            return delta
        return None

    return first()


def leave_by_exception(llm: embedllm.LLM) -> None:
    with contextlib.suppress(ZeroDivisionError):
        for _ in llm.stream(prompt_of(1), max_tokens=LONG):
            raise ZeroDivisionError


def leave_by_exception_whose_traceback_is_kept(llm: embedllm.LLM) -> object:
    """As IPython does: the frame of the loop outlives it, its iterator does not."""
    try:
        for _ in llm.stream(prompt_of(1), max_tokens=LONG):
            raise ZeroDivisionError
    except ZeroDivisionError as error:
        return error
    return None


def leave_by_del_of_the_cursor(llm: embedllm.LLM) -> object:
    generation, cursor = started(llm)
    del cursor
    return generation


def leave_by_del_of_everything(llm: embedllm.LLM) -> None:
    generation, cursor = started(llm)
    del generation, cursor


def leave_by_del_before_reading(llm: embedllm.LLM) -> None:
    llm.stream(prompt_of(1), max_tokens=LONG)


def leave_by_del_of_a_background_request(llm: embedllm.LLM) -> None:
    generation = llm.submit(prompt_of(1), max_tokens=LONG)
    next(iter(generation))
    del generation


def leave_by_gc(llm: embedllm.LLM) -> None:
    cycle: list[object] = list(started(llm))
    cycle.append(cycle)
    del cycle
    gc.collect()


def leave_by_close_of_the_cursor(llm: embedllm.LLM) -> object:
    generation, cursor = started(llm)
    cursor.close()  # type: ignore[attr-defined]
    return generation, cursor


def leave_by_with_of_the_cursor(llm: embedllm.LLM) -> object:
    with iter(llm.stream(prompt_of(1), max_tokens=LONG)) as cursor:
        next(cursor)
    return cursor


def leave_by_with_of_the_handle(llm: embedllm.LLM) -> object:
    with llm.submit(prompt_of(1), max_tokens=LONG) as generation:
        next(iter(generation))
    return generation


def leave_by_cancel(llm: embedllm.LLM) -> object:
    generation, cursor = started(llm)
    generation.cancel()
    generation.cancel()
    return generation, cursor


def leave_by_cancel_from_another_thread(llm: embedllm.LLM) -> object:
    generation, cursor = started(llm)
    thread = threading.Thread(target=generation.cancel)
    thread.start()
    thread.join()
    return generation, cursor


def leave_n_samples(llm: embedllm.LLM) -> None:
    started(llm, n=5)


def leave_by_a_second_cursor(llm: embedllm.LLM) -> object:
    """The request lives as long as any started cursor does."""
    generation, first = started(llm)
    second = iter(generation)
    unstarted = iter(generation)
    next(second)
    del first
    assert len(next(second).tokens) >= 1
    assert llm.stats().num_requests_running == 1
    del second
    return generation, unstarted


WAYS = [way for name, way in sorted(globals().items()) if name.startswith("leave_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("leave_").replace("_", " "))
def test_blocks_are_back_within_one_step(way: Leave) -> None:
    model = Hooked()
    with opened(model) as llm:
        for number in range(5):
            before = llm.stats().request_finished.get("cancelled", 0)
            kept = way(llm)
            steps = model.num_steps
            assert_idle(llm)
            assert model.num_steps - steps <= 1
            assert llm.stats().request_finished.get("cancelled", 0) <= before + 1
            right(llm, model, number)
            del kept


# ---- asyncio ----------------------------------------------------------------------------------------------------


async def read(llm: embedllm.LLM, at_first: asyncio.Event) -> None:
    async for _ in llm.stream(prompt_of(1), max_tokens=LONG):
        at_first.set()


async def leave_async_by_break(llm: embedllm.LLM) -> None:
    async for _ in llm.stream(prompt_of(1), max_tokens=LONG):
        break


async def leave_async_by_cancel_of_the_task(llm: embedllm.LLM) -> None:
    running = asyncio.Event()
    task = asyncio.create_task(read(llm, running))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_async_by_cancel_before_the_first_token(llm: embedllm.LLM) -> None:
    task = asyncio.create_task(read(llm, asyncio.Event()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_async_by_cancel_of_an_await(llm: embedllm.LLM) -> None:
    async def whole() -> object:
        return await llm.stream(prompt_of(1), max_tokens=LONG)

    task = asyncio.create_task(whole())
    await until_async(lambda: engine_of(llm).scheduler.running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_async_by_timeout(llm: embedllm.LLM) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(read(llm, asyncio.Event()), 0.05)


async def leave_async_by_timeout_of_an_await(llm: embedllm.LLM) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(llm.submit(prompt_of(1), max_tokens=LONG), 0.05)


async def leave_async_by_exception(llm: embedllm.LLM) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in llm.stream(prompt_of(1), max_tokens=LONG):
            raise ZeroDivisionError


async def leave_async_by_aclose(llm: embedllm.LLM) -> object:
    cursor = aiter_of(llm)
    await cursor.__anext__()
    await cursor.aclose()
    return cursor


async def leave_async_by_async_with(llm: embedllm.LLM) -> object:
    async with aiter_of(llm) as cursor:
        await cursor.__anext__()
    return cursor


async def leave_async_through_an_async_generator(llm: embedllm.LLM) -> None:
    """An exception between two items is not seen by the inner iterator; dropping it is."""

    async def outer() -> AsyncIterator[str]:
        async for delta in llm.stream(prompt_of(1), max_tokens=LONG):
            yield delta.text

    texts = outer()
    await texts.__anext__()
    await texts.aclose()


def aiter_of(llm: embedllm.LLM) -> AsyncCursor:
    return llm.stream(prompt_of(1), max_tokens=LONG).__aiter__()


ASYNC_WAYS = [way for name, way in sorted(globals().items()) if name.startswith("leave_async_")]


@pytest.mark.parametrize("way", ASYNC_WAYS, ids=lambda way: way.__name__.removeprefix("leave_async_").replace("_", " "))
def test_blocks_are_back_within_one_step_async(way: Callable[[embedllm.LLM], object]) -> None:
    model = Hooked()
    with opened(model) as llm:

        async def main() -> None:
            for number in range(4):
                kept = await way(llm)  # type: ignore[misc]
                steps = model.num_steps
                assert_idle(llm)
                assert model.num_steps - steps <= 1
                prompt = prompt_of(number)
                assert (await llm.submit(prompt, max_tokens=6)).tokens == model.expected(prompt, 6)
                del kept

        asyncio.run(main())


def test_a_loop_that_is_closed_while_it_streams() -> None:
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        loop = asyncio.new_event_loop()
        cursor = aiter_of(llm)
        loop.run_until_complete(cursor.__anext__())
        waiting = loop.create_task(cursor.__anext__())
        loop.run_until_complete(asyncio.sleep(0))
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(waiting)
        loop.close()
        assert_idle(llm)
        right(llm, model)


def test_a_loop_that_is_closed_under_its_waiters() -> None:
    """Nobody cancelled anything: the engine goes on, and whoever else reads is served."""
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        loop = asyncio.new_event_loop()
        generation = llm.submit(prompt_of(1), max_tokens=40)
        coroutine = generation._wait()
        waiting = loop.create_task(coroutine)
        loop.run_until_complete(asyncio.sleep(0.01))
        loop._ready.clear()  # type: ignore[attr-defined]
        loop.close()
        assert generation.result(10).tokens == model.expected(prompt_of(1), 40)
        waiting._log_destroy_pending = False  # type: ignore[attr-defined]
        coroutine.close()


# ---- while it waits, and while its prompt is computed -----------------------------------------------------------


def test_cancel_in_the_queue() -> None:
    model = Hooked(delay=0.001)
    with opened(model, max_num_seqs=1) as llm:
        running = llm.submit(prompt_of(1), max_tokens=LONG)
        waiting = llm.submit(prompt_of(2), max_tokens=8)
        other = llm.submit(prompt_of(3), max_tokens=8)
        waiting.cancel()
        with pytest.raises(RequestCancelled) as caught:
            waiting.result(5)
        assert caught.value.completion is not None and caught.value.completion.tokens == []
        assert caught.value.completion.finish_reason == "cancelled"
        running.cancel()
        assert other.result(5).tokens == model.expected(prompt_of(3), 8)


def test_cancel_during_prefill_keeps_the_others() -> None:
    model = Hooked(delay=0.002)
    with opened(model, max_batch_tokens=64) as llm:
        bystander = llm.submit(prompt_of(2), max_tokens=60)
        long = llm.submit(prompt_of(1, 1_000), max_tokens=8)
        until(lambda: any(s.num_prompt == 1_000 and s.num_computed for s in list(engine_of(llm).scheduler.running)))
        long.cancel()
        steps = model.num_steps
        assert llm.stats().num_requests_running == 1
        assert model.num_steps - steps <= 1
        assert bystander.result(10).tokens == model.expected(prompt_of(2), 60)
        with pytest.raises(RequestCancelled):
            long.result()


def test_a_step_that_nobody_wants_any_more_is_left_between_two_layers() -> None:
    """A prompt that takes a minute per step is gone at the next layer, not a minute later."""
    model, inside, go_on = Hooked(), threading.Event(), threading.Event()

    def wait(plan: object) -> None:
        inside.set()
        assert go_on.wait(5)

    with opened(model) as llm:
        model.before = wait  # the hook comes before HashLM's one look between layers
        generation = llm.submit(prompt_of(1, 40), max_tokens=LONG)
        assert inside.wait(5)
        generation.cancel()
        go_on.set()
        with pytest.raises(RequestCancelled) as caught:
            generation.result(5)
        assert caught.value.completion is not None and caught.value.completion.tokens == []
        assert model.num_steps == 1 and llm.stats().num_step_faults == 0
        model.before = lambda plan: None
        right(llm, model, 1)


def test_a_step_somebody_still_wants_goes_on() -> None:
    model, inside, go_on = Hooked(), threading.Event(), threading.Event()

    def wait(plan: object) -> None:
        if len(plan.entries) == 2:  # type: ignore[attr-defined]
            inside.set()
            assert go_on.wait(5)

    with opened(model) as llm:
        model.before = wait
        stays = llm.submit(prompt_of(1), max_tokens=30)
        goes = llm.submit(prompt_of(2), max_tokens=LONG)
        assert inside.wait(5)
        goes.cancel()
        go_on.set()
        assert stays.result(5).tokens == model.expected(prompt_of(1), 30)
        with pytest.raises(RequestCancelled) as caught:
            goes.result(5)
        completion = caught.value.completion
        assert completion is not None and completion.tokens == model.expected(prompt_of(2), len(completion.tokens))


def test_cancel_races_with_the_end() -> None:
    """Cancelled at every moment around its last step, a request ends once, one way or the other."""
    model = Hooked()
    endings = set()
    with opened(model) as llm:
        expected = model.expected(prompt_of(1), 4)
        for attempt in range(150):
            generation = llm.submit(prompt_of(1), max_tokens=4)
            time.sleep(attempt * 2e-5)
            generation.cancel()
            try:
                completion = generation.result(5)
                assert completion.tokens == expected
                endings.add("finished")
            except RequestCancelled as error:
                assert error.completion is not None
                assert error.completion.tokens == expected[: len(error.completion.tokens)]
                endings.add("cancelled")
            assert generation.done
    assert "cancelled" in endings


def test_cancel_after_the_end_changes_nothing() -> None:
    model = Hooked()
    with opened(model) as llm:
        generation = llm.submit(prompt_of(1), max_tokens=4)
        first = generation.result()
        generation.cancel()
        assert generation.result() == first and first.finish_reason == "length"


def test_a_lost_cancel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt that lands in a finalizer can swallow its cancel; the engine notices that nobody can read."""
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.02)
    model = Hooked(delay=0.001)
    with opened(model) as llm, monkeypatch.context() as lost:
        lost.setattr(worker.Worker, "cancel", lambda self, request_id: None)
        generation = llm.submit(prompt_of(1), max_tokens=LONG)
        next(iter(generation))
        del generation
        until(lambda: llm.stats().num_requests_running == 0, 0.5)  # LONG takes longer
        kept = llm.stream(prompt_of(1), max_tokens=LONG)
        for _ in kept:
            break
        until(lambda: llm.stats().num_requests_running == 0, 0.5)
        assert len(kept.tokens) < LONG


# ---- close ------------------------------------------------------------------------------------------------------


def test_close_ends_waits_in_other_threads() -> None:
    model = Hooked(delay=0.001)
    seen: list[object] = []

    def wait(number: int) -> None:
        try:
            seen.append(llm.generate(prompt_of(number), max_tokens=LONG))
        except RequestCancelled as error:
            seen.append(error.completion)

    with opened(model) as llm:
        threads = [threading.Thread(target=wait, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        until(lambda: len(engine_of(llm).scheduler.running) == 8)
        began = time.monotonic()
        llm.close()
        for thread in threads:
            thread.join(2)
        assert time.monotonic() - began < 2
        assert len(seen) == 8 and all(isinstance(one, embedllm.Completion) for one in seen)
        llm.close()
        with pytest.raises(EngineClosed):
            llm.generate(prompt_of(1))


def test_close_of_one_handle_leaves_the_others() -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        other = embedllm.LLM(model, num_kv_blocks=512, block_size=4, max_batch_tokens=64)
        assert other._core is llm._core
        mine, its = llm.submit(prompt_of(1), max_tokens=30), other.submit(prompt_of(2), max_tokens=LONG)
        other.close()
        with pytest.raises(RequestCancelled):
            its.result(5)
        assert mine.result(5).tokens == model.expected(prompt_of(1), 30)
        assert not model.closed


def test_failure_and_cancel_at_once() -> None:
    """A request that fails while it is being cancelled ends once."""
    model, inside, go_on = Hooked(), threading.Event(), threading.Event()

    def fail(plan: object) -> None:
        inside.set()
        assert go_on.wait(5)
        raise RuntimeError("no")

    with opened(model) as llm:
        model.before = fail
        generation = llm.submit(prompt_of(1), max_tokens=5)
        assert inside.wait(5)
        generation.cancel()
        go_on.set()
        with pytest.raises((RequestCancelled, RequestFailed)):
            generation.result(5)
        model.before = lambda plan: None
        right(llm, model)


# ---- interrupts -------------------------------------------------------------------------------------------------


def run_interrupts(kind: str, count: int) -> str:
    here = Path(__file__)
    done = subprocess.run(
        [sys.executable, str(here.with_name("interrupts.py")), kind, str(count), "7"],
        cwd=here.parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels"])},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return done.stdout


COUNT = int(os.environ.get("EMBEDLLM_INTERRUPTS", "100"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["point", "time"])
def test_keyboard_interrupt_at_random_points(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At 100 of the places where Python looks for signals, and at 100 moments: all is back, and the next is right."""
    told = run_interrupts(kind, COUNT)
    assert f"{COUNT}/{COUNT}" in told
    with capsys.disabled():
        print("\n" + told.strip().splitlines()[-1])
