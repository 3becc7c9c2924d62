"""From the command line to figures: load everybody, let them take turns, report.

Owns the order of things. Invariant: in every round each engine does the same work once, alone, in an order that
rotates, so that a machine getting slower or faster is felt by all.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import embedllm
from embedllm.bench.apart import Apart, Recipe
from embedllm.bench.arguments import PROBES, chosen
from embedllm.bench.engines import Engine
from embedllm.bench.report import Comparison, Entry, envelope, machine
from embedllm.bench.workloads import Workload, workload
from embedllm.errors import InvalidRequest, MissingDependency, UnsupportedModel

BOX = Path(__file__).resolve().parents[1] / "demo" / "model"

Say = Callable[[str], None]


def run(args: argparse.Namespace) -> int:
    """Measure what `args` asks for; returns the exit code."""
    try:
        what, against = chosen(args)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    out = sys.stderr if args.json == "-" else sys.stdout

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    facts = machine()
    say(f"{facts['cpu']}, {facts['cores']} cores ({', '.join(facts['instructions'])}), {facts['threads']} threads")
    results = [_probe(name, say) for name in what if name in PROBES]
    names = [name for name in what if name not in PROBES]
    if names:
        results += [c.as_json() for c in compare(args, names, against, say)]
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("run", "json", "command")}
        text = json.dumps(envelope(settings, results), indent=1)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _probe(name: str, say: Say) -> dict[str, Any]:
    probe = importlib.import_module(f"embedllm.bench.{name}")
    found = probe.measure()
    say(found.table())
    return cast("dict[str, Any]", found.as_json())


def compare(args: argparse.Namespace, names: list[str], against: list[str], say: Say) -> list[Comparison]:
    """Every named workload on embedllm and its peers."""
    with tempfile.TemporaryDirectory(prefix="embedllm-bench-") as scratch:
        model = args.model
        if args.shape:
            model = embedllm.testing.write_random_model(Path(scratch) / args.shape, args.shape, dtype=args.dtype)
            say(f"shape {args.shape}, random weights, {args.dtype}")
        vocab_size, longest = _size(model, names, args.scale)
        works = [workload(name, vocab_size, args.scale) for name in names]
        engines, skipped = _open(model, Path(scratch), against, args, longest)
        try:
            comparisons = []
            for work in works:
                comparisons.append(_take_turns(work, engines, args.rounds, skipped))
                say("\n" + comparisons[-1].table())
            return comparisons
        finally:
            for engine in engines:
                engine.close()


def _size(model: Any, names: list[str], scale: float) -> tuple[int, int]:
    """Token ids the model has, and the longest request of the workloads."""
    config = (BOX if model is None else Path(model)) / "config.json"
    vocab_size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    if vocab_size is None:  # a Hub id, or a config that keeps it elsewhere
        with embedllm.LLM(model, tokenizer=None, num_kv_blocks=64, max_batch_tokens=64, progress=False) as llm:
            vocab_size = llm.info.vocab_size
    return vocab_size, max(workload(name, vocab_size, scale).longest for name in names)


def _open(
    model: Any, scratch: Path, against: list[str], args: argparse.Namespace, longest: int
) -> tuple[list[Engine], dict[str, str]]:
    """embedllm and every peer that can run here, warmed up; and why the others cannot."""
    import torch

    engines: list[Engine] = []
    skipped: dict[str, str] = {}
    try:
        for name in ["embedllm", *against]:
            recipe = Recipe(
                name=name,
                model=None if model is None else str(model),
                box=str(BOX),
                dtype=args.dtype,
                device=args.device,
                longest=longest,
                threads=torch.get_num_threads(),
                scratch=str(scratch),
            )
            try:
                engines.append(Apart(recipe))
            except (MissingDependency, UnsupportedModel) as error:
                if name == "embedllm":
                    raise
                skipped[name] = str(error)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines, skipped


def _take_turns(work: Workload, engines: list[Engine], rounds: int, skipped: dict[str, str]) -> Comparison:
    entries = [Entry(engine.name, engine.version) for engine in engines]
    turns = list(zip(engines, entries, strict=True))
    for number in range(rounds):
        for engine, entry in turns[number % len(turns) :] + turns[: number % len(turns)]:
            gc.collect()
            found = engine.run(work)
            made = [len(output) for output in found.outputs]
            if made != [job.num_output for job in work.jobs]:
                raise RuntimeError(f"{engine.name} did not produce the tokens that were asked for: {made[:8]}…")
            entry.runs.append(found)
    return Comparison(work, entries, skipped)
