"""Picks, for each operation of a step, the implementation that fits where its tensors are.

Owns that choice and what has to be prepared once per step. Knows no model. Invariant: whatever is picked computes what
`embedllm_kernels.reference` defines; what is in place here (`rotary_`) says so in its name.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

from embedllm.batch import Batch
from embedllm.errors import InvalidRequest, MissingDependency
from embedllm.kv_cache import KVCache
from embedllm_kernels import reference
from embedllm_kernels.cpu import attention as cpu_attention

route = reference.route
soft_cap = reference.soft_cap


def angles(positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `rotary_`, [tokens, 1, 2·d]; computed in float32 and then rounded to dtype.

    positions [tokens]; frequencies float32 [d], radians per position.
    """
    turn = positions[:, None].float() * frequencies  # [tokens, d]
    cos, sin = turn.cos(), turn.sin()
    if amplitude != 1.0:
        cos, sin = cos * amplitude, sin * amplitude
    return (
        torch.cat((cos, cos), -1).to(dtype)[:, None],
        torch.cat((-sin, sin), -1).to(dtype)[:, None],
    )


def rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """reference.rotary in place, pairs (i, i + d). x [tokens, heads, head_dim], cos and sin from `angles`."""
    size = cos.shape[-1]
    turned = x if size == x.shape[-1] else x[..., :size]
    swapped = torch.roll(turned, size // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)


class Attention(Protocol):
    """One step's attention: where its tokens' KV goes, and which blocks each of them sees. Made once per step."""

    def angles(self, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What `enter` turns by, for one kind of rope. frequencies float32 [d], radians per position."""

    def enter(self, layer: int, qkv: Tensor, norms: tuple[Any, ...], angles: tuple[Tensor, Tensor] | None) -> None:
        """Norm and turn queries and keys in place; put keys and values into the layer's cache.

        qkv [padded, heads · k_dim + width]; norms: none, one per head over both, or one over all queries and one over
        all keys. angles from `angles`, None where the layer knows no positions.
        """

    def store(self, layer: int, rows: Tensor) -> None:
        """Put the step's tokens into the layer's cache. rows [tokens, width]: key heads, then value heads."""

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


def device_named(device: str) -> torch.device:
    """The device that an option names. Raises InvalidRequest for one that is not here or cannot run the kernels."""
    if device == "auto":
        return torch.device("cpu")  # until the kernels have run on a card: docs/decisions/0013
    try:
        known = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidRequest(f"device={device!r} is not a device; use 'auto', 'cpu' or 'cuda'") from error
    if known.type == "cpu":
        return known
    if known.type != "cuda":
        raise InvalidRequest(f"device={device!r} is not supported; use 'cpu' or 'cuda'")
    if not torch.cuda.is_available() or (known.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"device={device!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    if str(known) == "cuda":
        known = torch.device("cuda", torch.cuda.current_device())
    if torch.cuda.get_device_capability(known) < (8, 0):
        name = torch.cuda.get_device_name(known)
        raise InvalidRequest(f"{name} is too old for the kernels, which need compute capability 8.0; use device='cpu'")
    if importlib.util.find_spec("triton") is None:
        raise MissingDependency("device='cuda' needs Triton, which CUDA builds of torch bring: pip install triton")
    return known


def on_gpu(device: torch.device) -> bool:
    """Whether Triton kernels compute there."""
    return device.type == "cuda"


def block_copy(blocks: Tensor, source: Tensor, destination: Tensor) -> None:
    """reference.block_copy in place; on a GPU no destination may be a source as well."""
    if on_gpu(blocks.device):
        from embedllm_kernels.triton.copy import block_copy as copy

        copy(blocks, source, destination)
    else:
        blocks.index_copy_(0, destination, blocks.index_select(0, source))


def prepare_decode(
    rows: Tensor,
    known: Tensor,
    last_tokens: Tensor,
    positions: Tensor,
    tables: Tensor,
    block_size: int,
    *,
    ids: Tensor,
    slots: Tensor,
    seq_lens: Tensor,
) -> None:
    """reference.prepare_decode, on a GPU in one launch."""
    if on_gpu(rows.device):
        from embedllm_kernels.triton.prepare import prepare_decode as prepare
    else:
        prepare = reference.prepare_decode
    prepare(rows, known, last_tokens, positions, tables, block_size, ids=ids, slots=slots, seq_lens=seq_lens)


def attention(batch: Batch, kv: KVCache, num_heads: int) -> Attention:
    """The attention of one step where its tensors are."""
    if on_gpu(kv.blocks.device):
        from embedllm import gpu

        return gpu.Attention(batch, kv, num_heads)
    return CPUAttention(batch, kv, num_heads)


class CPUAttention:
    """Attention on a CPU; what depends on a window is prepared when the first layer with that window asks."""

    def __init__(self, batch: Batch, kv: KVCache, num_heads: int) -> None:
        self._batch, self._kv, self._num_heads = batch, kv, num_heads
        self._row_index = kv.row_index(batch.slots)
        self._tables = batch.tables.long()
        self._groups: dict[tuple[int | None, bool], list[cpu_attention.Group]] = {}

    def angles(self, frequencies: Tensor, amplitude: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return angles(self._batch.padded_positions, frequencies, amplitude, dtype)

    def enter(self, layer: int, qkv: Tensor, norms: tuple[Any, ...], angles: tuple[Tensor, Tensor] | None) -> None:
        group, heads = self._kv.group, self._num_heads
        q_size, k_size = heads * group.k_dim, group.kv_heads * group.k_dim
        turned = qkv[:, : q_size + k_size].view(len(qkv), heads + group.kv_heads, group.k_dim)
        if len(norms) == 1:
            turned.copy_(norms[0](turned))
        elif norms:
            for part, norm in zip((qkv[:, :q_size], qkv[:, q_size : q_size + k_size]), norms, strict=True):
                part.copy_(norm(part))
        if angles is not None:
            rotary_(turned, *angles)
        self.store(layer, qkv[: self._batch.num_tokens, q_size:])

    def store(self, layer: int, rows: Tensor) -> None:
        self._kv.rows(layer).index_copy_(0, self._row_index, rows)

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
        cache = self._kv.layer(layer)
        exact = softcap is not None or sinks is not None
        groups = self._groups.get((window, exact))
        if groups is None:
            groups = self._groups[window, exact] = cpu_attention.prepare(
                self._tables,
                self._batch.starts,
                self._batch.lengths,
                block_size=self._kv.block_size,
                slot_bytes=self._kv.group.width * cache.dtype.itemsize,
                num_heads=self._num_heads,
                dtype=q.dtype,
                window=window,
                exact=exact,
            )
        return cpu_attention.paged_attention(
            q,
            cache,
            groups,
            num_kv_heads=self._kv.group.kv_heads,
            scale=scale,
            out=out,
            softcap=softcap,
            sinks=sinks,
        )
