"""Ragged paged attention by groups: sequences with equally many queries and similar lengths run as one batch.

softmax(scale · q·kᵀ + mask) · v per sequence, as reference.paged_attention defines it. A group's blocks are gathered
into one contiguous buffer and go through torch's fused attention; a soft cap or sinks, which that has not, are computed
in float32. What depends on the step and not on the layer (which blocks, which mask) is prepared once per step.
Invariant: every gathered slot that holds no token of its sequence is zeroed before it is used, so that NaN left there
by an earlier owner cannot reach a result (0 · NaN is NaN, and so is NaN - inf: a mask alone does not do it).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Measured at 14 heads, 2 KV heads, head_dim 64, bfloat16, 2 cores: a group costs about 40 µs however small it is, and a
# slot 0.073 µs, so splitting a group pays once it saves this many slots of padding.
SPLIT_SLOTS = 512
MAX_GATHER_BYTES = 32 * 2**20  # of one group with several sequences; one long sequence may take more
MAX_GROUPED_QUERIES = 8  # longer chunks go one by one: they are large enough alone
MAX_MASK = 2**22  # queries · keys of one group
MAX_SCORES = 2**24  # heads · queries · keys where scores are held in float32


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that run as one batch of `size`, each with `queries` queries and `length` gathered slots.

    first: the group's first row of q. blocks [size · blocks_each] int64. stale: rows of the gathered buffer that hold
    no token, None where there are none. mask: added to the scores, [size, 1, 1, length] for one query each (all heads
    alike), else [size, queries, length]; None where every query sees every slot. causal: one whole sequence from
    position 0, which needs no mask at all.
    """

    first: int
    size: int
    queries: int
    length: int
    blocks: Tensor
    stale: Tensor | None
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence's part of a group: `queries` rows of q from `first`, the last of its first `length` tokens."""

    index: int
    first: int
    queries: int
    length: int
    skipped: int  # leading blocks that the window hides from all its queries

    def slots(self, block_size: int) -> int:
        return -(-self.length // block_size) * block_size - self.skipped * block_size


def prepare(
    tables: Tensor,
    query_starts: Sequence[int],
    seq_lens: Sequence[int],
    *,
    block_size: int,
    slot_bytes: int,
    num_heads: int,
    dtype: torch.dtype,
    window: int | None = None,
    exact: bool = False,
) -> list[Group]:
    """What a step's attention will run, for all layers with this window.

    tables [sequences, max_blocks] int64, padded with any valid block id. Sequences beside each other with equally many
    queries are grouped, so the caller sorts them by (queries, length). exact: scores are held in float32 (soft cap or
    sinks), which bounds the groups' sizes more tightly.
    """
    most = MAX_SCORES // num_heads if exact else MAX_MASK
    spans = list(_spans(query_starts, seq_lens, block_size, window, most))
    groups = []
    start = 0
    while start < len(spans):
        end = _group_end(spans, start, block_size, slot_bytes, most)
        groups.append(_group(spans[start:end], tables, block_size, window, dtype))
        start = end
    return groups


def _spans(
    query_starts: Sequence[int], seq_lens: Sequence[int], block_size: int, window: int | None, most: int
) -> Iterator[_Span]:
    """The sequences, long chunks cut into tiles so that queries · keys stays below `most`."""
    for index, length in enumerate(seq_lens):
        first, last = query_starts[index], query_starts[index + 1]
        tile = max(1, min(last - first, most // length))
        for row in range(first, last, tile):
            queries = min(tile, last - row)
            end = length - (last - row) + queries  # tokens up to the tile's last query
            seen_from = 0 if window is None else max(0, end - queries + 1 - window)
            yield _Span(index, row, queries, end, seen_from // block_size)


def _group_end(spans: list[_Span], start: int, block_size: int, slot_bytes: int, most: int) -> int:
    """Where the group that starts at `start` ends: at another shape, at too much padding, or at too much memory."""
    queries = spans[start].queries
    if queries > MAX_GROUPED_QUERIES:
        return start + 1
    longest = used = 0
    for end in range(start, len(spans)):
        span, size = spans[end], end - start + 1
        slots = span.slots(block_size)
        longest, used = max(longest, slots), used + slots
        too_large = size * longest * slot_bytes > MAX_GATHER_BYTES or size * longest * queries > most
        if span.queries != queries or (size > 1 and (too_large or size * longest - used > SPLIT_SLOTS)):
            return end
    return len(spans)


def _group(spans: list[_Span], tables: Tensor, block_size: int, window: int | None, dtype: torch.dtype) -> Group:
    head = spans[0]
    queries = head.queries
    if len(spans) == 1:  # the buffer is cut at the sequence's end, so no slot in it is stale
        num_blocks = -(-head.length // block_size)
        blocks = tables[head.index, head.skipped : num_blocks]
        length = head.length - head.skipped * block_size
        causal = length == queries and (window is None or window >= length)
        hidden = queries > 1 or (window is not None and length > window)
        mask = _mask([head], length, block_size, window, dtype) if hidden and not causal else None
        return Group(head.first, 1, queries, length, blocks, None, mask, causal and queries > 1)
    length = max(span.slots(block_size) for span in spans)
    columns = length // block_size
    index = torch.tensor([span.index for span in spans])
    if any(span.skipped for span in spans):
        skipped = torch.tensor([span.skipped for span in spans])[:, None]
        wanted = (skipped + torch.arange(columns)).clamp_(max=tables.shape[1] - 1)
        blocks = tables[index].gather(1, wanted)
    else:
        blocks = tables[index, :columns]
    lengths = torch.tensor([span.length - span.skipped * block_size for span in spans])
    stale = (torch.arange(length) >= lengths[:, None]).flatten().nonzero().flatten()
    plain = queries == 1 and not stale.numel() and (window is None or length <= window)
    mask = None if plain else _mask(spans, length, block_size, window, dtype)
    return Group(
        head.first, len(spans), queries, length, blocks.reshape(-1), stale if stale.numel() else None, mask, False
    )


def _mask(spans: list[_Span], length: int, block_size: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a slot, -inf elsewhere: [size, queries, length], or [size, 1, 1, length] for one query."""
    queries = spans[0].queries
    newest = torch.tensor([span.length - span.skipped * block_size - 1 for span in spans])
    position = newest[:, None, None] - torch.arange(queries - 1, -1, -1)[:, None]  # [size, queries, 1]
    slot = torch.arange(length)
    hidden = slot > position
    if window is not None:
        hidden |= slot <= position - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask[:, None] if queries == 1 else mask


def paged_attention(
    q: Tensor,
    cache: Tensor,
    groups: Sequence[Group],
    *,
    num_kv_heads: int,
    scale: float,
    out: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """reference.paged_attention for prepared groups, written to out [tokens, heads, v_dim], which is returned.

    q [tokens, heads, k_dim] may be a view of a wider buffer.
    """
    heads, k_dim = q.shape[1:]
    v_dim = out.shape[2]
    split = num_kv_heads * k_dim
    for group in groups:
        rows = cache.index_select(0, group.blocks).view(-1, cache.shape[2])
        if group.stale is not None:
            rows.index_fill_(0, group.stale, 0.0)
        if group.size == 1:
            rows = rows[: group.length]
        shape = (group.size, group.length, num_kv_heads)
        k = rows[:, :split].view(*shape, k_dim).transpose(1, 2)  # [size, kv_heads, length, k_dim]
        v = rows[:, split:].view(*shape, v_dim).transpose(1, 2)
        last = group.first + group.size * group.queries
        queries, result = q[group.first : last], out[group.first : last]
        if softcap is not None or sinks is not None:
            _exact(queries, k, v, group, scale, softcap, sinks, result)
        elif group.queries == 1:
            # One query: the heads that share a KV head take the place of its queries.
            folded = queries.view(group.size, num_kv_heads, heads // num_kv_heads, k_dim)
            y = F.scaled_dot_product_attention(folded, k, v, attn_mask=group.mask, scale=scale)
            result.view(y.shape).copy_(y)
        else:
            by_head = queries.view(group.size, group.queries, heads, k_dim).transpose(1, 2)
            y = F.scaled_dot_product_attention(
                by_head,
                k,
                v,
                attn_mask=None if group.mask is None else group.mask[:, None],
                is_causal=group.causal,
                scale=scale,
                enable_gqa=heads != num_kv_heads,
            )
            result.view(group.size, group.queries, heads, v_dim).copy_(y.transpose(1, 2))
    return out


def _exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    result: Tensor,
) -> None:
    """Scores in float32, written out: for a soft cap and sinks."""
    size, queries, heads, kv_heads = group.size, group.queries, q.shape[1], k.shape[1]
    shared = heads // kv_heads
    folded = q.view(size, queries, kv_heads, shared, -1).permute(0, 2, 3, 1, 4)  # [size, kv, shared, queries, d]
    flat = folded.reshape(size, kv_heads, shared * queries, -1)
    scores = torch.matmul(flat.float(), k.float().transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.view(size, kv_heads, shared, queries, group.length)
    mask = group.mask
    if group.causal:
        mask = torch.full((queries, queries), -torch.inf).triu_(1)
    elif mask is not None and queries > 1:
        mask = mask[:, None, None]
    elif mask is not None:
        mask = mask[:, None]
    if mask is not None:
        scores += mask
    if sinks is not None:
        sink = sinks.float().view(kv_heads, shared, 1, 1).expand(size, -1, -1, queries, 1)
        scores = torch.cat((scores, sink), -1)
    share = torch.softmax(scores, -1)[..., : group.length]
    y = torch.matmul(share.reshape(size, kv_heads, shared * queries, -1), v.float())
    y = y.view(size, kv_heads, shared, queries, -1).permute(0, 3, 1, 2, 4)  # [size, queries, kv, shared, v_dim]
    result.view(size, queries, kv_heads, shared, -1).copy_(y)
