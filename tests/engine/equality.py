"""Runs prompts through the real engine, step by step, and judges its tokens by transformers' own.

The engine is driven directly, without its thread, so that arrivals and cancels fall where the seed says. The rule:
tokens are equal, or at the first difference transformers itself is undecided: teacher-forced, its best logit leads the
one chosen here by at most 1e-4 of the logits' scale. Such ties are counted.
"""

import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from embedllm.config import Limits
from embedllm.engine import Engine
from embedllm.kv_cache import KVCache
from embedllm.models.hub import resolve
from embedllm.models.load import Loaded, load
from embedllm.params import SamplingParams
from embedllm.plan_types import UNKNOWN, Plan
from embedllm.request import Request
from embedllm.runner import ModelOutput, Runner
from tests.engine import tiny_models

TIE = 1e-4
Prompts = list[list[int]]


@functools.cache
def loaded(name: str) -> Loaded:
    """Our side of a tiny model, in float32."""
    return load(
        resolve(tiny_models.folder(name)), dtype="float32", max_model_len=tiny_models.RECIPES[name].max_model_len
    )


@dataclass
class Bench:
    """One engine over one model, counting what happened."""

    name: str
    limits: Limits
    depth: int = 1  # steps in flight
    unwritten: float = math.nan  # what is read must have been written
    num_chunks: int = 0  # entries that ended inside known tokens
    num_ahead: int = 0  # steps launched before the one before them was read
    most_entries: int = 0
    most_tokens: int = 0
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.model = loaded(self.name)
        size = {"vocab_size": self.model.vocab_size, "num_input_ids": self.model.num_input_ids}
        self.limits = dataclasses.replace(self.limits, **size)
        self.kv = KVCache(self.model.kv_group, self.limits.num_blocks, self.limits.block_size)
        self.kv.blocks.fill_(self.unwritten)
        self._runner = Runner(self.model, self.kv, self.limits.max_num_seqs)
        self.remember = self._runner.remember
        self.engine = Engine(self, self.limits, depth=self.depth, debug=True)

    def __call__(self, plan: Plan, *between_layers: Any) -> ModelOutput:
        self.num_chunks += sum(entry.num_logits == 0 for entry in plan.entries)
        self.num_ahead += any(UNKNOWN in entry.tokens for entry in plan.entries)
        self.most_entries = max(self.most_entries, len(plan.entries))
        self.most_tokens = max(self.most_tokens, plan.num_tokens)
        return self._runner(plan, *between_layers)

    def submit(self, prompt: list[int], num_tokens: int) -> int:
        number = len(self.outputs)
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self.outputs[number] = []
        self.engine.submit(Request(number, prompt, params, num_tokens, 0, time.monotonic()))
        return number

    def step(self) -> None:
        output = self.engine.step()
        for update in output.updates:
            self.outputs[update.request_id] += update.tokens
        for ended in output.ended:
            assert ended.error is None or ended.request_id in self.ended, ended.error
            self.ended.add(ended.request_id)

    def cancel(self, number: int) -> None:
        self.ended.add(number)
        self.engine.cancel(number)

    def run_together(self, prompts: Prompts, num_tokens: int) -> list[list[int]]:
        """All at once, to the end."""
        numbers = [self.submit(prompt, num_tokens) for prompt in prompts]
        while self.engine.has_work:
            self.step()
        return [self.outputs[number] for number in numbers]

    def run_staggered(self, prompts: Prompts, num_tokens: int, rng: random.Random) -> list[list[int]]:
        """Arriving over many steps, with victims between that are cancelled in whatever state they are."""
        numbers: list[int] = []
        victims: list[int] = []
        waiting = list(prompts)
        while waiting or self.engine.has_work:
            while waiting and rng.random() < 0.5:
                numbers.append(self.submit(waiting.pop(0), num_tokens))
                if rng.random() < 0.3:
                    victims.append(self.submit(rng.choice(prompts), num_tokens))
            if victims and rng.random() < 0.3:
                self.cancel(victims.pop(rng.randrange(len(victims))))
            self.step()
        return [self.outputs[number] for number in numbers]


@dataclass
class Verdict:
    """How a list of answers compares with transformers'."""

    num_requests: int = 0
    ties: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def judge(name: str, prompts: Prompts, answers: list[list[int]], num_tokens: int) -> Verdict:
    """Compare with transformers.generate, token by token."""
    expected = tiny_models.generate(name, prompts, num_tokens)
    verdict = Verdict(len(prompts))
    for prompt, ours, theirs in zip(prompts, answers, expected, strict=True):
        assert len(ours) == num_tokens
        if ours == theirs:
            continue
        at = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        logits = tiny_models.teacher_forced(name, prompt + theirs[:at])[-1]
        gap = (logits[theirs[at]] - logits[ours[at]]).item() / logits.abs().max().item()
        told = f"{name}: {len(prompt)} prompt tokens, differs at token {at}: gap {gap:.1e} of the scale"
        (verdict.ties if abs(gap) <= TIE else verdict.wrong).append(told)
    return verdict


def alone(
    name: str,
    prompt: list[int],
    num_tokens: int,
    *,
    block_size: int = 4,
    disturb: Callable[[Bench, Plan], None] | None = None,
) -> list[int]:
    """One request by itself; `disturb` may spoil each of its plans or the cache just before the plan is run."""
    limits = Limits(block_size=block_size, num_blocks=64, max_model_len=256, max_num_seqs=1, max_batch_tokens=256)
    bench = Bench(name, limits, unwritten=math.nan if disturb is None else 0.0)
    if disturb is not None:
        run = bench.__call__

        def disturbed(plan: Plan, *rest: Any) -> ModelOutput:
            disturb(bench, plan)
            return run(plan, *rest)

        bench.engine._run = disturbed
    return bench.run_together([prompt], num_tokens)[0]


def draw(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, tiny_models.VOCABULARY) for _ in range(length)]


def shifted(model: Loaded) -> Callable[..., torch.Tensor]:
    """The model's forward with the positions of decoding steps off by one."""
    forward = model.model.forward

    def wrong(batch: Any, *rest: Any) -> torch.Tensor:
        if batch.num_tokens == 1:
            batch.padded_positions.add_(1)
        return forward(batch, *rest)

    return wrong
