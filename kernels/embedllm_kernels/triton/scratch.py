"""Scratch memory: several tensors cut from one buffer, which the caller may keep from step to step.

Invariant: the parts do not overlap, and each starts at a multiple of 256 bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Part = tuple[tuple[int, ...], torch.dtype]  # shape and type

_ALIGNMENT = 256


def _bytes(part: Part) -> int:
    shape, dtype = part
    return -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def size(parts: list[Part]) -> int:
    """The bytes that `cut` needs."""
    return sum(map(_bytes, parts))


def cut(buffer: Tensor | None, parts: list[Part], device: torch.device) -> list[Tensor]:
    """The parts, uninitialised, in a uint8 buffer of at least `size(parts)` bytes; None allocates one."""
    needed = size(parts)
    if buffer is None:
        buffer = torch.empty(needed, dtype=torch.uint8, device=device)
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or len(buffer) < needed:
        raise ValueError(f"a workspace of {needed} bytes is needed, got {buffer.dtype} of {tuple(buffer.shape)}")
    tensors, start = [], 0
    for shape, dtype in parts:
        used = math.prod(shape) * dtype.itemsize
        tensors.append(buffer[start : start + used].view(dtype).view(shape))
        start += _bytes((shape, dtype))
    return tensors
