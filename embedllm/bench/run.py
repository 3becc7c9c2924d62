"""From the command line to figures: load everybody, let them take turns, report.

Owns the order of things. Invariants: in every round each engine does the same work once, alone. On a CPU the order
rotates, so that a machine getting slower or faster is felt by all; on a card one engine ends before the next opens,
since each takes what memory there is.
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
from embedllm.bench.engines import Engine, checked
from embedllm.bench.report import Comparison, Entry, envelope, machine
from embedllm.bench.workloads import workload
from embedllm.errors import InvalidRequest, MissingDependency, UnsupportedModel

BOX = Path(__file__).resolve().parents[1] / "demo" / "model"

Say = Callable[[str], None]


def run(args: argparse.Namespace) -> int:
    """Measure what `args` asks for; returns the exit code: 1 where a part of a probe failed."""
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
    return 1 if any(result.get("failed") for result in results) else 0


def _probe(name: str, say: Say) -> dict[str, Any]:
    probe = importlib.import_module(f"embedllm.bench.{name}")
    if name == "gpu":  # it takes minutes, and says each line when it has it
        return cast("dict[str, Any]", probe.measure(say=say).as_json())
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
        everybody = ["embedllm", *against]
        comparisons = [Comparison(work, []) for work in works]
        for group in [everybody] if args.device == "cpu" else [[name] for name in everybody]:
            engines, skipped = _open(model, Path(scratch), group, args, longest)
            try:
                for comparison in comparisons:
                    _take_turns(comparison, engines, args.rounds)
                    comparison.skipped |= skipped
                    if group[-1] == everybody[-1]:
                        say("\n" + comparison.table())
            finally:
                for engine in engines:
                    engine.close()
        return comparisons


def _size(model: Any, names: list[str], scale: float) -> tuple[int, int]:
    """Token ids the model has, and the longest request of the workloads."""
    config = (BOX if model is None else Path(model)) / "config.json"
    vocab_size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    if vocab_size is None:  # a Hub id, or a config that keeps it elsewhere
        with embedllm.LLM(model, tokenizer=None, num_kv_blocks=64, max_batch_tokens=64, progress=False) as llm:
            vocab_size = llm.info.vocab_size
    return vocab_size, max(workload(name, vocab_size, scale).longest for name in names)


def _open(
    model: Any, scratch: Path, names: list[str], args: argparse.Namespace, longest: int
) -> tuple[list[Engine], dict[str, str]]:
    """Those of the engines that can run here, warmed up; and why the others cannot."""
    import torch

    engines: list[Engine] = []
    skipped: dict[str, str] = {}
    try:
        for name in names:
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


def _take_turns(comparison: Comparison, engines: list[Engine], rounds: int) -> None:
    """Add these engines and their runs to the comparison."""
    entries = [Entry(engine.name, engine.version) for engine in engines]
    turns = list(zip(engines, entries, strict=True))
    for number in range(rounds):
        for engine, entry in turns[number % len(turns) :] + turns[: number % len(turns)]:
            gc.collect()
            entry.runs.append(checked(engine, comparison.work))
    comparison.entries += entries
