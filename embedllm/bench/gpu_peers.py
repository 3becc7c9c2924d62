"""The peers of `embedllm bench gpu`: transformers on the work that embedllm has just done on the same card.

Owns how much of the work each peer gets and the ratios. Invariant: a peer has the card to itself, in a process of its
own, and is compared by useful output tokens per second.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator, Mapping

from embedllm.bench.apart import Apart, Recipe
from embedllm.bench.card import Line, Setup
from embedllm.bench.engines import Engine, checked
from embedllm.bench.figures import Figure, Goal
from embedllm.bench.gpu_engine import compared, ours_name
from embedllm.bench.workloads import Workload

GOALS = {"hf": 20.0, "hf-cb": 3.0}  # embedllm is so many times as fast
# The first requests of a workload that a peer gets; all of them where it says nothing. One by one they would take
# minutes, and their rate is that of a few.
PARTS = {("hf", "mixed"): 4, ("hf", "sharegpt"): 2, ("hf-batch", "sharegpt"): 32}


def lines(name: str, setup: Setup, threads: int, limit: float, ours: Mapping[str, float | None]) -> Iterator[Line]:
    """How many times as fast embedllm is, for each workload. ours: embedllm's tokens per second by line."""
    folder = setup.folder(setup.large)
    vocab_size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    works = compared(setup, vocab_size)
    with tempfile.TemporaryDirectory(prefix="embedllm-peer-") as scratch:
        recipe = Recipe(
            name=name,
            model=str(folder),
            box="",
            dtype=setup.dtype,
            device=setup.device,
            longest=max(work.longest for work in works),
            threads=threads,
            scratch=scratch,
        )
        peer = Apart(recipe, limit)
        try:
            checked(peer, part_of(name, works[0]))  # not timed: what is loaded at first use is loaded
            for work in works:
                line = f"{work.name}: embedllm beside {name}"
                yield line, functools.partial(_ratio, line, peer, work, ours.get(ours_name(setup, work)))
        finally:
            peer.close()


def part_of(name: str, work: Workload) -> Workload:
    """What of a workload this peer gets."""
    return Workload(work.name, work.jobs[: PARTS.get((name, work.name))], work.temperature)


def _ratio(line: str, peer: Engine, work: Workload, ours: float | None) -> Figure:
    part = part_of(peer.name, work)
    theirs = checked(peer, part).tokens_per_second
    beside = f"{peer.name} ({peer.version}) {theirs:,.1f} tok/s, {len(part.jobs)} of {len(work.jobs)} requests"
    if ours is None:
        raise RuntimeError(f"embedllm's own figure is missing; {beside}")
    goal = Goal(GOALS[peer.name]) if peer.name in GOALS else None
    return Figure(line, ours / theirs, "times", goal=goal, beside=beside)
