"""embedllm as it is measured, and what every engine in a comparison must be able to do.

Owns the Engine interface and embedllm's own entry. Invariant: `run` returns only when every output token of the
workload exists, and counts exactly those.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import embedllm
from embedllm.bench.workloads import Job, Workload

WARM_UP = (Job(tuple(range(10, 90)), 4), Job(tuple(range(20, 60)), 4))
MAX_SEQS = 64  # sequences anybody runs at once
MAX_BATCH_TOKENS = 512  # tokens of one step, for everybody whose steps can be bounded
LARGE_SEQS, LARGE_BATCH_TOKENS = 256, 8_192  # the same on a GPU


def sizes(device: str) -> tuple[int, int]:
    """Sequences at once, and tokens of a step."""
    return (MAX_SEQS, MAX_BATCH_TOKENS) if device == "cpu" else (LARGE_SEQS, LARGE_BATCH_TOKENS)


@dataclass(frozen=True)
class Run:
    """One timed pass: wall seconds, useful output tokens, and seconds to each request's first token where known."""

    seconds: float
    outputs: list[list[int]]
    first_token: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds


class Engine(ABC):
    """Someone who can run a workload."""

    name: str
    version: str

    @abstractmethod
    def run(self, work: Workload) -> Run:
        """Do the work once, timed."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""

    def warm_up(self) -> None:
        """A first, untimed pass: kernels are compiled, memory is touched."""
        self.run(Workload("warm-up", WARM_UP))


class Embedllm(Engine):
    """This engine. Its prefix cache is emptied before each pass, so only hits inside a workload count.

    A step may have as many tokens as a peer's. By default embedllm on a CPU keeps a step near 150 ms instead, which
    costs throughput and buys latency.
    """

    name = "embedllm"

    def __init__(self, model: str | Path | None, dtype: str, longest: int, device: str = "cpu") -> None:
        self.version = embedllm.__version__
        max_num_seqs, max_batch_tokens = sizes(device)
        self.llm = embedllm.LLM(
            model,
            dtype=dtype,
            max_model_len=longest,
            device=device,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
            tokenizer=None,
            progress=False,
        )

    def run(self, work: Workload) -> Run:
        return generate(self.llm, work)

    def close(self) -> None:
        self.llm.close()


def generate(llm: embedllm.LLM, work: Workload) -> Run:
    """The work once, on an open LLM whose prefix cache is emptied first."""
    llm.cache.reset()
    params = [
        embedllm.SamplingParams(
            max_tokens=job.num_output, temperature=work.temperature, top_p=1.0, top_k=0, ignore_eos=True, seed=i
        )
        for i, job in enumerate(work.jobs)
    ]
    prompts = [list(job.prompt) for job in work.jobs]
    began = time.perf_counter()
    completions = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    return Run(seconds, [c.tokens for c in completions], [c.timing.ttft for c in completions])


def checked(engine: Engine, work: Workload) -> Run:
    """The work once; RuntimeError where an output has not the length that was asked for."""
    found = engine.run(work)
    made = [len(output) for output in found.outputs]
    if made != [job.num_output for job in work.jobs]:
        raise RuntimeError(f"{engine.name} did not produce the tokens that were asked for: {made[:8]}…")
    return found
