"""Runs a plan on a model: copies, forward, logits at the plan's positions.

Owns the order of those three and the model's and cache's lifetime. Knows plans, never sequences; samples nothing.
Invariant: a plan's block copies are done before any of its KV is written, and a run that raises has changed nothing but
KV that the plan itself was to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embedllm.batch import build
from embedllm.errors import EngineClosed
from embedllm.graphs import CUDAGraphs, DecodeGraphs, Graph, Model
from embedllm.kv_cache import KVCache
from embedllm.openmp import Team
from embedllm.plan_types import Plan
from embedllm.transfer import upload

LOGIT_ROWS = 16  # of one slice of prompt logprobs: 16 rows of 151,936 logits are 10 MB


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """logits float32 [num_logits, vocabulary], the plan's logit positions in the plan's order; the caller may write to
    them until the next step. hidden [rows, hidden]: every token of the entries that want them, in the plan's
    order, None if none.
    """

    logits: Tensor
    hidden: Tensor | None


class Runner:
    """One model on one KV cache, for up to `max_num_seqs` rows.

    depth: how many steps may be in flight; on a GPU one is launched while the one before it runs.
    """

    def __init__(self, model: Model, kv_cache: KVCache, max_num_seqs: int, captured: bool = False) -> None:
        """captured: on a GPU, decoding steps are captured and replayed; see DecodeGraphs."""
        self._model: Model | None = model
        self._kv = kv_cache
        self.device = kv_cache.blocks.device
        self._team = Team() if self.device.type == "cpu" else None
        self._has_entered = False
        self.depth = 1 if self.device.type == "cpu" else 2
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=self.device)  # of each row
        self._graphs: DecodeGraphs | None = None
        if captured and self.device.type == "cuda":
            self.capture(CUDAGraphs())

    def capture(self, capture: Callable[[Callable[[], None]], Graph]) -> None:
        """From now on, capture decoding steps and replay them. See DecodeGraphs."""
        self._graphs = DecodeGraphs(capture, self._open(), self._kv, self._last_tokens)

    @property
    def kv_cache(self) -> KVCache:
        return self._kv

    def __call__(self, plan: Plan, between_layers: Callable[[], None] | None = None) -> ModelOutput:
        """Run one step. `between_layers` is called before every layer; what it raises ends the step."""
        model = self._open()
        if self._team is not None:
            self._team.gather()
        elif not self._has_entered:
            self._enter()
        self._kv.copy_blocks(plan.copies)
        if self._graphs is not None:
            if between_layers is not None:
                between_layers()
            logits = self._graphs.run(plan)
            if logits is not None:
                return ModelOutput(logits, None)
        with torch.inference_mode():
            batch = build(plan, self._kv.block_size, self.device, self._last_tokens)
            hidden = model.forward(batch, self._kv, between_layers)
            asked = None if batch.hidden_rows is None else hidden.index_select(0, batch.hidden_rows)
            last = hidden.index_select(0, batch.logit_rows)
        with torch.no_grad():  # users' code gets the logits: an inference tensor would refuse its in-place operations
            return ModelOutput(model.logits(last), asked)

    def remember(self, rows: list[int], ids: Tensor) -> None:
        """Keep the ids [n] chosen for these rows on the device: the next step may be launched before they are read."""
        where = upload(torch.tensor(rows, dtype=torch.int64), self.device)
        self._last_tokens.index_copy_(0, where, ids.to(torch.int32))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits of rows of ModelOutput.hidden, a few rows at a time: float32 [at most LOGIT_ROWS, vocabulary] each."""
        model = self._open()
        for rows in torch.split(hidden, LOGIT_ROWS):
            with torch.no_grad():
                logits = model.logits(rows)
            yield logits

    def resize(self, num_blocks: int) -> None:
        """Another number of blocks, which hold nothing. The old ones' memory goes back first: never two caches at once.

        Raises OutOfMemory where the system gives no memory for so many.
        """
        if self._graphs is not None:
            self._graphs.clear()
        self._kv.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._kv.allocate(num_blocks)

    def _enter(self) -> None:
        """The thread that runs steps gets the device and a stream of its own; other threads keep theirs."""
        torch.cuda.set_device(self.device)
        torch.cuda.synchronize()  # the weights, which another thread's stream has put there
        torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
        self._has_entered = True

    def close(self) -> None:
        """Drop the model and give the cache's memory back. Idempotent."""
        self._model = None
        if self._graphs is not None:
            self._graphs.clear()
        self._graphs = None
        self._kv.free()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _open(self) -> Model:
        if self._model is None:
            raise EngineClosed("the runner is closed")
        return self._model
