"""The memory that keys and values live in, and how much of it there should be.

Owns the block-major storage [num_blocks, layers, block_size, width]: one block is one contiguous run of bytes across
all layers, so saving, moving or copying it is one copy. Knows no sequence: a block is an index. Invariant: nothing is
read that was not written, so the storage starts uninitialised and the system commits its pages as they are first
written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedllm.errors import InvalidRequest, OutOfMemory
from embedllm.machine import free_memory
from embedllm.transfer import upload

MAX_SLOTS = 2**31 - 1  # slots travel as int32
GPU_MARGIN = 512 * 2**20  # bytes for what CUDA, cuBLAS and captured graphs take beside the tensors


@dataclass(frozen=True, kw_only=True)
class KVGroup:
    """Layers whose KV has one shape and lives under one block table.

    A token's row in a layer is its key heads, then its value heads. window: the largest of the layers' sliding windows,
    None where any layer sees everything.
    """

    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype
    window: int | None = None

    @property
    def width(self) -> int:
        """Values of one token in one layer."""
        return self.kv_heads * (self.k_dim + self.v_dim)

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.width * self.dtype.itemsize

    def bytes_per_block(self, block_size: int) -> int:
        return self.bytes_per_token * block_size


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for one group of layers."""

    def __init__(self, group: KVGroup, num_blocks: int, block_size: int, device: str | torch.device = "cpu") -> None:
        """Reserves the memory; see `allocate`."""
        self.group, self.block_size, self._device = group, block_size, device
        self.allocate(num_blocks)

    def allocate(self, num_blocks: int) -> None:
        """Reserve memory for so many blocks, after `free` or at first.

        Raises OutOfMemory with the figures where the system refuses it.
        """
        group, block_size = self.group, self.block_size
        if num_blocks < 1 or block_size < 1:
            raise InvalidRequest(f"a KV cache needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        if num_blocks * block_size > MAX_SLOTS:
            raise InvalidRequest(f"num_blocks={num_blocks} × block_size={block_size} is over {MAX_SLOTS} tokens")
        try:
            self.blocks = torch.empty(
                (num_blocks, group.layers, block_size, group.width), dtype=group.dtype, device=self._device
            )
        except RuntimeError as error:  # torch reports a refused allocation as one
            size = num_blocks * group.bytes_per_block(block_size)
            raise OutOfMemory(
                f"a KV cache of {num_blocks:,} blocks takes {size:,} bytes, which the system does not give; "
                "lower kv_cache_memory or num_kv_blocks"
            ) from error
        self.num_blocks = num_blocks
        self._adopt()

    def _adopt(self) -> None:
        self._layers = list(self.blocks.unbind(1))
        flat = self.blocks.view(-1, self.group.width)
        # Slots of layer i, counted from its first: the same index serves every layer.
        self._rows = [flat[i * self.block_size :] for i in range(self.group.layers if len(flat) else 0)]

    @property
    def num_bytes(self) -> int:
        return self.blocks.nbytes

    def layer(self, index: int) -> Tensor:
        """One layer's view [num_blocks, block_size, width]."""
        return self._layers[index]

    def rows(self, index: int) -> Tensor:
        """One layer's rows as [n, width], where `row_index` says which row a slot is."""
        return self._rows[index]

    def row_index(self, slots: Tensor) -> Tensor:
        """slots [tokens] (block · block_size + offset) → int64 [tokens] into `rows` of any layer."""
        slots = slots.long()  # before the multiplication: int32 wraps at block 2,048 of an 8B model
        block = torch.div(slots, self.block_size, rounding_mode="floor")
        return slots + block * ((self.group.layers - 1) * self.block_size)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Every layer of (source, destination) blocks. On a GPU no destination may be a source as well.

        On a CPU all sources are read before any destination is written.
        """
        if copies:
            from embedllm import ops  # which imports this module

            pairs = upload(torch.tensor(copies, dtype=torch.int64).t().contiguous(), self.blocks.device)
            ops.block_copy(self.blocks, pairs[0], pairs[1])

    def free(self) -> None:
        """Give the memory back. Idempotent; a use after it fails on an index."""
        self.blocks = self.blocks.new_empty((0, *self.blocks.shape[1:]))
        self._layers, self._rows = [], []


def dtype_named(name: str, device: torch.device) -> torch.dtype | None:
    """What kv_cache_dtype means there; None: the model's own dtype. Raises InvalidRequest for one the device lacks."""
    if name == "auto":
        return None
    if name != "fp8":
        raise InvalidRequest(f'kv_cache_dtype must be "auto" or "fp8", got {name!r}')
    if device.type != "cuda":
        raise InvalidRequest(
            f"kv_cache_dtype={name!r} needs a CUDA device: leave it 'auto' on a CPU, or use device='cuda'"
        )
    return torch.float8_e4m3fn


def free_on(device: torch.device) -> int:
    """Bytes this process may still take on a device; on a GPU less GPU_MARGIN, and with what torch holds unused."""
    if device.type == "cpu":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(free) + unused - GPU_MARGIN)


def auto_num_blocks(group: KVGroup, *, block_size: int, max_num_seqs: int, max_model_len: int, free: int) -> int:
    """Blocks for all sequences at full length, or what half of the free bytes hold, whichever is less.

    Raises OutOfMemory where not even one block fits.
    """
    size = group.bytes_per_block(block_size)
    wanted = max_num_seqs * -(-max_model_len // block_size)
    affordable = free // 2 // size
    if affordable < 1:
        raise OutOfMemory(
            f"one KV block takes {size:,} bytes and half of the {free:,} free bytes hold none; "
            "free memory, lower block_size, or set kv_cache_memory"
        )
    return min(wanted, affordable, MAX_SLOTS // block_size)
