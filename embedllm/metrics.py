"""What the engine counts about itself.

Owns the counters and the snapshot users see, with vLLM's names. Knows no text, no I/O. Invariant: counters only
grow; a snapshot is plain numbers and holds nothing alive.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from embedllm.outputs import Timing
from embedllm.scheduler import Scheduler
from embedllm.sequence import State

WINDOW = 1_024  # most recent requests that the summaries look at


@dataclass(frozen=True, slots=True)
class Summary:
    """Count of all values ever seen; mean, median and 99th percentile (seconds) of the most recent 1,024."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0

    @classmethod
    def of(cls, count: int, recent: Sequence[float]) -> Summary:
        if not recent:
            return cls(count)
        values = sorted(recent)
        at = [values[min(len(values) - 1, int(len(values) * q))] for q in (0.5, 0.99)]
        return cls(count, sum(values) / len(values), *at)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stats:
    """The engine right now.

    kv_cache_usage: share of blocks in use, 0..1. kv_cache_waste: share of the slots of those blocks that hold no
    token. prefix_cache_queries, prefix_cache_hits: prompt tokens looked up and found. num_step_faults: steps that
    raised and were contained.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    num_requests_parked: int = 0
    kv_cache_usage: float = 0.0
    kv_cache_waste: float = 0.0
    num_kv_blocks: int = 0
    num_kv_blocks_cached: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_step_faults: int = 0
    request_finished: dict[str, int] = field(default_factory=dict)
    time_to_first_token: Summary = field(default_factory=Summary)
    time_per_output_token: Summary = field(default_factory=Summary)
    queue_time: Summary = field(default_factory=Summary)
    e2e_request_latency: Summary = field(default_factory=Summary)


class Metrics:
    """Counters the engine bumps; `recent` keeps the latest latencies per name."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.num_steps = 0
        self.num_step_faults = 0
        self.finished: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._recent: dict[str, deque[float]] = {}

    def observe_request(self, timing: Timing, num_output: int, reason: str) -> None:
        self.finished[reason] += 1
        self._observe("queue_time", timing.queue)
        self._observe("e2e_request_latency", timing.total)
        if num_output:
            self._observe("time_to_first_token", timing.ttft)
        if num_output > 1:
            self._observe("time_per_output_token", timing.decode / (num_output - 1))

    def _observe(self, name: str, value: float) -> None:
        self._counts[name] += 1
        self._recent.setdefault(name, deque(maxlen=WINDOW)).append(value)

    def summary(self, name: str) -> Summary:
        return Summary.of(self._counts[name], self._recent.get(name, ()))


def snapshot(scheduler: Scheduler, metrics: Metrics) -> Stats:
    """Everything counted, now. O(unfinished sequences)."""
    pool = scheduler.pool
    slots = pool.num_used * pool.block_size
    empty = sum(len(s.blocks) * pool.block_size - s.num_computed - s.num_in_flight for s in scheduler.running)
    return Stats(
        num_requests_running=len(scheduler.running),
        num_requests_waiting=len(scheduler.waiting),
        num_requests_parked=sum(s.state is State.PARKED for s in scheduler.sequences.values()),
        kv_cache_usage=pool.num_used / pool.num_blocks,
        kv_cache_waste=empty / slots if slots else 0.0,
        num_kv_blocks=pool.num_blocks,
        num_kv_blocks_cached=pool.num_cached,
        prefix_cache_queries=scheduler.num_prefix_queries,
        prefix_cache_hits=scheduler.num_prefix_hits,
        prompt_tokens=metrics.prompt_tokens,
        generation_tokens=metrics.generation_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_steps=metrics.num_steps,
        num_step_faults=metrics.num_step_faults,
        request_finished=dict(metrics.finished),
        time_to_first_token=metrics.summary("time_to_first_token"),
        time_per_output_token=metrics.summary("time_per_output_token"),
        queue_time=metrics.summary("queue_time"),
        e2e_request_latency=metrics.summary("e2e_request_latency"),
    )
