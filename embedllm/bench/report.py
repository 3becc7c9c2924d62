"""What a comparison found, as a table for people and as JSON for programs.

Owns medians, ratios and the description of machine and versions. Invariant: every figure in the table is in the JSON,
with the rounds it came from.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from embedllm.bench.engines import Run
from embedllm.bench.workloads import Workload

PACKAGES = ("embedllm", "torch", "triton", "transformers", "numpy", "llama-cpp-python")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")


@dataclass
class Entry:
    """One engine on one workload: its rounds."""

    name: str
    version: str
    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return median(run.seconds for run in self.runs)

    @property
    def tokens_per_second(self) -> float:
        return median(run.tokens_per_second for run in self.runs)

    def first_token(self, share: float) -> float | None:
        """Seconds to the first token at this quantile of all requests of all rounds."""
        values = sorted(value for run in self.runs for value in run.first_token)
        return values[min(len(values) - 1, int(len(values) * share))] if values else None

    def as_json(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "version": self.version,
            "seconds": [round(run.seconds, 4) for run in self.runs],
            "median_seconds": round(self.seconds, 4),
            "output_tokens_per_second": round(self.tokens_per_second, 2),
            "ttft_p50": self.first_token(0.5),
            "ttft_p99": self.first_token(0.99),
        }


@dataclass
class Comparison:
    """All engines on one workload; embedllm first."""

    work: Workload
    entries: list[Entry]
    skipped: dict[str, str] = field(default_factory=dict)  # engine -> why

    def ratio(self, entry: Entry) -> float:
        """How many times embedllm's output rate is this one's."""
        return self.entries[0].tokens_per_second / entry.tokens_per_second

    def agreement(self, entry: Entry) -> float:
        """Share of requests with the same tokens as embedllm in the last round."""
        pairs = zip(self.entries[0].runs[-1].outputs, entry.runs[-1].outputs, strict=True)
        return sum(ours == theirs for ours, theirs in pairs) / len(self.work.jobs)

    def table(self) -> str:
        """For a terminal."""
        rows = [("", "output tok/s", "seconds", "TTFT p50", "TTFT p99", "embedllm is", "same tokens")]
        for entry in self.entries:
            ours = entry is self.entries[0]
            rows.append(
                (
                    entry.name,
                    f"{entry.tokens_per_second:.1f}",
                    f"{entry.seconds:.2f}",
                    _milliseconds(entry.first_token(0.5)),
                    _milliseconds(entry.first_token(0.99)),
                    "" if ours else f"{self.ratio(entry):.2f}x",
                    "" if ours or self.work.temperature else f"{self.agreement(entry):.0%}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [self.work.describe()]
        for row in rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(["  " + row[0].ljust(widths[0]), *cells]).rstrip())
        lines += [f"  {name} skipped: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.work.name,
            "requests": len(self.work.jobs),
            "prompt_tokens": self.work.num_prompt,
            "output_tokens": self.work.num_output,
            "engines": [
                entry.as_json()
                | {"embedllm_is_times": round(self.ratio(entry), 3), "same_tokens": self.agreement(entry)}
                for entry in self.entries
            ],
            "skipped": self.skipped,
        }


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.0f} ms"


def machine() -> dict[str, Any]:
    """What ran this, without naming whose it is: CPU model, cores, the instructions that decide speed, memory."""
    import torch

    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": cores,
        "instructions": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of what decides the figures, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def envelope(settings: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is needed to judge and repeat the figures."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["embedllm", *sys.argv[1:]]),
        "settings": settings,
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
