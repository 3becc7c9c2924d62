"""The work: prompts as token ids and how many tokens each must produce, drawn from a fixed seed.

Owns the workloads and nothing else. Knows no engine and no tokenizer. Invariant: (name, vocabulary size, scale) is the
same work on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

FIRST_ID = 10  # lower ids are often special
MEAN_PROMPT, MEAN_OUTPUT = 161.3, 338.0  # of ShareGPT, as section 6.1 of the PagedAttention paper gives them
SPREAD_PROMPT, SPREAD_OUTPUT = 1.2, 0.9  # standard deviations of the logarithms: our choice
SHORTEST, LONGEST = 4, 1_024


@dataclass(frozen=True)
class Job:
    """One request: its prompt, and exactly how many tokens follow (no natural end counts)."""

    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once. Outputs are greedy unless `temperature` says otherwise."""

    name: str
    jobs: tuple[Job, ...]
    temperature: float = 0.0

    @property
    def num_prompt(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def num_output(self) -> int:
        return sum(job.num_output for job in self.jobs)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(job.prompt) + job.num_output for job in self.jobs)

    def describe(self) -> str:
        """One line for the report."""
        tokens = f"{self.num_prompt:,} prompt tokens, {self.num_output:,} output tokens"
        return f"{self.name}: {len(self.jobs)} request{'s' if len(self.jobs) > 1 else ''}, {tokens}"


def workload(name: str, vocab_size: int, scale: float = 1.0) -> Workload:
    """The named workload for a model with this many token ids; `scale` is how many of its requests to take, above 0."""
    return WORKLOADS[name](Random(0), vocab_size, lambda count: max(1, round(count * scale)))


Count = Callable[[int], int]


def _ids(rng: Random, vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(min(FIRST_ID, vocab_size - 1), vocab_size) for _ in range(count))


def _mixed(rng: Random, vocab_size: int, count: Count) -> Workload:
    """Short requests of mixed lengths: what an application does all day."""
    jobs = [Job(_ids(rng, vocab_size, rng.randint(16, 128)), rng.randint(8, 64)) for _ in range(count(32))]
    return Workload("mixed", tuple(jobs))


def _single(rng: Random, vocab_size: int, count: Count) -> Workload:
    """One request alone: latency, where batching helps nobody."""
    return Workload("single", tuple(Job(_ids(rng, vocab_size, 64), 64) for _ in range(count(1))))


def _shared_prefix(rng: Random, vocab_size: int, count: Count) -> Workload:
    """Many questions after one long system prompt."""
    system = _ids(rng, vocab_size, 512)
    jobs = [Job(system + _ids(rng, vocab_size, rng.randint(8, 32)), rng.randint(8, 32)) for _ in range(count(64))]
    return Workload("shared-prefix", tuple(jobs))


def _nano(rng: Random, vocab_size: int, count: Count) -> Workload:
    """The lengths and the temperature of nano-vllm's bench.py; there every prompt is drawn before every length."""
    top = min(10_001, vocab_size)
    number = count(256)
    prompts = [tuple(rng.randrange(top) for _ in range(rng.randint(100, 1_024))) for _ in range(number)]
    return Workload("nano", tuple(Job(prompt, rng.randint(100, 1_024)) for prompt in prompts), temperature=0.6)


def chat_lengths(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, output) lengths: log-normal with ShareGPT's means, cut to 4..1,024 tokens each."""
    rng = Random(seed)

    def draw(mean: float, spread: float) -> int:
        value = rng.lognormvariate(math.log(mean) - spread**2 / 2, spread)
        return min(LONGEST, max(SHORTEST, round(value)))

    return [(draw(MEAN_PROMPT, SPREAD_PROMPT), draw(MEAN_OUTPUT, SPREAD_OUTPUT)) for _ in range(count)]


def _sharegpt(rng: Random, vocab_size: int, count: Count) -> Workload:
    """Random prompts of chat-like lengths: none of ShareGPT's text is here."""
    jobs = [Job(_ids(rng, vocab_size, prompt), output) for prompt, output in chat_lengths(count(256))]
    return Workload("sharegpt", tuple(jobs))


WORKLOADS: dict[str, Callable[[Random, int, Count], Workload]] = {
    "mixed": _mixed,
    "single": _single,
    "shared-prefix": _shared_prefix,
    "nano": _nano,
    "sharegpt": _sharegpt,
}
