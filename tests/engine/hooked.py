"""A HashLM that can be told to fail, hang or spoil its logits, and what every reliability test asks of an LLM after it.

The engines made here recount themselves after every step, and freed blocks are overwritten: a bystander that reads what
it should not says something else than its oracle.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import embedllm
from embedllm.config import Limits
from embedllm.engine import Engine
from embedllm.plan_types import Plan
from embedllm.runner import ModelOutput
from embedllm.testing import HashLM, HashRunner

VOCAB = 97
LONG = 1_500  # tokens nobody in these tests lives to see
torch.set_num_threads(1)


class Hooked(HashLM):
    """before(plan) runs ahead of each step, after(plan, output) behind it; both on the engine's thread.

    num_steps: steps run. delay: seconds each takes.
    """

    def __init__(self, *, delay: float = 0.0, eos_every: int = 0, vocab_size: int = VOCAB) -> None:
        super().__init__(vocab_size, eos_every)
        self.before: Callable[[Plan], object] = lambda plan: None
        self.after: Callable[[Plan, ModelOutput], object] = lambda plan, output: None
        self.delay = delay
        self.num_steps = 0
        self.closed = False

    def runner(self, limits: Limits) -> "HookedRunner":
        return HookedRunner(self, limits)


class HookedRunner(HashRunner):
    depth = int(os.environ.get("EMBEDLLM_TEST_DEPTH", "1"))  # steps in flight

    def __init__(self, model: Hooked, limits: Limits) -> None:
        super().__init__(model, limits)
        self.model = model

    def __call__(self, plan: Plan, between_layers: Callable[[], None] | None = None) -> ModelOutput:
        self.model.num_steps += 1
        time.sleep(self.model.delay)
        self.model.before(plan)
        output = super().__call__(plan, between_layers)
        self.model.after(plan, output)
        return output

    def close(self) -> None:
        self.model.closed = True


@contextmanager
def opened(model: HashLM | None = None, **options: Any) -> Iterator[embedllm.LLM]:
    """An LLM that checks itself, and has poison in every block that nobody holds. Ends idle, with nothing lost."""
    model = model or Hooked()
    options = {"num_kv_blocks": 512, "block_size": 4, "max_batch_tokens": 64} | options
    with embedllm.LLM(model, **options) as llm:
        engine = engine_of(llm)
        engine._debug = True
        engine.attach(engine._run.memory)  # type: ignore[attr-defined]
        yield llm
        if not llm.closed and llm._core is not None and llm._core.worker.alive:
            assert_idle(llm)


def engine_of(llm: embedllm.LLM) -> Engine:
    """The engine itself. Only look at it from here."""
    assert llm._core is not None
    return llm._core.worker._engine


def prompt_of(number: int, length: int = 6) -> list[int]:
    """A prompt that differs from every other number's in its first token and in the rest."""
    return [(number * 31 + 7 * i * (number + 1) + i) % (VOCAB - 2) for i in range(length)]


def right(llm: embedllm.LLM, model: HashLM, number: int = 0, max_tokens: int = 6) -> None:
    """The next request is what it should be."""
    prompt = prompt_of(number)
    assert llm.generate(prompt, max_tokens=max_tokens).tokens == model.expected(prompt, max_tokens)


def assert_idle(llm: embedllm.LLM) -> None:
    """Nobody is in the engine and every block is back, as of the step that may be running."""
    stats = llm.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.num_requests_parked) == (0, 0, 0)
    assert stats.kv_cache_usage == 0.0, "a block is lost"
    engine = engine_of(llm)
    assert not engine._live and not engine._samples
    until(lambda: llm._core is not None and not llm._core.worker._channels)  # the last words are said a step later


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something that other threads bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


async def until_async(condition: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)
