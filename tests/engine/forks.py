"""What a forked child finds of its parent's engine. A program, so that no test process is forked."""

import asyncio
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import embedllm
from embedllm.errors import EngineForked
from tests.engine.hooked import LONG, Hooked, opened, prompt_of


async def read(generation: embedllm.Generation) -> None:
    async for _ in generation:
        pass


def in_child(act: Callable[[], object]) -> None:
    """Run it in a forked child, which ends as an interpreter does; it must end well."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            code = 0
        except BaseException as error:
            print(f"in the child: {error!r}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def told(call: Callable[[], object]) -> None:
    """It is refused at once, and says why."""
    began = time.monotonic()
    try:
        call()
    except EngineForked as error:
        assert "fork" in str(error)
        assert time.monotonic() - began < 0.5
    else:
        raise AssertionError("it was not refused")


class Prompts(Dataset[torch.Tensor]):
    def __init__(self, llm: embedllm.LLM) -> None:
        self.llm = llm  # a reference that the workers inherit and leave alone

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(prompt_of(index))


def square(number: int) -> int:
    return number * number


def main() -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        done = llm.submit(prompt_of(1), max_tokens=5)
        done.result()
        running = llm.submit(prompt_of(2), max_tokens=100)
        stream = llm.stream(prompt_of(3), max_tokens=LONG)
        cursor = iter(stream)
        next(cursor)
        pin = llm.cache.pin(prompt_of(4, 20))

        def child() -> None:
            told(lambda: llm.generate(prompt_of(1)))
            told(lambda: llm.generate([prompt_of(1)]))
            told(lambda: llm.submit(prompt_of(1)))
            told(lambda: llm.stream(prompt_of(1)))
            told(llm.stats)
            told(llm.cache.reset)
            told(lambda: llm.cache.explain(prompt_of(1)))
            told(llm.trace)
            told(lambda: running.result())
            told(lambda: list(running))
            told(lambda: asyncio.run(read(running)))
            told(lambda: asyncio.run(running._wait()))
            told(lambda: next(cursor))
            told(pin.unpin)
            # What needs no engine works, and nothing waits or raises on the way out.
            assert done.result().tokens == model.expected(prompt_of(1), 5)
            assert [t for d in done for t in d.tokens] == model.expected(prompt_of(1), 5)
            assert asyncio.run(done._wait()).tokens == done.tokens
            assert llm.info.model == "hash-lm"
            running.cancel()
            began = time.monotonic()
            llm.close()
            assert time.monotonic() - began < 0.5

        def grandchild_with_its_own() -> None:
            own = Hooked()
            with embedllm.LLM(own) as mine:  # the way out that the error names
                assert mine.generate(prompt_of(5), max_tokens=5).tokens == own.expected(prompt_of(5), 5)
            with embedllm.LLM(model, num_kv_blocks=512, block_size=4, max_batch_tokens=64) as same:
                assert same.generate(prompt_of(5), max_tokens=5).tokens == model.expected(prompt_of(5), 5)

        def drop_everything() -> None:
            nonlocal llm, done, running, stream, cursor, pin
            del llm, done, running, stream, cursor, pin

        in_child(child)
        in_child(grandchild_with_its_own)
        in_child(lambda: in_child(child))
        in_child(drop_everything)
        # The parent's own never noticed.
        assert running.result(10).tokens == model.expected(prompt_of(2), 100)
        assert next(cursor).tokens
        cursor.close()
        pin.unpin()

        kept: Any = llm.submit(prompt_of(6), max_tokens=200)
        loader = DataLoader(Prompts(llm), batch_size=3, num_workers=2, multiprocessing_context="fork")
        for batch in loader:
            prompts = batch.tolist()
            answers = llm.generate(prompts, max_tokens=5)
            assert [answer.tokens for answer in answers] == [model.expected(prompt, 5) for prompt in prompts]
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(square, range(8)) == [number * number for number in range(8)]
        assert kept.result(10).tokens == model.expected(prompt_of(6), 200)
        assert llm.stats().num_step_faults == 0
    print("ok")


if __name__ == "__main__":
    main()
