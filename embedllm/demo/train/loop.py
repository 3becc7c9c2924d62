"""The training loop: time-budgeted, pausable, and resumable from an atomic checkpoint.

float32 masters are updated from the gradients of a bfloat16 copy. Time spent paused does not count. Invariant: a run
that was stopped and resumed sees the same batches, and the same losses up to rounding, as one that was not.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import Checkpoint, load, save
from .model import BoxModel, ModelConfig
from .optimiser import optimisers, set_rate
from .packing import MIXES, Batches, Mixes, Pool

STAGES = ((0.0, 512), (0.4, 1024), (0.8, 2048))  # from this progress on, windows of this many tokens


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run is told. `minutes` is its budget of active time; `folder` takes checkpoints."""

    folder: Path
    minutes: float
    batch_tokens: int = 8192
    device: str = "cpu"
    compile: bool = True
    pause_file: Path | None = None
    checkpoint_every: float = 180.0
    log_every: int = 10
    clock: Callable[[], float] = time.monotonic


class Trainer:
    """The state of a run: masters, working copy, optimisers, batches, step and seconds spent."""

    def __init__(self, config: ModelConfig, run: Run, pools: dict[str, Pool], mixes: Mixes = MIXES) -> None:
        self.config = config
        self.run = run
        self.mixes = mixes
        self.batches = Batches(pools)
        self.masters = BoxModel(config).to(run.device)
        self.working = copy.deepcopy(self.masters).to(torch.bfloat16)
        self.optimisers = optimisers(self.masters)
        self.forward = torch.compile(self.working, dynamic=False) if run.compile else self.working
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @property
    def progress(self) -> float:
        return self.seconds / (self.run.minutes * 60)

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write the checkpoint."""
        facts = {
            "config": self.config.as_dict(),
            "counts": self.batches.counts,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        states = [optimiser.state_dict()["state"] for optimiser in self.optimisers]
        save(self.checkpoint, Checkpoint(self.masters.state_dict(), states, facts))

    def resume(self) -> bool:
        """Load the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return False
        saved = load(self.checkpoint)
        self.masters.load_state_dict(saved.model)
        for optimiser, state in zip(self.optimisers, saved.optimisers, strict=True):
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.batches.counts = saved.facts["counts"]
        self.step, self.seconds, self.losses = (saved.facts[name] for name in ("step", "seconds", "losses"))
        self._refresh()
        return True

    def _refresh(self) -> None:
        with torch.no_grad():
            for working, master in zip(self.working.parameters(), self.masters.parameters(), strict=True):
                working.copy_(master)

    def train_step(self) -> float:
        """One batch; returns its loss in nats per token."""
        tokens = max(size for start, size in STAGES if self.progress >= start)
        tokens = min(tokens, self.config.context, self.run.batch_tokens)
        shares = [shares for start, shares in self.mixes if self.progress >= start][-1]
        inputs, targets = self.batches.next(self.step, self.run.batch_tokens // tokens, tokens, shares)
        loss: torch.Tensor = self.forward(inputs.to(self.run.device), targets.to(self.run.device))
        loss.backward()  # type: ignore[no-untyped-call]
        for working, master in zip(self.working.parameters(), self.masters.parameters(), strict=True):
            assert working.grad is not None
            master.grad = working.grad.float()
            working.grad = None
        set_rate(self.optimisers, self.progress)
        for optimiser in self.optimisers:
            optimiser.step()
        self._refresh()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def wait_while_paused(self) -> None:
        """Save and sleep while the pause file exists."""
        if self.run.pause_file is not None and self.run.pause_file.exists():
            self.save()
            while self.run.pause_file.exists():
                time.sleep(1.0)

    def train(self, log: Callable[[str], None] = print, max_steps: int | None = None) -> None:
        """Train until the budget is spent, or for some steps."""
        last_save = self.seconds
        done = 0
        while self.progress < 1.0 and (max_steps is None or done < max_steps):
            self.wait_while_paused()
            before = self.run.clock()
            self.train_step()
            done += 1
            self.seconds += self.run.clock() - before
            if self.step % self.run.log_every == 0:
                recent = self.losses[-self.run.log_every :]
                log(
                    f"step {self.step}  {self.seconds:.0f} s  loss {sum(recent) / len(recent):.3f}  {self.progress:.1%}"
                )
            if self.seconds - last_save >= self.run.checkpoint_every:
                self.save()
                last_save = self.seconds
        self.save()
