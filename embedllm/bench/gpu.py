"""What a CUDA card reaches with this engine, beside what it can do at all.

Owns the measurements of `embedllm bench gpu`: the card's own copy bandwidth and matrix rate first, then decoding and
prefill of known shapes with random weights, each also as a share of what streaming weights and KV would take at that
bandwidth. Invariant: every figure is of one process on one card, its name stands with it, and nothing is taken over
from another run.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import embedllm
from embedllm.errors import InvalidRequest

LARGE, SMALL = "llama-3.1-8b", "qwen3-0.6b"
CONTEXTS = (256, 4_096, 16_384)  # tokens before a single sequence decodes
ATTENTION = ((1, 16_384), (16, 4_096), (64, 1_024), (128, 1_024), (128, 4_096))  # (sequences, tokens of each)
COPY_BYTES, MATRIX = 2 * 2**30, 8_192


@dataclass(frozen=True)
class Figure:
    """One line: what, how much, of what unit, and what it is beside."""

    name: str
    value: float
    unit: str
    beside: str = ""


@dataclass
class Card:
    """What was measured on a device."""

    device: str
    versions: str
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, beside: str = "") -> None:
        self.figures.append(Figure(name, value, unit, beside))

    def table(self) -> str:
        """For a terminal."""
        width = max(len(figure.name) for figure in self.figures)
        lines = [f"gpu: {self.device}, {self.versions}"]
        lines += [f"  {f.name:<{width}}  {f.value:>12,.2f} {f.unit:<8}  {f.beside}".rstrip() for f in self.figures]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "probe": "gpu",
            "device": self.device,
            "versions": self.versions,
            "figures": [{"name": f.name, "value": f.value, "unit": f.unit, "beside": f.beside} for f in self.figures],
        }


def measure(
    device: str = "cuda",
    *,
    large: str = LARGE,
    small: str = SMALL,
    contexts: tuple[int, ...] = CONTEXTS,
    scale: float = 1.0,
    dtype: str = "bfloat16",
) -> Card:
    """Everything; meant to take eight minutes at most on an H100. scale: the share of the requests that is taken."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise InvalidRequest("embedllm bench gpu needs a CUDA device, and torch sees none")
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    card = Card(name, f"torch {torch.__version__}, embedllm {embedllm.__version__}")
    bandwidth, rate = _copy_bandwidth(device, scale), _matrix_rate(device, dtype, scale)
    card.add("copy bandwidth", bandwidth / 1e9, "GB/s", "read and written bytes")
    card.add(f"matrix rate, {dtype}", rate / 1e12, "TFLOP/s", f"{int(MATRIX * scale**0.5)} cubed")
    if device != "cpu":
        _attention(card, bandwidth)
    with tempfile.TemporaryDirectory(prefix="embedllm-bench-") as scratch:
        folder = _weights(Path(scratch) / "large", large, dtype)
        with _opened(folder, device, dtype, max(contexts) + 300) as llm:
            _decode_alone(card, llm, large, contexts, bandwidth)
            if device != "cpu":
                _idle(card, llm, large)
            _together(card, llm, f"{large}: decode 128 × (32 in, 2,048 out)", (128, 32, 2_048), scale)
            _together(card, llm, f"{large}: prefill 32 × 4,096", (32, 4_096, 1), scale, of_prompt=True)
        folder = _weights(Path(scratch) / "small", small, dtype)
        with _opened(folder, device, dtype, 2_100) as llm:
            _nano(card, llm, small, scale)
    return card


def _weights(folder: Path, shape: str, dtype: str) -> Path:
    """Random weights of a shape; a model's folder as it is."""
    return Path(shape) if Path(shape).is_dir() else embedllm.testing.write_random_model(folder, shape, dtype=dtype)


def _opened(folder: Path, device: str, dtype: str, longest: int) -> embedllm.LLM:
    return embedllm.LLM(
        folder, device=device, dtype=dtype, max_model_len=longest, tokenizer=None, max_num_seqs=256, progress=False
    )


def _seconds(run: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median seconds of a call, device included, after one that is not timed."""
    import torch

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _copy_bandwidth(device: str, scale: float) -> float:
    import torch

    source = torch.zeros(int(COPY_BYTES * scale) // 2, dtype=torch.int16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _matrix_rate(device: str, dtype: str, scale: float) -> float:
    import torch

    size = int(MATRIX * scale**0.5)
    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=device)
    return 2 * size**3 / _seconds(lambda: a @ a, device)


def _often(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _attention(card: Card, bandwidth: float) -> None:
    """The decode form of paged attention by itself: keys and values read per second, for 32 heads over 8 of 128."""
    import torch

    from embedllm_kernels.triton.attention import paged_attention

    heads, kv_heads, dim, block, calls = 32, 8, 128, 16, 20
    for batch, context in ATTENTION:
        blocks = -(-context // block)
        cache = torch.randn(batch * blocks, block, 2 * kv_heads * dim, dtype=torch.bfloat16, device="cuda")
        q = torch.randn(batch, heads, dim, dtype=torch.bfloat16, device="cuda")
        tables = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        attend = functools.partial(
            paged_attention,
            *(q, cache, tables, starts, lengths),
            num_kv_heads=kv_heads,
            scale=dim**-0.5,
            max_query_len=1,
            max_seq_len=context,
        )
        seconds = _seconds(functools.partial(_often, attend, calls), "cuda") / calls
        rate = cache.nbytes / seconds
        name = f"attention, {batch} × {context:,} tokens"
        card.add(name, rate / 1e9, "GB/s", f"{rate / bandwidth:.0%} of copy bandwidth, {seconds * 1e6:.0f} µs")


def _idle(card: Card, llm: embedllm.LLM, shape: str) -> None:
    """Share of the time between the first and the last kernel of decoding in which the card does nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    prompt = _ids(Random(2), llm, 64)
    llm.generate(prompt, _exactly(16))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        llm.generate(prompt, _exactly(64))
        torch.cuda.synchronize()
    events = [event for event in found.events() or [] if "CUDA" in str(event.device_type)]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)[
        len(events) // 4 :
    ]  # past the prompt
    if not spans:
        return
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    card.add(f"{shape}: idle while decoding", 100 * (1 - busy / (end - spans[0][0])), "%", "goal below 3")


def _ids(rng: Random, llm: embedllm.LLM, count: int) -> list[int]:
    return [rng.randrange(min(10_000, llm.info.vocab_size)) for _ in range(count)]


def _exactly(count: int) -> embedllm.SamplingParams:
    return embedllm.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def _decode_alone(card: Card, llm: embedllm.LLM, shape: str, contexts: tuple[int, ...], bandwidth: float) -> None:
    """Milliseconds per token of one sequence, and their slope over its length."""
    rng, count, times = Random(0), 128, []
    memory = llm.memory()
    llm.generate(_ids(rng, llm, 64), _exactly(32))  # kernels are compiled
    for context in contexts:
        llm.generate(_ids(rng, llm, context), _exactly(8))
        timing = llm.generate(_ids(rng, llm, context), _exactly(count)).timing
        times.append(timing.decode / (count - 1))
        share = (memory.weights + context * memory.kv_bytes_per_token) / bandwidth / times[-1]
        beside = f"{share:.0%} of streaming weights and KV"
        card.add(f"{shape}: alone at {context:,} tokens", times[-1] * 1e3, "ms/token", beside)
    if len(contexts) > 1:
        slope = statistics.linear_regression(contexts, times).slope
        goal = memory.kv_bytes_per_token / (0.8 * bandwidth)
        card.add(f"{shape}: slope over its length", slope * 1e9, "ns/token", f"goal {goal * 1e9:.0f}")


def _together(
    card: Card, llm: embedllm.LLM, name: str, work: tuple[int, int, int], scale: float, of_prompt: bool = False
) -> None:
    """Tokens per second of `work` = (requests, tokens in, tokens out), all arriving at once."""
    rng = Random(1)
    count, num_in, num_out = (max(1, round(number * scale)) for number in work)
    llm.generate([_ids(rng, llm, num_in) for _ in range(count)], _exactly(min(num_out, 4)))
    llm.cache.reset()
    prompts = [_ids(rng, llm, num_in) for _ in range(count)]
    began = time.perf_counter()
    llm.generate(prompts, _exactly(num_out))
    seconds = time.perf_counter() - began
    card.add(
        name, count * (num_in if of_prompt else num_out) / seconds, "tok/s", f"{count} requests in {seconds:.1f} s"
    )


def _nano(card: Card, llm: embedllm.LLM, shape: str, scale: float) -> None:
    from embedllm.bench.workloads import workload

    work = workload("nano", llm.info.vocab_size, scale)
    params = [
        embedllm.SamplingParams(max_tokens=job.num_output, temperature=work.temperature, ignore_eos=True, seed=number)
        for number, job in enumerate(work.jobs)
    ]
    prompts = [list(job.prompt) for job in work.jobs]
    llm.generate(prompts[:8], [one.replace(max_tokens=8) for one in params[:8]])
    llm.cache.reset()
    began = time.perf_counter()
    llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    card.add(f"{shape}: nano", work.num_output / seconds, "tok/s", work.describe())
