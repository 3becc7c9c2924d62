"""The engine on a card with random weights of known shapes, beside what streaming them would take.

Owns what is asked of it and the roofline of a workload. Uses only the public names of embedllm. Invariant: an engine
has been through a like workload before it is timed, so that kernels are compiled.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import embedllm
from embedllm.bench.card import Line, Roof, Setup
from embedllm.bench.engines import generate
from embedllm.bench.figures import Figure, Goal
from embedllm.bench.workloads import Job, Workload, workload

COUNT = 128  # tokens that a single sequence decodes to be timed
KV_SHARE = 0.8  # of the card's free memory: 128 sequences of 2,080 tokens of the large shape must fit
CHAT_SHARE = 0.25  # of `sharegpt`: 64 requests
SHORT_GOAL, DECODE_GOAL, PREFILL_GOAL, NANO_GOAL = 6.4, 6_700, 25_000, 15_000
HOST_GAP = 5.0  # microseconds; kernels of one captured step follow each other sooner
SLOPE_SHARE, IDLE_GOAL, SPIN_GOAL = 0.8, 3.0, 10.0
ROOFLINE = "its roofline"


@dataclass(frozen=True)
class Shape:
    """What of a dense decoder decides how much must be read and computed. itemsize: bytes of a weight and of KV."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    itemsize: int

    @staticmethod
    def read(folder: Path, itemsize: int) -> Shape:
        """From a model's config.json."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            hidden=hidden,
            inner=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or hidden // heads,
            vocab=config["vocab_size"],
            itemsize=itemsize,
        )

    @property
    def linear(self) -> int:
        """Weights that every token is multiplied with."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def step_bytes(self) -> int:
        """Weights that a decoding step reads: the linear ones and the head."""
        return (self.linear + self.vocab * self.hidden) * self.itemsize

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize

    def prompt_flops(self, length: int) -> int:
        """Of a whole prompt: its products, and its attention under the causal mask."""
        return 2 * self.linear * length + 2 * self.layers * self.heads * self.head_dim * length**2

    def least_seconds(self, work: Workload, roof: Roof) -> float:
        """The roofline of a workload whose requests all run at once: prompts at the matrix rate, then every step
        reads all weights, and all keys and values there are by then, at the copy bandwidth."""
        prompts = sum(self.prompt_flops(len(job.prompt)) for job in work.jobs)
        steps = max(job.num_output for job in work.jobs) - 1  # a prompt's own step makes the first token
        tokens = sum((job.num_output - 1) * (2 * len(job.prompt) + job.num_output) // 2 for job in work.jobs)
        return prompts / roof.rate + (steps * self.step_bytes + tokens * self.kv_bytes) / roof.bandwidth


@dataclass(frozen=True)
class Bench:
    """An open engine and what it is measured by."""

    llm: embedllm.LLM
    name: str
    shape: Shape
    roof: Roof
    scale: float

    def prompt(self, seed: int, length: int) -> list[int]:
        rng = Random(seed)
        return [rng.randrange(min(10_000, self.shape.vocab)) for _ in range(length)]

    def same(self, name: str, count: int, num_in: int, num_out: int) -> Workload:
        """`count` requests of equal lengths, scaled down as the setup says."""
        count, num_in, num_out = (max(1, round(number * self.scale)) for number in (count, num_in, num_out))
        return Workload(name, tuple(Job(tuple(self.prompt(i, num_in)), num_out) for i in range(count)))

    def decode_seconds(self, prompt: list[int], count: int = COUNT) -> float:
        """Seconds per token of one sequence alone, its first token left out."""
        params = embedllm.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        self.llm.cache.reset()
        return self.llm.generate(prompt, params).timing.decode / (count - 1)


def large_lines(setup: Setup, roof: Roof) -> Iterator[Line]:
    """The large shape: alone, together, idle, beside a busy thread, and what the peers will be compared with."""
    with _opened(setup, roof, setup.large) as bench:
        yield from _alone(bench, setup.contexts)
        if setup.device != "cpu":
            for count in (1, COUNT):
                name = f"{bench.name}: idle, {count} decoding"
                yield name, functools.partial(_idle, bench, name, count)
        name = f"{bench.name}: slowdown beside a spinning thread"
        yield name, functools.partial(_beside_spinning, bench, name)
        name = f"{bench.name}: decode 128 × (32 in, 2,048 out)"
        yield name, functools.partial(_together, bench, bench.same(name, 128, 32, 2_048), DECODE_GOAL)
        name = f"{bench.name}: prefill 32 × 4,096"
        yield name, functools.partial(_prefill, bench, bench.same(name, 32, 4_096, 1))
        for work in compared(setup, bench.shape.vocab):
            yield ours_name(setup, work), functools.partial(_twice, bench, ours_name(setup, work), work, None)


def small_lines(setup: Setup, roof: Roof) -> Iterator[Line]:
    """The small shape: `nano`, and how long the card waits for the host where a step is short."""
    with _opened(setup, roof, setup.small) as bench:
        name = f"{bench.name}: nano"
        work = workload("nano", bench.shape.vocab, setup.scale)
        yield name, functools.partial(_twice, bench, name, work, NANO_GOAL)
        if setup.device != "cpu":
            name = f"{bench.name}: idle, 1 decoding"
            yield name, functools.partial(_idle, bench, name, 1)


def compared(setup: Setup, vocab_size: int) -> list[Workload]:
    """What embedllm and the peers are compared on."""
    return [
        workload("mixed", vocab_size, setup.scale),
        workload("sharegpt", vocab_size, setup.scale * CHAT_SHARE),
    ]


def ours_name(setup: Setup, work: Workload) -> str:
    """The line that the peers' ratios refer to."""
    return f"{Path(setup.large).name}: {work.name}"


@contextlib.contextmanager
def _opened(setup: Setup, roof: Roof, shape: str) -> Iterator[Bench]:
    """One open engine. Random weights of the shape are written first, where it names no folder."""
    import torch

    folder = setup.folder(shape)
    if not folder.is_dir():
        embedllm.testing.write_random_model(folder, shape, dtype=setup.dtype)
    size = Shape.read(folder, getattr(torch, setup.dtype).itemsize)
    works = [*compared(setup, size.vocab), workload("nano", size.vocab, setup.scale)]
    longest = max(max(setup.contexts) + 2 * COUNT, round(4_096 * setup.scale) + 1, *(work.longest for work in works))
    with embedllm.LLM(
        folder,
        device=setup.device,
        dtype=setup.dtype,
        max_model_len=longest,
        kv_cache_memory="auto" if setup.device == "cpu" else KV_SHARE,
        tokenizer=None,
        max_num_seqs=256,
        progress=False,
    ) as llm:
        yield Bench(llm, Path(shape).name, size, roof, setup.scale)


def _alone(bench: Bench, contexts: tuple[int, ...]) -> Iterator[Line]:
    """Milliseconds per token of one sequence, and their slope over its length."""
    times: dict[int, float] = {}
    for context in contexts:
        name = f"{bench.name}: alone at {context:,} tokens"
        yield name, functools.partial(_alone_at, bench, name, context, times, context == min(contexts))
    name = f"{bench.name}: slope over its length"
    yield name, functools.partial(_slope, bench, name, times)


def _alone_at(bench: Bench, name: str, context: int, times: dict[int, float], is_short: bool) -> Figure:
    bench.decode_seconds(bench.prompt(1, context), 8)  # the step is captured
    seconds = times[context] = statistics.median(bench.decode_seconds(bench.prompt(i, context)) for i in (2, 3, 4))
    least = (bench.shape.step_bytes + (context + COUNT // 2) * bench.shape.kv_bytes) / bench.roof.bandwidth
    goal = Goal(SHORT_GOAL, at_most=True) if is_short else None
    return Figure(name, seconds * 1e3, "ms/token", least / seconds, ROOFLINE, goal)


def _slope(bench: Bench, name: str, times: dict[int, float]) -> Figure:
    if len(times) < 2:
        raise RuntimeError(f"a slope needs two lengths, and {len(times)} were measured")
    slope = statistics.linear_regression(list(times), list(times.values())).slope
    least = bench.shape.kv_bytes / bench.roof.bandwidth
    goal = Goal(least / SLOPE_SHARE * 1e9, at_most=True)
    beside = f"{bench.shape.kv_bytes:,} bytes per token of context"
    return Figure(name, slope * 1e9, "ns/token", least / slope if slope > 0 else None, ROOFLINE, goal, beside)


def _together(bench: Bench, work: Workload, goal: float) -> Figure:
    """Output tokens per second after a short run of the same requests."""
    generate(bench.llm, Workload("short", tuple(Job(job.prompt, min(4, job.num_output)) for job in work.jobs)))
    seconds = generate(bench.llm, work).seconds
    share = bench.shape.least_seconds(work, bench.roof) / seconds
    beside = f"{len(work.jobs)} requests in {seconds:.1f} s"
    return Figure(work.name, work.num_output / seconds, "tok/s", share, ROOFLINE, Goal(goal), beside)


def _prefill(bench: Bench, work: Workload) -> Figure:
    """Prompt tokens per second of the second pass; the prompts of the first are others."""
    generate(bench.llm, Workload("first", tuple(Job(job.prompt[::-1], 1) for job in work.jobs)))
    seconds = generate(bench.llm, work).seconds
    share = bench.shape.least_seconds(work, bench.roof) / seconds
    beside = f"{len(work.jobs)} prompts in {seconds:.1f} s"
    return Figure(work.name, work.num_prompt / seconds, "tok/s", share, "the matrix rate", Goal(PREFILL_GOAL), beside)


def _twice(bench: Bench, name: str, work: Workload, goal: float | None) -> Figure:
    """Output tokens per second of the second pass; the first one captures steps as their sizes come up."""
    first, second = generate(bench.llm, work), generate(bench.llm, work)
    share = bench.shape.least_seconds(work, bench.roof) / second.seconds
    beside = f"{work.describe().partition(': ')[2]}; second pass, the first made {first.tokens_per_second:,.0f}"
    target = None if goal is None else Goal(goal)
    return Figure(name, second.tokens_per_second, "tok/s", share, ROOFLINE, target, beside)


def _idle(bench: Bench, name: str, count: int) -> Figure:
    """Share of decoding in which the card waits for the host."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    work = Workload("idle", tuple(Job(tuple(bench.prompt(i, 64)), 64) for i in range(count)))
    generate(bench.llm, work)
    generate(bench.llm, work)  # every step is captured
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        generate(bench.llm, work)
        torch.cuda.synchronize()
    events = [event for event in found.events() or [] if "CUDA" in str(event.device_type)]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    beside = f"with the gaps between a step's kernels {idle_share(spans, 0.0):.1%}; by torch.profiler"
    return Figure(name, 100 * idle_share(spans), "%", goal=Goal(IDLE_GOAL, at_most=True), beside=beside)


def idle_share(spans: list[tuple[float, float]], least: float = HOST_GAP) -> float:
    """Share of the time in gaps of `least` or more in which none of (start, end) runs, all in microseconds.

    The first quarter of the spans is left out: the prompts are in it.
    """
    spans = sorted(spans)[len(spans) // 4 :]
    if not spans:
        raise RuntimeError("the profiler saw no kernel")
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle += start - end if start > end and start - end >= least else 0.0
        end = max(end, stop)
    return idle / (end - spans[0][0])


def _beside_spinning(bench: Bench, name: str) -> Figure:
    """How much longer a token takes while a thread of the host program computes in Python; alternating passes."""
    prompt = bench.prompt(5, round(256 * bench.scale) + 8)
    bench.decode_seconds(prompt, 8)
    alone, beside = [], []
    for _ in range(3):
        alone.append(bench.decode_seconds(prompt))
        stop = threading.Event()
        thread = threading.Thread(target=_spin, args=(stop,), daemon=True)
        thread.start()
        try:
            beside.append(bench.decode_seconds(prompt))
        finally:
            stop.set()
            thread.join()
    times = statistics.median(alone), statistics.median(beside)
    note = f"{times[0] * 1e3:.2f} ms/token alone, {times[1] * 1e3:.2f} beside it"
    return Figure(name, 100 * (times[1] / times[0] - 1), "%", goal=Goal(SPIN_GOAL, at_most=True), beside=note)


def _spin(stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1
