"""Every engine of a comparison in a process of its own, so that none is slowed by what another keeps alive.

Thread pools, allocators and caches of compiled kernels belong to a process: two engines in one would share them. Owns
the child processes and what travels to and from them: plain numbers. Invariant: a child that has nothing to do takes no
CPU time, and none outlives the comparison.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from embedllm.bench.engines import Embedllm, Engine, Run
from embedllm.bench.workloads import Workload
from embedllm.errors import EmbedLLMError

CLOSE_SECONDS = 10.0


@dataclass(frozen=True)
class Recipe:
    """How to open an engine. model: a folder, a Hub id, or None for the model in the box at `box`."""

    name: str
    model: str | None
    box: str
    dtype: str
    device: str
    longest: int
    threads: int
    scratch: str

    def open(self) -> Engine:
        """The engine, in this process."""
        import torch

        torch.set_num_threads(self.threads)
        if self.name == "embedllm":
            return Embedllm(self.model, self.dtype, self.longest, self.device)
        source = self.model or self.box
        if self.name == "llama.cpp":
            from embedllm.bench.llama_cpp import LlamaCpp

            return LlamaCpp(Path(source), Path(self.scratch), self.dtype, self.longest, self.threads)
        from embedllm.bench.peers import HFContinuous, HFGenerate, load_transformers

        if self.name == "hf-cb":
            return HFContinuous(load_transformers(source, self.dtype, self.device, flash=True), self.longest)
        model = load_transformers(source, self.dtype, self.device)
        return HFGenerate(model, batch=1 if self.name == "hf" else 32)


class Apart(Engine):
    """An engine in a child process, opened and warmed up. Raises those of embedllm's errors that opening it raised."""

    def __init__(self, recipe: Recipe, limit: float | None = None) -> None:
        """limit: seconds that opening, and each run, may take; TimeoutError after them, and the process is ended."""
        context = multiprocessing.get_context("spawn")
        self.name, self._limit = recipe.name, limit
        self._line, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, recipe), name=f"bench-{recipe.name}", daemon=True)
        self._process.start()
        other.close()
        self.version = self._ask(None)

    def run(self, work: Workload) -> Run:
        found = self._ask(work)
        assert isinstance(found, Run)
        return found

    def _ask(self, work: Workload | None) -> Any:
        """Send a workload (or nothing, the first time) and wait for the answer."""
        try:
            if work is not None:
                self._line.send(work)
            in_time = self._line.poll(self._limit)
            answer = self._line.recv() if in_time else None
        except (EOFError, OSError) as error:
            self._process.join(CLOSE_SECONDS)
            raise RuntimeError(f"the process of {self.name} ended with exit code {self._process.exitcode}") from error
        if not in_time:
            self._process.kill()
            raise TimeoutError(f"{self.name} took over {self._limit:g} s")
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._line.close()
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()


def _serve(line: Connection, recipe: Recipe) -> None:
    """The child: open, warm up, then a workload in and a run out until the other end is closed."""
    try:
        engine = recipe.open()
        engine.warm_up()
        line.send(engine.version)
        while True:
            try:
                work = line.recv()
            except EOFError:
                break
            line.send(engine.run(work))
        engine.close()
    except (KeyboardInterrupt, BrokenPipeError):
        return  # the parent was interrupted too, and says so
    except EmbedLLMError as error:
        line.send(type(error)(str(error)))
    except Exception as error:
        line.send(RuntimeError(f"{recipe.name}: {error!r}"))
        raise
