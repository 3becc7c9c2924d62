"""How much KV memory holds no token: paged, as the engine did it, beside contiguous reservations for the same requests.

Owns the replay of an engine trace and the contiguous baselines of the PagedAttention paper (arXiv 2309.06180, section 2
and figure 2). Invariant: every figure about embedllm is read from the trace of a real run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

import embedllm
from embedllm.bench.workloads import chat_lengths

TARGET = 0.04
NUM_BLOCKS, BLOCK_SIZE, MAX_LEN = 1_024, 16, 2_048
MAX_SEQS = 256
NUM_SAMPLES = 6


@dataclass(frozen=True)
class Held:
    """What one step held.

    running: sequences. used: blocks with an owner. tokens: of all running sequences, each counting its whole context.
    unshared: blocks they would need if none were shared. waiting: whether anybody waits for room.
    """

    running: int
    used: int
    tokens: int
    unshared: int
    block_size: int
    waiting: bool

    @property
    def waste(self) -> float:
        """Share of the slots of used blocks without a token; a shared block's tokens count once."""
        twice = max(0, self.unshared - self.used) * self.block_size
        return 1.0 - (self.tokens - twice) / (self.used * self.block_size)

    @property
    def saved(self) -> float:
        """Share of blocks that sharing saves."""
        return 1.0 - self.used / self.unshared


def replay(trace: Iterable[tuple[object, ...]], block_size: int) -> Iterator[Held]:
    """What each step held once its tokens were written, from the events of a trace (see docs/guide/tracing.md)."""
    used: set[int] = set()
    tokens: dict[int, int] = {}  # running sequence -> its tokens with KV
    waiting: set[int] = set()
    in_step = False

    def held() -> Held:
        unshared = sum(-(-count // block_size) for count in tokens.values())
        return Held(len(tokens), len(used), sum(tokens.values()), unshared, block_size, bool(waiting))

    for name, *numbers in trace:
        first = numbers[0]
        assert isinstance(first, int)
        if in_step and name not in ("schedule", "copy"):
            in_step = False
            yield held()
        if name == "step":
            in_step = True
        elif name in ("allocate", "share"):
            used.add(first)
        elif name in ("free", "idle"):
            used.discard(first)
        elif name == "queue":
            waiting.add(first)
        elif name == "admit":
            waiting.discard(first)
            tokens[first] = int(str(numbers[2]))
        elif name == "schedule":
            tokens[first] = int(str(numbers[1])) + int(str(numbers[2]))
        elif name == "preempt":
            tokens.pop(first, None)
            waiting.add(first)
        elif name in ("finish", "park"):
            tokens.pop(first, None)
            waiting.discard(first)


@dataclass(frozen=True)
class Row:
    """One way to keep KV: mean waste of what was reserved, share of the whole pool that held tokens while requests
    waited, mean number of requests running then, and steps until all were done."""

    name: str
    waste: float
    pool: float
    running: float
    steps: int


@dataclass(frozen=True)
class Waste:
    """embedllm first, then the baselines; `saved` is the memory that sharing saves with six samples per prompt."""

    requests: int
    rows: tuple[Row, ...]
    saved: float

    def table(self) -> str:
        """For a terminal."""
        lines = [
            f"waste: KV memory on {self.requests} chat-like requests, a pool of {NUM_BLOCKS * BLOCK_SIZE:,} tokens",
            f"  {'':<22}{'reserved, no token':>20}{'pool in use':>14}{'running':>10}{'steps':>8}",
        ]
        for row in self.rows:
            lines.append(f"  {row.name:<22}{row.waste:>20.1%}{row.pool:>14.1%}{row.running:>10.1f}{row.steps:>8,}")
        met = "met" if self.rows[0].waste < TARGET else "missed"
        lines.append(f"  target: under {TARGET:.0%} of what is reserved: {met}")
        lines.append(
            f"  {NUM_SAMPLES} samples per prompt share their prompt's blocks: {self.saved:.1%} of memory saved"
        )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"name": r.name, "waste": r.waste, "pool_in_use": r.pool, "running": r.running, "steps": r.steps}
            for r in self.rows
        ]
        return {"probe": "waste", "requests": self.requests, "rows": rows, "saved_by_6_samples": self.saved}


def measure(num_requests: int = 256) -> Waste:
    """Run the requests through an engine with a stand-in model, then through the contiguous baselines."""
    lengths = chat_lengths(num_requests)
    steps = _run(lengths, num_samples=1)
    full = [step for step in steps if step.waiting] or steps
    size = NUM_BLOCKS * BLOCK_SIZE
    ours = Row(
        "embedllm, blocks of 16",
        fmean(step.waste for step in steps),
        fmean(step.tokens for step in full) / size,
        fmean(step.running for step in full),
        len(steps),
    )
    sampled = _run(lengths[: max(1, num_requests // 8)], num_samples=NUM_SAMPLES)
    saved = fmean(step.saved for step in sampled)
    baselines = [contiguous(kind, lengths, size) for kind in ("oracle", "pow2", "max")]
    return Waste(num_requests, (ours, *baselines), saved)


def _run(lengths: list[tuple[int, int]], num_samples: int) -> list[Held]:
    """Every step of the real engine on these requests. All arrive before the first step."""
    rng = Random(1)
    model = embedllm.testing.HashLM(eos_every=0)
    options = {"num_kv_blocks": NUM_BLOCKS, "block_size": BLOCK_SIZE, "max_model_len": MAX_LEN, "progress": False}
    with embedllm.LLM(model, max_num_seqs=MAX_SEQS, max_batch_tokens=2_048, **options) as llm, llm.trace() as trace:
        prompts = [[rng.randrange(97) for _ in range(prompt)] for prompt, _ in lengths]
        params = [embedllm.SamplingParams(max_tokens=output, n=num_samples) for _, output in lengths]
        llm.generate(prompts, params)
        if trace.num_lost:
            raise RuntimeError(f"the trace lost {trace.num_lost} events; take fewer requests")
        return [step for step in replay(trace, BLOCK_SIZE) if step.used]


# ---- contiguous baselines -------------------------------------------------------------------------------------


def contiguous(kind: str, lengths: list[tuple[int, int]], size: int) -> Row:
    """Requests that each reserve one contiguous range for their whole life, first come first served, first fit.

    kind: "max" reserves the longest a request may become; "pow2" the prompt and its output rounded up to a power of
    two; "oracle" exactly what it will need, which nobody can know. One step computes a whole prompt or one token.
    """
    waiting = list(reversed(lengths))
    running: list[tuple[int, int, int, int]] = []  # (start, reserved, tokens now, tokens at the end), by start
    wastes, pools, counts, steps = [], [], [], 0
    while waiting or running:
        while waiting and len(running) < MAX_SEQS:
            prompt, output = waiting[-1]
            reserved = _reserve(kind, prompt, output)
            start = _first_fit(running, reserved, size)
            if start is None:
                break
            waiting.pop()
            running.append((start, reserved, prompt, prompt + output - 1))
            running.sort()
        held = sum(tokens for _, _, tokens, _ in running)
        wastes.append(1.0 - held / sum(reserved for _, reserved, _, _ in running))
        if waiting:
            pools.append(held / size)
            counts.append(len(running))
        steps += 1
        running = [(start, room, now + 1, end) for start, room, now, end in running if now < end]
    label = {"max": "contiguous, maximum", "pow2": "contiguous, power of 2", "oracle": "contiguous, oracle"}[kind]
    return Row(label, fmean(wastes), fmean(pools or [0.0]), fmean(counts or [0.0]), steps)


def _reserve(kind: str, prompt: int, output: int) -> int:
    if kind == "max":
        return MAX_LEN
    return prompt + (output if kind == "oracle" else 1 << (output - 1).bit_length())


def _first_fit(running: list[tuple[int, int, int, int]], need: int, size: int) -> int | None:
    end = 0
    for start, reserved, _, _ in running:
        if start - end >= need:
            return end
        end = start + reserved
    return end if size - end >= need else None
