"""Every operation in plain torch: the specification, and the oracle that every faster twin is tested against.

Written for reading, not for speed: attention walks over the sequences one by one and holds one sequence's scores at a
time. Statistics (norms, softmax, the router's) are float32 whatever the inputs are, results have the inputs' dtype.
Knows no model. Invariant: only `kv_store`, `block_copy` and `prepare_decode` write to an argument, and a slot that no
token of the batch has written is never part of a result, even where it holds NaN.

Layout of KV: a layer's cache is [num_blocks, block_size, width]; one token's row holds its key heads, then its value
heads: width = num_kv_heads * (k_dim + v_dim). Position p of a sequence is in block table[p // block_size], at offset
p % block_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "block_copy",
    "gated",
    "kv_store",
    "linear",
    "moe",
    "paged_attention",
    "prepare_decode",
    "rms_norm",
    "rotary",
    "route",
    "soft_cap",
]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv:1910.07467).

    x [..., n], weight [n] or any shape that broadcasts to x. All in float32, rounded once to x's dtype.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is rounded to x's dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(x · weightᵀ + bias) · factor + residual, each where given.

    x [tokens, in], weight [out, in], bias [out], residual and factor [tokens, out].
    """
    y = F.linear(x, weight, bias)
    if activation is not None:
        y = activate(y, activation)
    if factor is not None:
        y = y * factor
    return y if residual is None else y + residual


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first 2·d dimensions of every head by the token's angles (arXiv:2104.09864); the rest is kept.

    x [tokens, heads, head_dim]; cos, sin [tokens, d], 2·d <= head_dim. The pairs are (i, i + d), or (2i, 2i + 1) where
    `interleaved`.
    """
    d = cos.shape[-1]
    turned, kept = x[..., : 2 * d], x[..., 2 * d :]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [tokens, 1, d]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        both = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., :d], turned[..., d:]
        both = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((both, kept), -1)


def gated(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) · up, where gate_up [tokens, 2·n] = [gate; up] (arXiv:2002.05202).

    activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU with the tanh form of GELU).
    """
    gate, up = gate_up.chunk(2, -1)
    return activate(gate, activation) * up


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by name: "silu" or "gelu_tanh"; ValueError for another."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    raise ValueError(f"activation {activation!r} is not known; there are 'silu' and 'gelu_tanh'")


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): about x near 0, never beyond ±cap."""
    return torch.tanh(x / cap) * cap


def route(logits: Tensor, num_chosen: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The experts of each token: (weights float32, ids int64), both [tokens, num_chosen].

    logits [tokens, experts]. Weights are the softmax over all experts at the chosen ones, scaled to sum 1 where
    `renormalise`.
    """
    weights, ids = torch.softmax(logits.float(), -1).topk(num_chosen, -1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


def moe(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, activation: str = "silu") -> Tensor:
    """Σ over a token's experts e of weight · down[e](gated(gate_up[e](x))).

    x [tokens, H]; weights, ids [tokens, chosen]; gate_up [experts, 2·I, H]; down [experts, H, I].
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(ids).tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        y = F.linear(gated(F.linear(x[token], gate_up[expert]), activation), down[expert])
        out.index_add_(0, token, y.float() * weights[token, choice, None].float())
    return out.to(x.dtype)


def kv_store(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Write token t's row to slot slots[t] = block · block_size + offset. Writes to `cache`.

    cache [num_blocks, block_size, width]; rows [tokens, width]; slots [tokens] of any integer type, no two equal.
    """
    block_size = cache.shape[1]
    slots = slots.long()
    cache[slots // block_size, slots % block_size] = rows.to(cache.dtype)


def block_copy(blocks: Tensor, source: Tensor, destination: Tensor) -> None:
    """blocks[destination[i]] = blocks[source[i]], all reads before all writes. Writes to `blocks`.

    blocks [num_blocks, ...] (a whole block, all its layers); source, destination [copies], destinations all different.
    """
    blocks[destination.long()] = blocks[source.long()]


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
    """What a step reads that computes one token of each of n entries. Writes to ids, slots and seq_lens [n].

    positions [n]: where in its sequence the token stands; -1 for padding, which gets id 0, slot -1 and length 0.
    rows [n]: the row of last_tokens [rows] with the token's id; -1 where known [n] has it.
    tables [n, max_blocks]: block ids. Entry i's slot is block · block_size + offset, its length positions[i] + 1.
    """
    real, place = positions >= 0, positions.clamp(min=0).long()
    newest = last_tokens[rows.clamp(min=0).long()]
    block = tables.gather(1, (place // block_size)[:, None])[:, 0]
    ids.copy_(torch.where(real, torch.where(rows >= 0, newest, known), 0))
    slots.copy_(torch.where(real, block * block_size + place % block_size, -1))
    seq_lens.copy_(positions + 1)


def paged_attention(
    q: Tensor,
    cache: Tensor,
    tables: Tensor,
    query_starts: Tensor,
    seq_lens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Causal attention of a ragged batch over block tables: [tokens, heads, v_dim].

    q [tokens, heads, k_dim]: sequence i's queries are rows query_starts[i] .. query_starts[i + 1] - 1, its *last*
    positions, the newest being seq_lens[i] - 1. Their keys and values are in the cache already.
    tables [sequences, max_blocks]: block ids, read as far as seq_lens[i] needs. num_kv_heads divides heads.
    window: a query sees that many tokens, itself included. softcap: cap on scale · q·k before the mask.
    sinks [heads]: a logit per head that takes part in the softmax and adds no value (arXiv:2309.17453).
    k_scale, v_scale: keys and values are the cache's times these, whose type may be float8_e4m3fn.
    """
    heads, k_dim = q.shape[1:]
    width = cache.shape[2]
    v_dim = width // num_kv_heads - k_dim
    out = torch.zeros(q.shape[0], heads, v_dim, dtype=q.dtype, device=q.device)
    for i, length in enumerate(seq_lens.tolist()):
        first, last = query_starts[i : i + 2].tolist()
        rows = _rows_of(cache, tables[i], length)  # [length, width]: no slot beyond the sequence is read
        k = rows[:, : num_kv_heads * k_dim].view(length, num_kv_heads, k_dim).float() * k_scale
        v = rows[:, num_kv_heads * k_dim :].view(length, num_kv_heads, v_dim).float() * v_scale
        position = torch.arange(length - (last - first), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)[None]
        seen = key <= position
        if window is not None:
            seen &= key > position - window
        out[first:last] = _attend(q[first:last], k, v, seen, scale, softcap, sinks)
    return out


def _rows_of(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The rows of a sequence's tokens in order. The physical block is looked up per token, in int64."""
    position = torch.arange(length, device=cache.device)
    return cache[table.long()[position // cache.shape[1]], position % cache.shape[1]]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [n, heads, k_dim], float32 k [m, kv_heads, k_dim] and v [m, kv_heads, v_dim], seen [n, m] → as q."""
    shared = q.shape[1] // k.shape[1]  # query heads per KV head
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k.repeat_interleave(shared, 1)) * scale
    if softcap is not None:
        scores = soft_cap(scores, softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
        scores = torch.cat((scores, sink), -1)
    share = torch.softmax(scores, -1)[..., : k.shape[0]]
    return torch.einsum("hnm,mhd->nhd", share, v.repeat_interleave(shared, 1)).to(q.dtype)
