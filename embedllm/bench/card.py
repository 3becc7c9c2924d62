"""A device under measurement: what it is, what it can do at all, and how long a call takes on it.

Owns the settings of `embedllm bench gpu`, the roofline and the stopwatch. Invariant: on a CUDA device a call is timed
by the device's own clock inside a captured graph, so neither Python nor the launch of a kernel is part of it.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from embedllm.bench.figures import Figure

COPY_BYTES, MATRIX = 2 * 2**30, 8_192
COLD_BYTES = 256 * 2**20  # what a kernel goes through before it meets the same data again: five times an H100's L2
MOST_COPIES = 64
LEAST_CALLS = 32  # in one captured graph
REPLAYS, SAMPLES = 3, 5

Line = tuple[str, Callable[[], Figure]]  # a figure's name, and what measures it


@dataclass(frozen=True)
class Roof:
    """Bytes per second of a copy, read and written, and FLOP per second of a square matrix product."""

    bandwidth: float
    rate: float


@dataclass(frozen=True)
class Sizes:
    """Shapes that kernels are timed at; by default those of Llama-3.1-8B, and the vocabulary of Qwen3.

    decode: (sequences, tokens of each). prefill: tokens of one sequence. ragged: tokens of each sequence of a batch.
    rows: tokens of a product. tokens: of the kernels that stream activations. sampled: (rows, vocabulary).
    """

    hidden: int = 4_096
    inner: int = 14_336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128_256
    block: int = 16
    decode: tuple[tuple[int, int], ...] = (
        (1, 16_384), (1, 65_536), (16, 4_096), (64, 1_024), (128, 1_024), (128, 4_096)
    )  # fmt: skip
    prefill: tuple[int, ...] = (1_024, 4_096, 16_384)
    ragged: tuple[int, ...] = (
        2_048,
        37,
        511,
        1_024,
        1_500,
        64,
        777,
        3_000,
        129,
        1_999,
        250,
        1_301,
        90,
        640,
        2_500,
        514,
    )
    rows: tuple[int, ...] = (1, 16, 128)
    residual_rows: tuple[int, ...] = (1, 128, 4_096)
    tokens: tuple[int, ...] = (256, 8_192)
    sampled: tuple[int, int] = (256, 151_936)

    @property
    def kv_width(self) -> int:
        """Values of one token's keys and values in a layer."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Setup:
    """What is measured, and where. large, small: names of shapes, or folders of models.

    contexts: tokens before a single sequence decodes. scale: the share of requests and of their tokens that is taken.
    scratch: a folder for weights. The defaults are those of the command, for one H100.
    """

    device: str = "cuda"
    dtype: str = "bfloat16"
    large: str = "llama-3.1-8b"
    small: str = "qwen3-0.6b"
    contexts: tuple[int, ...] = (256, 4_096, 16_384)
    scale: float = 1.0
    sizes: Sizes = Sizes()
    peers: tuple[str, ...] = ("hf", "hf-batch", "hf-cb")
    scratch: str = ""

    def folder(self, shape: str) -> Path:
        """Where the weights of `large` or `small` are, or will be."""
        return Path(shape) if Path(shape).is_dir() else Path(self.scratch) / shape


def facts(device: str) -> dict[str, str]:
    """The exact device, its driver, versions of what decides the figures, the date."""
    import torch

    found = {"device": "cpu" if device == "cpu" else torch.cuda.get_device_name(), "driver": _driver(device)}
    found["CUDA"] = str(torch.version.cuda)
    for name in ("torch", "triton", "transformers", "embedllm"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found | {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


def _driver(device: str) -> str:
    """The driver's version as nvidia-smi tells it."""
    if device == "cpu":
        return "none"
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return answer[0] if answer else "unknown"


def copies(num_bytes: int, device: str) -> int:
    """How many sets of data of this size a kernel must go through so that none is still in a cache."""
    return 1 if device == "cpu" else min(MOST_COPIES, -(-COLD_BYTES // num_bytes))


def seconds_per_call(calls: Sequence[Callable[[], object]], device: str) -> float:
    """Median seconds of one call, when all of them run one after the other again and again.

    Each call has data of its own, see `copies`; none may wait for the device.
    """
    import torch

    with torch.inference_mode():
        if device == "cpu":
            return _on_cpu(calls)
        for call in calls:
            call()  # kernels are compiled
        torch.cuda.synchronize()
        rounds = -(-LEAST_CALLS // len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in [*calls] * rounds:
                call()
        graph.replay()
        torch.cuda.synchronize()
        times: list[float] = []
        for _ in range(SAMPLES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(REPLAYS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / (REPLAYS * rounds * len(calls)))
        del graph
        torch.cuda.empty_cache()
        return statistics.median(times)


def _on_cpu(calls: Sequence[Callable[[], object]]) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - began) / len(calls))
    return statistics.median(times)


def measure_roof(setup: Setup) -> Roof:
    """What the device can do at all. Takes 4 GiB of its memory and gives them back."""
    import torch

    source = torch.zeros(int(COPY_BYTES * setup.scale) // 2, dtype=torch.int16, device=setup.device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds_per_call([functools.partial(target.copy_, source)], setup.device)
    size = matrix_size(setup)
    a = torch.randn(size, size, dtype=getattr(torch, setup.dtype), device=setup.device)
    rate = 2 * size**3 / seconds_per_call([functools.partial(torch.matmul, a, a)], setup.device)
    del source, target, a
    if setup.device != "cpu":
        torch.cuda.empty_cache()
    return Roof(bandwidth, rate)


def matrix_size(setup: Setup) -> int:
    """Rows and columns of the matrices whose product gives the rate."""
    return int(MATRIX * setup.scale**0.5)
