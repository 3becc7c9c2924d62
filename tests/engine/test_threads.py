"""Any thread and any event loop, all at once: every answer is its own oracle's."""

import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import embedllm
from embedllm.errors import InvalidRequest, RequestCancelled
from embedllm.testing import ByteTokenizer
from tests.engine.hooked import LONG, Hooked, engine_of, opened, prompt_of, until

THREADS, CALLS, TASKS = 64, 50, 64
BYTES = 259


def one_call(llm: embedllm.LLM, model: Hooked, rng: random.Random) -> None:
    """One request in one of the ways there are, checked against its own oracle: tokens and text."""
    prompt = [rng.randrange(256) for _ in range(rng.randint(1, 12))]
    most = rng.randint(1, 10)
    expected = model.expected(prompt, most)
    text = ByteTokenizer().decode(expected)
    way = rng.randrange(4)
    if way == 0:
        completion = llm.generate(prompt, max_tokens=most)
        assert (completion.tokens, completion.text) == (expected, text)
    elif way == 1:
        deltas = list(llm.stream(prompt, max_tokens=most))
        assert [token for delta in deltas for token in delta.tokens] == expected
        assert "".join(delta.text for delta in deltas) == text
    elif way == 2:
        assert llm.submit(prompt, max_tokens=most).result(60).tokens == expected
    else:
        both = llm.generate([prompt, prompt[::-1]], max_tokens=most)
        assert both[0].tokens == expected
        assert both[1].tokens == model.expected(prompt[::-1], most)


async def one_task(llm: embedllm.LLM, model: Hooked, number: int) -> None:
    rng = random.Random(1_000 + number)
    for _ in range(4):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, 12))]
        expected = model.expected(prompt, 5)
        if rng.random() < 0.5:
            assert (await llm.submit(prompt, max_tokens=5)).tokens == expected
        else:
            assert [t async for d in llm.stream(prompt, max_tokens=5) for t in d.tokens] == expected


@pytest.mark.slow
def test_64_threads_of_50_calls_and_64_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    model = Hooked(vocab_size=BYTES, eos_every=30)
    with opened(model, tokenizer=ByteTokenizer(), num_kv_blocks=128, block_size=1, max_num_seqs=48) as llm:
        engine_of(llm)._debug = False  # recounting every step is for smaller worlds

        def calls(number: int) -> None:
            rng = random.Random(number)
            for _ in range(CALLS):
                one_call(llm, model, rng)

        async def tasks() -> None:
            await asyncio.gather(*(one_task(llm, model, number) for number in range(TASKS)))

        began = time.monotonic()
        with ThreadPoolExecutor(THREADS + 1) as pool:
            futures = [pool.submit(calls, number) for number in range(THREADS)]
            futures.append(pool.submit(asyncio.run, tasks()))
            for future in futures:
                future.result(110)
        stats = llm.stats()
        assert stats.num_step_faults == 0
        assert stats.num_preemptions > 0 and stats.prefix_cache_hits > 0  # it was no easy ride
        total = sum(stats.request_finished.values())
        assert total >= THREADS * CALLS + TASKS * 4
    with capsys.disabled():
        print(
            f"\n{total} requests from {THREADS} threads and {TASKS} tasks, 0 errors, {time.monotonic() - began:.1f} s"
        )


def test_a_life_of_many_threads_that_do_everything() -> None:
    """Twelve threads submit, read, leave, drop, cancel, look, pin and reopen, and switch after every few bytecodes."""
    model = Hooked()
    options = {"num_kv_blocks": 512, "block_size": 4, "max_batch_tokens": 64}
    wrong: list[BaseException] = []

    def live(llm: embedllm.LLM, number: int) -> None:
        rng = random.Random(number)
        kept: list[embedllm.Generation] = []
        for _ in range(25):
            prompt, act = prompt_of(rng.randrange(8), rng.randrange(1, 20)), rng.randrange(9)
            expected = model.expected(prompt, 6)
            if act <= 1:
                assert llm.generate(prompt, max_tokens=6).tokens == expected
            elif act == 2:
                kept.append(llm.submit(prompt, max_tokens=6))
            elif act == 3:
                for _delta in llm.stream(prompt, max_tokens=LONG):
                    break
            elif act == 4:
                llm.submit(prompt, max_tokens=LONG)
            elif act == 5:
                generation = llm.stream(prompt, max_tokens=LONG, n=2)
                generation.cancel()
                with contextlib.suppress(RequestCancelled):
                    generation.result(10)
            elif act == 6:
                llm.stats()
                llm.cache.explain(prompt)
            elif act == 7:
                with contextlib.suppress(InvalidRequest), llm.cache.pin(prompt):
                    pass
            else:
                with embedllm.LLM(model, **options) as again:  # type: ignore[arg-type]
                    assert again._core is llm._core
                    assert again.generate(prompt, max_tokens=6).tokens == expected
            if kept and rng.random() < 0.4:
                one = kept.pop()
                assert one.result(10).tokens == model.expected(one.prompt_tokens, 6)

    def run(llm: embedllm.LLM, number: int) -> None:
        try:
            live(llm, number)
        except BaseException as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with opened(model) as llm:
            threads = [threading.Thread(target=run, args=(llm, number)) for number in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert not wrong, wrong
            assert llm.stats().num_step_faults == 0
            del threads
            gc.collect()
    finally:
        sys.setswitchinterval(interval)


def test_every_way_of_reading_gives_the_same() -> None:
    """One request, many readers: threads, tasks, late and early, each replaying from the first token."""
    model = Hooked(delay=0.001)
    expected = model.expected(prompt_of(1), 40)
    with opened(model) as llm:
        generation = llm.submit(prompt_of(1), max_tokens=40)
        found: list[list[int]] = []

        def read() -> None:
            found.append([token for delta in generation for token in delta.tokens])

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()

        async def read_async() -> list[int]:
            return [token async for delta in generation for token in delta.tokens]

        async def main() -> list[list[int]]:
            return await asyncio.gather(*(read_async() for _ in range(8)))

        found += asyncio.run(main())
        for thread in threads:
            thread.join(10)
        read()
        assert found == [expected] * 17
        assert generation.result().tokens == generation.tokens == expected


def test_inside_a_running_loop() -> None:
    """Blocking calls in a coroutine, as in a notebook cell, without nest_asyncio; the loop's own tasks go on after."""
    model = Hooked()
    with opened(model) as llm:

        async def main() -> None:
            assert llm.generate(prompt_of(1), max_tokens=5).tokens == model.expected(prompt_of(1), 5)
            assert [t for d in llm.stream(prompt_of(2), max_tokens=5) for t in d.tokens] == model.expected(
                prompt_of(2), 5
            )
            assert (await llm.submit(prompt_of(3), max_tokens=5)).tokens == model.expected(prompt_of(3), 5)

        asyncio.run(main())


def test_many_loops_at_once() -> None:
    """A request may be read in loops that know nothing of each other, and outlive the one it came from."""
    model = Hooked(delay=0.0005)
    with opened(model) as llm:

        async def begin() -> embedllm.Generation:
            generation = llm.submit(prompt_of(1), max_tokens=60)
            async for _ in generation:
                break
            return generation

        async def finish(generation: embedllm.Generation) -> list[int]:
            return (await generation).tokens

        generation = asyncio.run(begin())
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: asyncio.run(finish(generation)), range(4)))
        assert found == [model.expected(prompt_of(1), 60)] * 4


def test_gather_and_as_completed_take_handles() -> None:
    model = Hooked()
    with opened(model) as llm:

        async def main() -> None:
            handles = [llm.submit(prompt_of(n), max_tokens=5) for n in range(4)]
            completions = await asyncio.gather(*handles)
            assert [c.tokens for c in completions] == [model.expected(prompt_of(n), 5) for n in range(4)]
            streams = [llm.stream(prompt_of(n), max_tokens=5) for n in range(4)]
            assert {tuple((await c).tokens) for c in asyncio.as_completed(streams)} == {
                tuple(model.expected(prompt_of(n), 5)) for n in range(4)
            }

        asyncio.run(main())


def test_a_slow_reader_slows_nobody() -> None:
    """Deltas merge: a reader that comes late gets one large delta, and the engine never waited for it."""
    model = Hooked()
    with opened(model) as llm:
        slow = llm.stream(prompt_of(1), max_tokens=200)
        cursor = iter(slow)
        first = next(cursor)
        fast = llm.generate(prompt_of(2), max_tokens=300)
        assert fast.tokens == model.expected(prompt_of(2), 300)
        until(lambda: slow.done)
        second = next(cursor)
        assert first.tokens + second.tokens == model.expected(prompt_of(1), 200)
        assert second.finish_reason == "length" and next(cursor, None) is None


def test_submit_from_the_engines_own_thread() -> None:
    """A callback may submit: that does not wait."""
    model = Hooked()
    inner: list[embedllm.Generation] = []

    with opened(model) as llm:

        def processor(prompt: list[int], output: list[int], logits: object) -> object:
            if not inner:
                inner.append(llm.submit(prompt_of(2), max_tokens=5))
            return logits

        outer = llm.generate(prompt_of(1), max_tokens=5, logits_processor=processor)
        assert outer.tokens == model.expected(prompt_of(1), 5)
        assert inner[0].result(5).tokens == model.expected(prompt_of(2), 5)


LOOPS = """
import asyncio, sys
from tests.engine.hooked import Hooked, opened, prompt_of
kind = sys.argv[1]
model = Hooked(delay=0.0005)

async def one(llm, number):
    expected = model.expected(prompt_of(number), 8)
    assert (await llm.submit(prompt_of(number), max_tokens=8)).tokens == expected
    assert [t async for d in llm.stream(prompt_of(number), max_tokens=8) for t in d.tokens] == expected
    assert llm.generate(prompt_of(number), max_tokens=8).tokens == expected

async def main(llm):
    await asyncio.gather(*(one(llm, number) for number in range(16)))
    task = asyncio.ensure_future(one(llm, 1))
    await asyncio.sleep(0.002)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    if kind.startswith("nest"):  # a loop inside the running one, with a stream half read outside
        cursor = llm.stream(prompt_of(3), max_tokens=30).__aiter__()
        await cursor.__anext__()
        asyncio.get_event_loop().run_until_complete(one(llm, 5))
        asyncio.run(one(llm, 6))
        await cursor.__anext__()

def run(llm):
    if kind == "uvloop":
        import uvloop
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert type(runner.get_loop()).__module__.startswith("uvloop")
            runner.run(main(llm))
    else:
        asyncio.run(main(llm))

if kind == "nest before":
    import nest_asyncio
    nest_asyncio.apply()
with opened(model) as llm:
    if kind == "nest after":
        import nest_asyncio
        llm.generate(prompt_of(0), max_tokens=3)
        nest_asyncio.apply()
    for _ in range(3):
        run(llm)
    assert llm.stats().num_step_faults == 0
print("ok")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nest before", "nest after", "uvloop"])
def test_under_other_loops(kind: str) -> None:
    """nest_asyncio patches every loop of the process, also the engine's; uvloop is another loop altogether."""
    pytest.importorskip("nest_asyncio" if kind.startswith("nest") else "uvloop", reason="in the dev extra")
    if kind == "uvloop" and sys.version_info < (3, 11):
        pytest.skip("asyncio.Runner came with Python 3.11")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LOOPS, kind],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels"])},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ok"), done.stdout + done.stderr
    assert done.stderr == ""
