"""CPU time the engine itself takes per step, outside the model.

Owns the measurement: a HashLM stands for the model, and the engine thread's own CPU clock is read where the model is
entered and left. What lies between is everything else: plan, sampling, commit, text, delivery, the event loop.
Invariant: nothing but the engine thread is measured, so a busy machine does not count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import embedllm

TARGET_STEP, TARGET_SEQUENCE = 150e-6, 10e-6  # seconds per step, and per running sequence in it
RUNNING = (1, 2, 4, 8, 16, 32, 64)
PROMPT, OUTPUT = 8, 160


@dataclass(frozen=True)
class Point:
    """Median CPU seconds outside the model of the steps with this many running sequences."""

    running: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Overhead:
    """The points, and the straight line through them: seconds = step + per_sequence * running."""

    points: tuple[Point, ...]
    step: float
    per_sequence: float

    @property
    def within_target(self) -> bool:
        """Whether every point is at or below the target line."""
        return all(point.seconds <= TARGET_STEP + TARGET_SEQUENCE * point.running for point in self.points)

    def table(self) -> str:
        """For a terminal."""
        lines = ["overhead: CPU time of the engine thread outside the model, per step"]
        for point in self.points:
            limit = TARGET_STEP + TARGET_SEQUENCE * point.running
            lines.append(
                f"  {point.running:>3} running  {point.seconds * 1e6:7.0f} µs  (target {limit * 1e6:.0f} µs, "
                f"median of {point.steps} steps)"
            )
        lines.append(
            f"  fitted: {self.step * 1e6:.0f} µs + {self.per_sequence * 1e6:.1f} µs per running sequence; "
            f"target {TARGET_STEP * 1e6:.0f} + {TARGET_SEQUENCE * 1e6:.0f}: {'met' if self.within_target else 'missed'}"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "probe": "overhead",
            "points": [{"running": p.running, "steps": p.steps, "seconds": p.seconds} for p in self.points],
            "step_seconds": self.step,
            "per_sequence_seconds": self.per_sequence,
            "within_target": self.within_target,
        }


class _Clocked:
    """A model whose runner notes the engine thread's CPU time around each forward."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps: list[tuple[int, float]] = []  # (sequences in the step, CPU seconds since the last forward ended)
        self._left: float | None = None
        self.gate = threading.Event()  # the first step waits for it: all requests are there when the second begins

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def runner(self, limits: Any) -> Callable[..., Any]:
        inner = self.model.runner(limits)

        def forward(plan: Any, between_layers: Any = None) -> Any:
            self.gate.wait()
            entered = time.thread_time()
            if self._left is not None:
                self.steps.append((len(plan.entries), entered - self._left))
            output = inner(plan, between_layers)
            self._left = time.thread_time()
            return output

        return forward


def measure(running: tuple[int, ...] = RUNNING, num_output: int = OUTPUT) -> Overhead:
    """Decode with each number of running sequences and fit the line."""
    return fit(tuple(_point(count, num_output) for count in running))


def _point(count: int, num_output: int) -> Point:
    rng = Random(count)
    model = _Clocked(embedllm.testing.HashLM(eos_every=0))
    with embedllm.LLM(model, num_kv_blocks=4_096, max_num_seqs=max(RUNNING), progress=False) as llm:
        prompts = [[rng.randrange(97) for _ in range(PROMPT)] for _ in range(count)]
        generations = [llm.submit(prompt, max_tokens=num_output) for prompt in prompts]
        model.gate.set()
        for generation in generations:
            generation.result()
    full = [seconds for entries, seconds in model.steps if entries == count]
    steady = full[2:] or full  # the first ones still carry the arrivals
    return Point(count, len(steady), median(steady))


def fit(points: tuple[Point, ...]) -> Overhead:
    """Least squares through the points."""
    n = len(points)
    mean_x = sum(p.running for p in points) / n
    mean_y = sum(p.seconds for p in points) / n
    spread = sum((p.running - mean_x) ** 2 for p in points)
    slope = sum((p.running - mean_x) * (p.seconds - mean_y) for p in points) / spread if spread else 0.0
    return Overhead(points, mean_y - slope * mean_x, slope)
