"""Decoding steps captured once per size, then replayed: one launch instead of hundreds.

Owns the captured steps and the tensors they read and write. A size is (sequences, blocks per sequence), both rounded
up; it is captured when it is needed for the second time, so the first step is run as it comes. Knows nothing of what
captures: on a card CUDAGraphs, in tests something that runs the step again. Invariant: a replay computes what the same
plan would compute uncaptured, and padding writes nothing: its slots are -1 and it has no queries.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from embedllm import ops
from embedllm.batch import Batch, round_rows
from embedllm.kv_cache import KVCache
from embedllm.plan_types import UNKNOWN, Plan
from embedllm.transfer import upload

LEAST_BLOCKS = 64  # of a sequence; powers of two from here on

log = logging.getLogger("embedllm")


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Queue it again."""


class Model(Protocol):
    """What a step needs of a model: the native decoder and the fallback both have it."""

    def forward(self, batch: Batch, kv: KVCache, between_layers: Callable[[], None] | None = None) -> Tensor:
        """Write the batch's KV, return hidden states [tokens, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states to float32 logits [rows, vocabulary]."""


class CUDAGraphs:
    """Captures on the current device. All graphs share one pool of memory, which nothing else uses."""

    def __init__(self) -> None:
        self._pool: Any = None  # outlives the graphs, so that others can be captured after all were dropped

    def __call__(self, run: Callable[[], None]) -> Graph:
        run()  # kernels are compiled, and cuBLAS has its workspace
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: the host program's, for all we know.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph


class DecodeGraphs:
    """Steps in which every sequence has one token and wants its logits.

    `capture(run)` calls `run`, any number of times, and returns what queues the same work again. `last_tokens` int32
    [rows]: ids that the host does not know yet.
    """

    def __init__(
        self,
        capture: Callable[[Callable[[], None]], Graph],
        model: Model,
        kv: KVCache,
        last_tokens: Tensor,
    ) -> None:
        self._capture, self._model, self._kv, self._last_tokens = capture, model, kv, last_tokens
        self._steps: dict[tuple[int, int], tuple[_Step, Graph]] = {}
        self._uses: Counter[tuple[int, int]] = Counter()
        self._is_broken = False

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, plan: Plan) -> Tensor | None:
        """Logits float32 [entries, vocabulary] in the plan's order, good until the next run; None to run it uncaptured.

        The plan's block copies were made before.
        """
        entries = plan.entries
        if self._is_broken or not all(
            len(entry.tokens) == entry.num_logits == 1 and not entry.wants_hidden for entry in entries
        ):
            return None
        blocks = max(LEAST_BLOCKS, max(len(entry.blocks) for entry in entries))
        size = round_rows(len(entries)), 1 << (blocks - 1).bit_length()
        if size not in self._steps:
            self._uses[size] += 1
            if self._uses[size] < 2 or not self._add(*size):
                return None
        step, graph = self._steps[size]
        step.fill(plan)
        graph.replay()
        return step.logits[: len(entries)]

    def _add(self, size: int, blocks: int) -> bool:
        step = _Step(size, blocks, self._model, self._kv, self._last_tokens)
        try:
            self._steps[size, blocks] = step, self._capture(step.run)
        except Exception:
            self._is_broken = True
            log.warning("a step of %d sequences could not be captured; steps run uncaptured", size, exc_info=True)
        return not self._is_broken

    def clear(self) -> None:
        """Drop all graphs and what they hold."""
        self._steps.clear()
        self._uses.clear()


class _Step:
    """The tensors of one captured step of `size` sequences with up to `blocks` blocks each."""

    def __init__(self, size: int, blocks: int, model: Model, kv: KVCache, last_tokens: Tensor) -> None:
        self._model, self._kv, self._last_tokens = model, kv, last_tokens
        self._sizes = [size, size, size, size + 1, size * blocks]
        num_given = sum(self._sizes)
        buffer = torch.zeros(num_given + 3 * size, dtype=torch.int32, device=kv.blocks.device)
        self._given = buffer[:num_given]  # by the host; the rest the device derives from it
        self._rows, self._known, positions, query_starts, tables = torch.split(self._given, self._sizes)
        positions.fill_(-1)
        ids, slots, seq_lens = torch.split(buffer[num_given:], size)
        self._batch = Batch(
            buffer=buffer,
            padded_ids=ids,
            padded_positions=positions,
            slots=slots,
            tables=tables.view(size, blocks),
            query_starts=query_starts,
            seq_lens=seq_lens,
            logit_rows=torch.arange(size, dtype=torch.int32, device=kv.blocks.device),
            hidden_rows=None,
            starts=list(range(size + 1)),
            lengths=[blocks * kv.block_size] * size,  # decides how attention is split, for any length it will meet
            num_tokens=size,
        )
        self.logits: Tensor

    def run(self) -> None:
        """What is captured."""
        batch = self._batch
        with torch.inference_mode():
            ops.prepare_decode(
                self._rows,
                self._known,
                self._last_tokens,
                batch.padded_positions,
                batch.tables,
                self._kv.block_size,
                ids=batch.padded_ids,
                slots=batch.slots,
                seq_lens=batch.seq_lens,
            )
            hidden = self._model.forward(batch, self._kv)
        with torch.no_grad():
            self.logits = self._model.logits(hidden)

    def fill(self, plan: Plan) -> None:
        """Queue a plan's numbers for the next replay; what is left of the size is padding, at position -1."""
        entries = plan.entries
        count = len(entries)
        packed = np.zeros(sum(self._sizes), np.int32)
        rows, known, positions, query_starts, flat_tables = np.split(packed, np.cumsum(self._sizes)[:-1])
        known[:count] = [entry.tokens[0] for entry in entries]
        rows[:count] = np.where(known[:count] == UNKNOWN, [entry.row for entry in entries], -1)
        positions[:count] = [entry.start for entry in entries]
        positions[count:] = -1
        query_starts[:] = np.minimum(np.arange(len(query_starts)), count)
        tables = flat_tables.reshape(len(positions), -1)
        held = np.array([len(entry.blocks) for entry in entries])
        tables[:count][np.arange(tables.shape[1]) < held[:, None]] = np.frombuffer(
            b"".join([entry.blocks for entry in entries]), np.int32
        )
        self._given.copy_(upload(torch.from_numpy(packed), self._given.device))
