"""Gated activations. See reference.gated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1_024


@triton.jit
def activate(x, SILU: tl.constexpr):
    """silu, or gelu in its tanh form, of float32."""
    if SILU:
        return x * tl.sigmoid(x)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(2.0 * inner)  # 1/2 · (1 + tanh(y)) = sigmoid(2 · y)


@triton.jit
def _gated(gate_up, out, size, row_stride, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + size + column, mask=inside)
    # The reference rounds act(gate) to the inputs' type before it multiplies.
    acted = activate(gate, SILU).to(gate_up.dtype.element_ty).to(tl.float32)
    tl.store(out + row * size + column, (acted * up.to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, activation: str = "silu") -> Tensor:
    """reference.gated. gate_up [tokens, 2·n], rows of any stride → [tokens, n]."""
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation {activation!r} is not known; there are 'silu' and 'gelu_tanh'")
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        _gated[(tokens, triton.cdiv(size, BLOCK))](
            gate_up, out, size, gate_up.stride(0), activation == "silu", BLOCK, num_warps=4
        )
    return out
