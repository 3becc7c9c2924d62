"""Raises KeyboardInterrupt in the main thread at random points of everyday code, and looks what is left. A program.

    python tests/engine/interrupts.py point|time COUNT SEED

It is SIGINT. point: at a random one of all the places where Python looks for signals (where a function begins, and
where a C function has returned), in whatever module or finalizer. time: at a random moment.
After each: the request is gone within one step, no thread is left behind, and the next request is right.
"""

import asyncio
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import embedllm
from embedllm import worker
from tests.engine.hooked import Hooked, engine_of, opened, prompt_of

worker.SWEEP_SECONDS = 0.02  # a cancel that an interrupt swallowed is found this fast; how often is counted
TOKENS = 12


def generate_one(llm: embedllm.LLM) -> object:
    return llm.generate(prompt_of(1), max_tokens=TOKENS)


def generate_list(llm: embedllm.LLM) -> object:
    return llm.generate([prompt_of(number) for number in range(4)], max_tokens=TOKENS)


def read_a_stream(llm: embedllm.LLM) -> object:
    return ["".join(str(delta.tokens)) for delta in llm.stream(prompt_of(2), max_tokens=TOKENS, n=2)]


def leave_a_stream(llm: embedllm.LLM) -> None:
    for delta in llm.stream(prompt_of(2), max_tokens=400):
        if delta.index == 0:
            break


def wait_for_a_background_request(llm: embedllm.LLM) -> object:
    return llm.submit(prompt_of(3), max_tokens=TOKENS).result(timeout=10)


def drop_a_background_request(llm: embedllm.LLM) -> None:
    generation = llm.submit(prompt_of(3), max_tokens=400)
    generation.text  # noqa: B018
    del generation


def await_one(llm: embedllm.LLM) -> None:
    async def main() -> None:
        await llm.submit(prompt_of(4), max_tokens=TOKENS)
        async for _ in llm.stream(prompt_of(4), max_tokens=TOKENS):
            pass

    asyncio.run(main())


def look(llm: embedllm.LLM) -> None:
    llm.stats()
    llm.cache.explain(prompt_of(1))
    with llm.cache.pin(prompt_of(5, 24)):
        pass


def open_and_close(llm: embedllm.LLM) -> None:
    """Another engine, and another handle on the one there is."""
    with embedllm.LLM(Hooked(), num_kv_blocks=64) as other:
        other.generate([1, 2, 3], max_tokens=3)
    embedllm.LLM(llm_model, **OPTIONS).close()


SCENES = [
    generate_one,
    generate_list,
    read_a_stream,
    leave_a_stream,
    wait_for_a_background_request,
    drop_a_background_request,
    await_one,
    look,
    open_and_close,
]
OPTIONS: dict[str, Any] = {"num_kv_blocks": 512, "block_size": 4, "max_batch_tokens": 64}
llm_model = Hooked(delay=0.0003)


class Points:
    """Counts the places where this thread looks for signals, and interrupts it at one of them."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return"):
            self.count += 1
            if self.count == self.at:
                signal.raise_signal(signal.SIGINT)

    def run(self, scene: Callable[[embedllm.LLM], object], llm: embedllm.LLM) -> None:
        sys.setprofile(self)
        try:
            scene(llm)
        finally:
            sys.setprofile(None)


def at_a_point(scene: Callable[[embedllm.LLM], object], llm: embedllm.LLM, rng: random.Random) -> None:
    Points(rng.randint(1, num_points[scene])).run(scene, llm)


def at_a_time(scene: Callable[[embedllm.LLM], object], llm: embedllm.LLM, rng: random.Random) -> None:
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, seconds[scene]))
    try:
        scene(llm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def settle(llm: embedllm.LLM) -> bool:
    """Whether the requests were gone at once; they must be gone soon."""
    at_once = llm.stats().num_requests_running == llm.stats().num_requests_waiting == 0
    if not at_once:
        gc.collect()  # asyncio.run leaves its task in a cycle of exception and frame
    deadline = time.monotonic() + 2
    engine = engine_of(llm)
    while engine._live or engine.scheduler.pool.num_used or num_running() > num_threads:
        if time.monotonic() > deadline:
            raise AssertionError(f"left behind: {engine._live} {engine.pins.references} {threading.enumerate()}")
        for pin in list(engine.pins.held):  # the interrupt came between pin() and its with block
            llm._core.worker.call(lambda engine, pin=pin: engine.pins.remove(pin))  # type: ignore[union-attr]
        time.sleep(0.002)
    return at_once


def num_running() -> int:
    """Threads that run. An interrupt within Thread.start can leave one that never gets to."""
    return sum(thread.is_alive() for thread in threading.enumerate())


def main(kind: str, count: int, seed: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background leaves it ignored
    rng = random.Random(seed)
    at_once = interrupted = 0
    with opened(llm_model, **OPTIONS) as llm:
        for scene in SCENES:
            scene(llm)
            points = Points(0)
            points.run(scene, llm)
            num_points[scene] = points.count
            began = time.monotonic()
            scene(llm)
            seconds[scene] = time.monotonic() - began
        global num_threads
        num_threads = num_running()
        for turn in range(count):
            scene = SCENES[turn % len(SCENES)]
            signal.signal(signal.SIGINT, signal.default_int_handler)  # an interrupted asyncio.run may leave its own
            try:
                (at_a_point if kind == "point" else at_a_time)(scene, llm, rng)
            except (KeyboardInterrupt, asyncio.CancelledError):  # asyncio.run makes one of the other, not always back
                interrupted += 1
            except Exception as error:
                # Python's own: loops and tasks interrupted half made; an Event that finds its lock let go already.
                if scene is not await_one and not isinstance(error.__context__, KeyboardInterrupt):
                    raise
                interrupted += 1
            at_once += settle(llm)
            number = turn % 50
            tokens = llm.generate(prompt_of(number), max_tokens=5).tokens
            assert tokens == llm_model.expected(prompt_of(number), 5), (scene, turn)
            assert embedllm.LLM(llm_model, **OPTIONS)._core is llm._core
        assert llm.stats().num_step_faults == 0
    assert interrupted > count // 2, f"only {interrupted} interrupts arrived"
    print(f"{kind}: {interrupted} of {count} interrupts raised, blocks back at once {at_once}, right {count}/{count}")


num_points: dict[Callable[[embedllm.LLM], object], int] = {}
seconds: dict[Callable[[embedllm.LLM], object], float] = {}
num_threads = 0

if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    if sys.version_info < (3, 11):  # from then on asyncio.run makes an interrupt a cancelled task
        SCENES.remove(await_one)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
