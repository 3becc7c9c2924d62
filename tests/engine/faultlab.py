"""An engine without threads, a workload with its oracle, and faults that strike at the n-th call of some function."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from embedllm.config import Limits
from embedllm.engine import Engine
from embedllm.errors import EngineDead
from embedllm.invariants import check_idle
from embedllm.params import SamplingParams
from embedllm.request import Ended, Request
from embedllm.testing import ByteTokenizer
from tests.engine.hooked import Hooked, HookedRunner, prompt_of

LIMITS = Limits(
    block_size=4,
    num_blocks=96,
    max_model_len=256,
    max_num_seqs=8,
    max_batch_tokens=24,
    vocab_size=259,
    num_input_ids=259,
)


class Injected(RuntimeError):
    """What an armed fault raises."""


@dataclass
class Fault:
    """Strikes at call number `first` of what it wraps, `times` times in a row (None: from then on), late or early."""

    first: int = 1
    times: int | None = 1
    late: bool = False  # after the wrapped function has done its work
    error: Callable[[], BaseException] = Injected
    num_calls: int = 0
    num_struck: int = 0
    armed: bool = True

    def wrap(self, holder: Any, name: str) -> "Fault":
        original = getattr(holder, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            strikes = self._strikes()
            if strikes and not self.late:
                raise self.error()
            result = original(*args, **kwargs)
            if strikes:
                raise self.error()
            return result

        setattr(holder, name, wrapped)
        return self

    def _strikes(self) -> bool:
        if not self.armed:
            return False
        self.num_calls += 1
        strikes = self.num_calls >= self.first and (self.times is None or self.num_calls < self.first + self.times)
        self.num_struck += strikes
        return strikes


@dataclass(eq=False)
class Told:
    """What a request said: tokens and text per sample, and how it ended."""

    prompt: list[int]
    max_tokens: int
    num_samples: int = 1
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ended: Ended | None = None


class Lab:
    """Submit, step to the end, compare with the oracle."""

    def __init__(self, limits: Limits = LIMITS, depth: int = HookedRunner.depth) -> None:
        self.model = Hooked(vocab_size=limits.vocab_size, eos_every=40)
        self.runner = HookedRunner(self.model, limits)
        self.tokenizer = ByteTokenizer()
        self.engine = Engine(
            self.runner,
            limits,
            tokenizer=self.tokenizer,
            eos_ids=self.model.eos_ids,
            depth=depth,
            debug=True,
        )
        self.engine.attach(self.runner.memory)
        self.told: list[Told] = []
        self.dead: EngineDead | None = None

    def submit(self, prompt: list[int], max_tokens: int = 10, **params: Any) -> Told:
        told = Told(prompt, max_tokens, params.get("n", 1))
        told.tokens, told.texts = [[] for _ in range(told.num_samples)], [""] * told.num_samples
        number = len(self.told)
        self.told.append(told)
        chosen = SamplingParams(max_tokens=max_tokens, **params)
        self._guarded(lambda: self.engine.submit(Request(number, prompt, chosen, max_tokens, 0, time.monotonic())))
        return told

    def workload(self) -> None:
        """Chunked prompts, shared prefixes, forks with a copied tail, prompt log-probabilities, different lengths."""
        self.submit(prompt_of(1, 30), 8)
        self.submit(prompt_of(2, 6), 12, n=3)
        self.submit(prompt_of(1, 30), 5, prompt_logprobs=1)
        self.submit(prompt_of(3, 9), 14, logprobs=2)
        self.submit(prompt_of(4, 3), 3, repetition_penalty=1.0001)

    def _guarded(self, act: Callable[[], object]) -> None:
        """As the worker does between two steps."""
        try:
            try:
                act()
            except EngineDead:
                raise
            except Exception as error:
                self.engine.start_over(error)
        except EngineDead as dead:
            self.dead = dead
            self.hear(self.engine.end_all(dead))

    def cancel(self, told: Told) -> None:
        self._guarded(lambda: self.engine.cancel(self.told.index(told)))

    def step(self) -> None:
        self._guarded(lambda: self.hear(self.engine.step()))

    def hear(self, output: Any) -> None:
        for update in output.updates:
            told = self.told[update.request_id]
            assert told.ended is None, "it speaks after its end"
            told.tokens[update.index] += update.tokens
            told.texts[update.index] += update.said.text
        for ended in output.ended:
            told = self.told[ended.request_id]
            assert told.ended is None, "it ended twice"
            told.ended = ended

    def run(self, most: int = 400) -> None:
        for _ in range(most):
            if self.dead is not None or not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it goes on for ever")

    def error_of(self, told: Told) -> BaseException | None:
        assert told.ended is not None, "a request was forgotten"
        return told.ended.error

    def check(self, allowed: Callable[[Told], bool] = lambda told: False) -> list[Told]:
        """Everybody ended once; whoever was not `allowed` to fail is right to the last token. Returns who failed."""
        failed = []
        for told in self.told:
            expected = self.model.expected(told.prompt, told.max_tokens)
            if self.error_of(told) is None:
                assert told.tokens == [expected] * told.num_samples
                assert told.texts == [self.tokenizer.decode(expected)] * told.num_samples
                continue
            assert allowed(told), f"a bystander was hurt: {self.error_of(told)!r}"
            failed.append(told)
            assert all(tokens == expected[: len(tokens)] for tokens in told.tokens)
        return failed

    def check_alive(self) -> None:
        """The engine works, holds nothing, and is right."""
        assert self.dead is None
        check_idle(self.engine.scheduler)
        assert not self.engine._live and not self.engine._samples
        before = len(self.told)
        self.workload()
        self.run()
        check_idle(self.engine.scheduler)
        assert all(self.error_of(told) is None for told in self.told[before:])
        self.check(lambda told: self.told.index(told) < before)
