"""RMS norm, alone and after a residual sum. See reference.rms_norm and reference.add_rms_norm.

One program holds one row in registers, so that every value is read once and written once. Invariant: a row is read
whole before any of it is written, so `out` and `total` may be the inputs themselves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SIZE = 16_384  # a wider row would not fit the registers of one program


@triton.jit
def _normed(row, weight, column, inside, size, eps):
    """row is float32, and zero where it is not `inside`."""
    scale = tl.rsqrt(tl.sum(row * row, 0) / size + eps)
    return row * scale * tl.load(weight + column, mask=inside).to(tl.float32)


@triton.jit
def _rms_norm(
    x, weight, out, size, eps, x_stride, x_head_stride, out_stride, out_head_stride, weight_stride, BLOCK: tl.constexpr
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    row = tl.load(x + token * x_stride + head * x_head_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = _normed(row, weight + head * weight_stride, column, inside, size, eps)
    tl.store(out + token * out_stride + head * out_head_stride + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, total, size, eps, x_stride, residual_stride, out_stride, total_stride, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    row = tl.load(x + token * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    row += tl.load(residual + token * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded = row.to(total.dtype.element_ty)
    tl.store(total + token * total_stride + column, rounded, mask=inside)
    y = _normed(rounded.to(tl.float32), weight, column, inside, size, eps)
    tl.store(out + token * out_stride + column, y.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """reference.rms_norm. x [..., n]; weight [n], or [heads, n] for x [..., heads, n].

    x and out may have gaps between rows and heads, as a slice of a wider buffer has; out may be x.
    """
    heads, size = _heads_of(x, weight), x.shape[-1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, results = _in_heads(x, heads), _in_heads(out, heads)
        block, num_warps = _tile(size)
        _rms_norm[(rows.shape[0], rows.shape[1])](
            rows,
            weight,
            results,
            size,
            eps,
            rows.stride(0),
            rows.stride(1),
            results.stride(0),
            results.stride(1),
            size if heads > 1 else 0,
            block,
            num_warps=num_warps,
        )
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """reference.add_rms_norm: (normed, total). x, residual [..., n], weight [n].

    out and total take the results where they are given, and may be x and residual.
    """
    if _heads_of(x, weight) > 1 or residual.shape != x.shape:
        raise ValueError(
            f"x {list(x.shape)}, residual {list(residual.shape)}, weight {list(weight.shape)} do not match"
        )
    size = x.shape[-1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if total is None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows = [_in_heads(tensor.view(-1, size), 1) for tensor in (x, residual, out, total)]
        block, num_warps = _tile(size)
        _add_rms_norm[(rows[0].shape[0],)](
            rows[0],
            rows[1],
            weight,
            rows[2],
            rows[3],
            size,
            eps,
            *(tensor.stride(0) for tensor in rows),
            block,
            num_warps=num_warps,
        )
    return out, total


def _heads_of(x: Tensor, weight: Tensor) -> int:
    """How many rows of weights there are; ValueError where they do not fit x."""
    size = x.shape[-1]
    heads = weight.shape[0] if weight.dim() == 2 else 1
    if weight.shape[-1] != size or weight.dim() > 2 or (heads > 1 and x.shape[-2:] != weight.shape):
        raise ValueError(f"weight {list(weight.shape)} is not [n] or [heads, n] of x {list(x.shape)}")
    if size > MAX_SIZE:
        raise ValueError(f"rows of {size} values: at most {MAX_SIZE} fit")
    if not weight.is_contiguous():
        raise ValueError(f"weight with strides {weight.stride()} is not contiguous")
    return heads


def _in_heads(x: Tensor, heads: int) -> Tensor:
    """x as [tokens, heads, n] without a copy; [tokens, 1, n] where x has no heads.

    Heads that share a weight are still a dimension of their own: a slice of a wider buffer has a gap after them.
    """
    if x.stride(-1) != 1:
        raise ValueError(f"the values of a row are {x.stride(-1)} apart, they must lie side by side")
    if heads > 1 or x.dim() == 3:
        return x.view(-1, *x.shape[-2:])
    return x.view(-1, 1, x.shape[-1])


def _tile(size: int) -> tuple[int, int]:
    """(values, warps) of a program: 16 values per thread, so two wide loads of 16-bit values."""
    block = triton.next_power_of_2(size)
    return block, min(16, max(1, block // 512))
