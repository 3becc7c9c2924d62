"""What a step calls on a CUDA device: Triton kernels, and cuBLAS for the products.

Owns the twins of `ops.CPUAttention` and of the parts in `layers`. Imported only for a model on such a device.
Invariant: nothing here waits for the device; what is handed in as `residual` may be written to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedllm.batch import Batch
from embedllm.kv_cache import KVCache
from embedllm_kernels import reference
from embedllm_kernels.triton.attention import paged_attention, workspace_size
from embedllm_kernels.triton.gated import gated
from embedllm_kernels.triton.moe import moe
from embedllm_kernels.triton.norm import rms_norm
from embedllm_kernels.triton.rotary_store import kv_store, rotary_store


@dataclass(frozen=True, slots=True)
class _Part:
    """Entries of a batch that one launch computes. `queries`, `longest`: most query tokens and longest sequence."""

    tokens: slice
    tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    queries: int
    longest: int
    workspace: Tensor | None


class Attention:
    """One step's attention in two launches: sequences with one query token by the split form, then all others.

    A batch's entries are sorted by their number of tokens, so those with one are its first.
    """

    def __init__(self, batch: Batch, kv: KVCache, num_heads: int) -> None:
        self._batch, self._kv, self._num_heads = batch, kv, num_heads
        counts = [after - before for before, after in zip(batch.starts, batch.starts[1:], strict=False)]
        ones = next((i for i, count in enumerate(counts) if count > 1), len(counts))
        spans = [(0, ones), (ones, len(counts))]
        self._parts = [self._part(first, last, max(counts[first:last])) for first, last in spans if first < last]

    def _part(self, first: int, last: int, queries: int) -> _Part:
        batch, group = self._batch, self._kv.group
        begin, end = batch.starts[first], batch.starts[last]
        starts = batch.query_starts[first : last + 1]
        longest = max(batch.lengths[first:last])
        size = workspace_size(
            num_tokens=end - begin,
            num_sequences=last - first,
            num_heads=self._num_heads,
            num_kv_heads=group.kv_heads,
            v_dim=group.v_dim,
            max_query_len=queries,
            max_seq_len=longest,
            device=batch.buffer.device,
        )
        return _Part(
            tokens=slice(begin, end),
            tables=batch.tables[first:last],
            query_starts=starts - begin if begin else starts,
            seq_lens=batch.seq_lens[first:last],
            queries=queries,
            longest=longest,
            workspace=torch.empty(size, dtype=torch.float32, device=batch.buffer.device) if size else None,
        )

    def angles(self, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the step's positions, float32 [tokens, d]."""
        turn = self._batch.positions[:, None].float() * frequencies
        cos, sin = turn.cos(), turn.sin()
        return (cos, sin) if amplitude == 1.0 else (cos * amplitude, sin * amplitude)

    def enter(self, layer: int, qkv: Tensor, norms: tuple[Norm, ...], angles: tuple[Tensor, Tensor] | None) -> None:
        """Norm and turn queries and keys in place; put keys and values into the layer's cache.

        qkv [padded, heads · k_dim + width]; norms: none, one per head over both, or one over all queries and one over
        all keys. angles from `angles`, None where the layer knows no positions.
        """
        kv_heads, k_dim = self._kv.group.kv_heads, self._kv.group.k_dim
        qkv = qkv[: self._batch.num_tokens]
        q_size = self._num_heads * k_dim
        per_head = norms[0] if len(norms) == 1 else None
        if per_head is not None and angles is None:
            each = qkv[:, : q_size + kv_heads * k_dim].view(len(qkv), self._num_heads + kv_heads, k_dim)
            rms_norm(each, per_head.weight, per_head.eps, out=each)
        elif per_head is None and norms:
            for norm, part in zip(norms, (qkv[:, :q_size], qkv[:, q_size : q_size + kv_heads * k_dim]), strict=True):
                rms_norm(part, norm.weight, norm.eps, out=part)
        if angles is None:
            self.store(layer, qkv[:, q_size:])
            return
        rotary_store(
            qkv,
            *angles,
            self._kv.layer(layer),
            self._batch.slots,
            num_heads=self._num_heads,
            num_kv_heads=kv_heads,
            q_weight=None if per_head is None else per_head.weight[: self._num_heads],
            k_weight=None if per_head is None else per_head.weight[self._num_heads :],
            eps=0.0 if per_head is None else per_head.eps,
        )

    def store(self, layer: int, rows: Tensor) -> None:
        """Put the step's tokens into the layer's cache. rows [tokens, width]: key heads, then value heads."""
        kv_store(self._kv.layer(layer), rows, self._batch.slots)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        out: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """reference.paged_attention over the layer's cache. q [tokens, heads, k_dim]; out is written and returned."""
        for part in self._parts:
            paged_attention(
                q[part.tokens],
                self._kv.layer(layer),
                part.tables,
                part.query_starts,
                part.seq_lens,
                num_kv_heads=self._kv.group.kv_heads,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                out=out[part.tokens],
                max_query_len=part.queries,
                max_seq_len=part.longest,
                workspace=part.workspace,
            )
        return out


class Norm:
    """RMS norm over the last dimension, or of each head with a weight of its own."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight [n], or [heads, n] for inputs [..., heads, n]."""
        self.weight, self.eps = weight.float(), eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear:
    """A weight as it is, multiplied by cuBLAS."""

    reason = "weights on a CUDA device are not packed"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = True) -> None:
        self.weight, self.bias = weight, bias
        self.shape = (weight.shape[0], weight.shape[1])
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x · Wᵀ + b, added to the residual in place where one is given: the product's own epilogue adds it."""
        if residual is None:
            return F.linear(x, self.weight, self.bias)
        residual.addmm_(x, self.weight.t())
        return residual if self.bias is None else residual.add_(self.bias)


class MLP:
    """down(act(gate) · up), gate and up in one product."""

    def __init__(
        self, gate_up: Tensor, down: Tensor, activation: str, biases: tuple[Tensor | None, Tensor | None], pack: bool
    ) -> None:
        """gate_up [2 · inner, hidden] = [gate; up], down [hidden, inner], and their biases."""
        self.gate_up, self.down = Linear(gate_up, biases[0]), Linear(down, biases[1])
        self.activation = activation

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down(gated(self.gate_up(x), self.activation), residual)

    @property
    def linears(self) -> list[Linear]:
        return [self.gate_up, self.down]


class Experts:
    """A mixture of experts, all of them in two grouped products."""

    def __init__(
        self,
        router: Linear,
        gate_up: Tensor,
        down: Tensor,
        activation: str,
        num_chosen: int,
        renormalise: bool,
        pack: bool,
    ) -> None:
        """gate_up [experts, 2 · inner, hidden], down [experts, hidden, inner]."""
        self.router, self.gate_up, self.down = router, Linear(gate_up), Linear(down)
        self.activation, self.num_chosen, self.renormalise = activation, num_chosen, renormalise

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weights, ids = reference.route(self.router(x), self.num_chosen, self.renormalise)
        y = moe(x, weights, ids, self.gate_up.weight, self.down.weight, self.activation)
        return y if residual is None else residual.add_(y)

    @property
    def linears(self) -> list[Linear]:
        return [self.router, self.gate_up, self.down]
