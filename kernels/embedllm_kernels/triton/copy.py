"""Copies whole blocks of KV. See reference.block_copy.

Knows blocks as runs of bytes. Invariant: one launch, whose programs run in any order. So sources are read before
destinations are written only where no destination is also a source of the same call. The scheduler keeps to that: the
destination of a copy is a block it has just taken out of the pool, and every source of a copy that is not yet run is
held, so the pool cannot give it out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2_048
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


# Indices are parts of one buffer: where in it they start says nothing of the next call.
@triton.jit(do_not_specialize=["source", "destination"])
def _block_copy(blocks, source, destination, size, stride, BLOCK: tl.constexpr):
    copy = tl.program_id(0)
    read = blocks + tl.load(source + copy).to(tl.int64) * stride
    written = blocks + tl.load(destination + copy).to(tl.int64) * stride
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    tl.store(written + column, tl.load(read + column, mask=inside), mask=inside)


def block_copy(blocks: Tensor, source: Tensor, destination: Tensor) -> None:
    """reference.block_copy where no destination is also a source. Writes to `blocks`.

    blocks [num_blocks, ...], each block one run of bytes; source, destination [copies] of any integer type,
    contiguous.
    """
    if source.shape != destination.shape:
        raise ValueError(f"{len(source)} sources, {len(destination)} destinations")
    words = _in_words(blocks)
    if source.numel() and words.shape[1]:
        grid = (source.shape[0], triton.cdiv(words.shape[1], BLOCK))
        _block_copy[grid](words, source, destination, words.shape[1], words.stride(0), BLOCK, num_warps=8)


def _in_words(blocks: Tensor) -> Tensor:
    """blocks as [num_blocks, n] of the widest integers that each block is made of: what they mean is not looked at."""
    if not blocks[:1].is_contiguous():
        raise ValueError(f"a block of shape {list(blocks.shape[1:])}, strides {blocks.stride()[1:]} is not one run")
    flat = blocks.flatten(1) if blocks.dim() > 1 else blocks[:, None]
    itemsize = blocks.dtype.itemsize
    sizes = [count * itemsize for count in (flat.shape[1], flat.stride(0), flat.storage_offset())]
    word = next(word for word in _WORDS if not any(size % word.itemsize for size in sizes))
    return flat.view(word)
