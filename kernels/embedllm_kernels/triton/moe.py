"""The mixture of experts: one grouped product per projection. See reference.moe.

A pair is one choice of one token. `_assign` lists the pairs by expert, every expert's padded to whole blocks of rows;
a product then runs one program per block and tile of columns, over an upper bound of blocks, and those without pairs
return at once. A padding row holds the number of pairs and is never loaded or stored.
Invariant: nothing depends on the ids' values on the host, and every sum has a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedllm_kernels.triton import scratch
from embedllm_kernels.triton.gated import activate

IDS = 1_024  # ids read at once when pairs are listed
BLOCK = 1_024  # columns per program of the weighted sum


class Tile(NamedTuple):
    """Launch parameters of a grouped product: rows × columns × depth of a tile, for 2-byte elements."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["pairs", "max_blocks"])
def _assign(
    ids,
    pairs_of,
    expert_of,
    pairs,
    num_experts,
    max_blocks,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
):
    """Program e lists expert e's pairs in order and pads them; program num_experts marks the blocks that remain."""
    expert = tl.program_id(0)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, pairs, IDS):
        offset = start + tl.arange(0, IDS)
        chosen = tl.load(ids + offset, mask=offset < pairs, other=num_experts).to(tl.int32)
        counts += tl.histogram(chosen, EXPERTS)
    experts = tl.arange(0, EXPERTS)
    blocks = tl.where(experts < num_experts, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(experts < expert, blocks, 0))
    if expert == num_experts:
        for start in range(first, max_blocks, IDS):
            offset = start + tl.arange(0, IDS)
            tl.store(expert_of + offset, tl.full((IDS,), -1, tl.int32), mask=offset < max_blocks)
        return
    mine = tl.sum(tl.where(experts == expert, blocks, 0))
    count = tl.sum(tl.where(experts == expert, counts, 0))
    for block in range(first, first + mine):
        tl.store(expert_of + block, expert)
    listed = pairs_of + first * ROWS
    if count > 0:
        done = tl.full((), 0, tl.int32)
        for start in range(0, pairs, IDS):
            offset = start + tl.arange(0, IDS)
            chosen = tl.load(ids + offset, mask=offset < pairs, other=num_experts)
            found = (chosen == expert).to(tl.int32)
            tl.store(listed + done + tl.cumsum(found, 0) - 1, offset, mask=found > 0)
            done += tl.sum(found)
        padding = count + tl.arange(0, ROWS)
        tl.store(listed + padding, tl.zeros((ROWS,), tl.int32) + pairs, mask=padding < mine * ROWS)


@triton.jit
def _tile(
    x,
    w,
    depth,
    x_inside,
    w_inside,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x [BLOCK_M, depth] · wᵀ [depth, BLOCK_N], given the pointers to their rows."""
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        if EVEN:
            a = tl.load(x[:, None] + at[None], mask=x_inside[:, None], other=0.0)
            b = tl.load(w[None] + at[:, None], mask=w_inside[None], other=0.0)
        else:
            a = tl.load(x[:, None] + at[None], mask=x_inside[:, None] & (at < depth)[None], other=0.0)
            b = tl.load(w[None] + at[:, None], mask=w_inside[None] & (at < depth)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _two_tiles(
    x,
    w,
    up,
    depth,
    x_inside,
    w_inside,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `_tile` for the rows at w and those at w + up, with x loaded once."""
    k = tl.arange(0, BLOCK_K)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        if EVEN:
            a = tl.load(x[:, None] + at[None], mask=x_inside[:, None], other=0.0)
            b = tl.load(w[None] + at[:, None], mask=w_inside[None], other=0.0)
            c = tl.load(w[None] + up + at[:, None], mask=w_inside[None], other=0.0)
        else:
            a = tl.load(x[:, None] + at[None], mask=x_inside[:, None] & (at < depth)[None], other=0.0)
            inside = w_inside[None] & (at < depth)[:, None]
            b = tl.load(w[None] + at[:, None], mask=inside, other=0.0)
            c = tl.load(w[None] + up + at[:, None], mask=inside, other=0.0)
        first = tl.dot(a, b, first, input_precision="ieee")
        second = tl.dot(a, c, second, input_precision="ieee")
    return first, second


@triton.jit(do_not_specialize=["pairs"])
def _product(
    x,
    weight,
    out,
    pairs_of,
    expert_of,
    pairs,
    size,
    depth,
    x_stride,
    expert_stride,
    weight_stride,
    CHOSEN: tl.constexpr,
    GATED: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pair] = weight[expert] · x[pair // CHOSEN]; GATED: act(the first `size` columns) · (the next)."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs_of + block * BLOCK_M + tl.arange(0, BLOCK_M))
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    real, inside = pair < pairs, column < size
    rows = x + (pair // CHOSEN).to(tl.int64) * x_stride
    w = weight + expert * expert_stride + column.to(tl.int64) * weight_stride
    dtype = x.dtype.element_ty
    if GATED:
        up = tl.full((), 1, tl.int64) * size * weight_stride
        gate, up = _two_tiles(rows, w, up, depth, real, inside, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
        # The reference rounds each product and act(gate) to the inputs' type before it multiplies.
        acted = activate(gate.to(dtype).to(tl.float32), SILU).to(dtype).to(tl.float32)
        y = acted * up.to(dtype).to(tl.float32)
    else:
        y = _tile(rows, w, depth, real, inside, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    place = out + pair.to(tl.int64)[:, None] * size + column[None]
    tl.store(place, y.to(out.dtype.element_ty), mask=real[:, None] & inside[None])


@triton.jit
def _weighted_sum(y, weights, out, size, weights_stride, out_stride, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in range(CHOSEN):
        row = tl.load(y + (token * CHOSEN + choice) * size + column, mask=inside, other=0.0).to(tl.float32)
        total += row * tl.load(weights + token * weights_stride + choice).to(tl.float32)
    tl.store(out + token * out_stride + column, total.to(out.dtype.element_ty), mask=inside)


def tile_for(pairs: int, num_experts: int) -> Tile:
    """By the rows that an expert has when all have as many.

    Few rows only read weights: small tiles make many programs. Every tile fits into 96 KiB of shared memory.
    """
    each = pairs / num_experts
    if each <= 16:
        return Tile(16, 32, 128, warps=4, stages=4)
    if each <= 64:
        return Tile(64, 64, 64, warps=4, stages=3)
    return Tile(128, 64, 64, warps=8, stages=3)


def _max_blocks(pairs: int, num_experts: int, rows: int) -> int:
    active = min(pairs, num_experts)
    return (pairs + active * (rows - 1)) // rows


def _parts(x: Tensor, ids: Tensor, gate_up: Tensor, tile: Tile) -> list[scratch.Part]:
    pairs, (experts, double, hidden) = ids.numel(), gate_up.shape
    blocks = _max_blocks(pairs, experts, tile.rows)
    lists: list[scratch.Part] = [((blocks * tile.rows,), torch.int32), ((blocks,), torch.int32)]
    return [*lists, ((pairs, double // 2), x.dtype), ((pairs, hidden), x.dtype)]


def workspace_size(x: Tensor, ids: Tensor, gate_up: Tensor) -> int:
    """Bytes of scratch memory that `moe` takes for arguments of these shapes."""
    return scratch.size(_parts(x, ids, gate_up, tile_for(ids.numel(), len(gate_up))))


def moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str = "silu",
    *,
    tile: Tile | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """reference.moe. Last dimensions are contiguous, `ids` as a whole; rows of x, weights and `out` may have gaps.

    tile: other launch parameters than tile_for's. workspace: uint8 of at least `workspace_size` bytes.
    """
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation {activation!r} is not known; there are 'silu' and 'gelu_tanh'")
    tokens, chosen = ids.shape
    experts, hidden, inner = down.shape
    out = torch.empty_like(x) if out is None else out
    if not tokens:
        return out
    pairs = tokens * chosen
    rows, columns, depth, warps, stages = tile or tile_for(pairs, experts)
    depth = depth * 2 // x.element_size()
    blocks = _max_blocks(pairs, experts, rows)
    parts = _parts(x, ids, gate_up, Tile(rows, columns, depth, warps, stages))
    pairs_of, expert_of, acted, y = scratch.cut(workspace, parts, x.device)
    lists = (pairs_of, expert_of, pairs)
    _assign[(experts + 1,)](ids, *lists, experts, blocks, triton.next_power_of_2(experts + 1), rows, IDS, num_warps=4)
    shape = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "num_warps": warps, "num_stages": stages}
    silu = activation == "silu"
    grid = (blocks, triton.cdiv(inner, columns))
    strides = (x.stride(0), gate_up.stride(0), gate_up.stride(1))
    _product[grid](x, gate_up, acted, *lists, inner, hidden, *strides, chosen, True, silu, hidden % depth == 0, **shape)
    grid = (blocks, triton.cdiv(hidden, columns))
    strides = (inner, down.stride(0), down.stride(1))
    _product[grid](acted, down, y, *lists, hidden, inner, *strides, 1, False, silu, inner % depth == 0, **shape)
    grid = (tokens, triton.cdiv(hidden, BLOCK))
    _weighted_sum[grid](y, weights, out, hidden, weights.stride(0), out.stride(0), chosen, BLOCK, num_warps=4)
    return out
