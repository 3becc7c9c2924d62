"""Checkpoints of a training run, as one safetensors file: tensors by name, everything else as JSON in its header.

Invariant: a crash while saving leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

OptimiserState = dict[int, dict[str, Tensor]]  # number of the parameter -> name -> tensor


@dataclass(frozen=True)
class Checkpoint:
    """The weights, one state per optimiser, and plain facts."""

    model: dict[str, Tensor]
    optimisers: list[OptimiserState]
    facts: dict[str, Any]


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint and put it in the place of the last one."""
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.model.items()}
    for number, state in enumerate(checkpoint.optimisers):
        for index, values in state.items():
            tensors.update({f"optimiser/{number}/{index}/{name}": tensor for name, tensor in values.items()})
    facts = {**checkpoint.facts, "optimisers": len(checkpoint.optimisers)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"facts": json.dumps(facts)})
    os.replace(partial, path)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        model: dict[str, Tensor] = {}
        optimisers: list[OptimiserState] = [{} for _ in range(facts.pop("optimisers"))]
        for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
            kind, _, name = key.partition("/")
            if kind == "model":
                model[name] = file.get_tensor(key)
            else:
                number, index, name = name.split("/")
                optimisers[int(number)].setdefault(int(index), {})[name] = file.get_tensor(key)
    return Checkpoint(model, optimisers, facts)
