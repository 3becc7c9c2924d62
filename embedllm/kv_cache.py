"""The memory that keys and values live in, and how much of it there may be.

Owns the block-major storage [num_blocks, layers, block_size, width]: one block is one contiguous run of bytes across
all layers, so saving, moving or copying it is one copy. Knows no sequence: a block is an index. Invariant: nothing is
read that was not written, so the storage starts uninitialised and the system commits its pages as they are first
written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from embedllm.errors import InvalidRequest, OutOfMemory

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
MAX_SLOTS = 2**31 - 1  # slots travel as int32


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
        """Reserves the memory. Raises OutOfMemory with the figures where the system refuses it."""
        if num_blocks < 1 or block_size < 1:
            raise InvalidRequest(f"a KV cache needs blocks: num_blocks={num_blocks}, block_size={block_size}")
        if num_blocks * block_size > MAX_SLOTS:
            raise InvalidRequest(f"num_blocks={num_blocks} × block_size={block_size} is over {MAX_SLOTS} tokens")
        self.group, self.num_blocks, self.block_size = group, num_blocks, block_size
        try:
            self.blocks = torch.empty(
                (num_blocks, group.layers, block_size, group.width), dtype=group.dtype, device=device
            )
        except RuntimeError as error:  # torch reports a refused allocation as one
            size = num_blocks * group.bytes_per_block(block_size)
            raise OutOfMemory(
                f"a KV cache of {num_blocks:,} blocks takes {size:,} bytes, which the system does not give; "
                "lower kv_cache_memory or num_kv_blocks"
            ) from error
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
        """Every layer of (source, destination) blocks; all sources are read before any destination is written."""
        if copies:
            source, destination = torch.tensor(copies, dtype=torch.int64, device=self.blocks.device).unbind(1)
            self.blocks.index_copy_(0, destination, self.blocks.index_select(0, source))

    def free(self) -> None:
        """Give the memory back. Idempotent; a use after it fails on an index."""
        self.blocks = self.blocks.new_empty((0, *self.blocks.shape[1:]))
        self._layers, self._rows = [], []


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


def free_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Bytes this process may still take on the host: the least of `memory_limits`."""
    return min(memory_limits(proc, cgroups).values())


def memory_limits(proc: Path = PROC, cgroups: Path = CGROUPS) -> dict[str, int]:
    """What is free by each account that applies: "host", "cgroup", "address space" and "data segment".

    Page cache that the kernel would drop counts as free in all of them.
    """
    limits = {"host": _host_free(proc)}
    group = _cgroup_free(proc, cgroups)
    if group is not None:
        limits["cgroup"] = group
    return limits | _rlimits_free(proc)


def _host_free(proc: Path) -> int:
    try:
        return _fields(proc / "meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _cgroup_free(proc: Path, cgroups: Path) -> int | None:
    """The least over this process's memory cgroup and its ancestors, version 1 or 2; None where none has a limit."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's; then the files stand at the mount itself.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            free = _group_free(root.joinpath(*parts[:depth]), *names)
            if free is not None:
                found.append(free)
    return min(found, default=None)


def _group_free(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= 2**60:  # "max", or version 1's way to say it
        return None
    try:
        cache = _fields(folder / "memory.stat").get(cache_name, 0)
    except OSError:
        cache = 0
    return max(0, int(limit) - usage + cache)


def _rlimits_free(proc: Path) -> dict[str, int]:
    try:
        import resource

        status = _fields(proc / "self" / "status")
    except (ImportError, OSError):
        return {}
    free = {}
    for name, which, used in (
        ("address space", resource.RLIMIT_AS, "VmSize"),
        ("data segment", resource.RLIMIT_DATA, "VmData"),
    ):
        limit = resource.getrlimit(which)[0]
        if limit != resource.RLIM_INFINITY and used in status:
            free[name] = max(0, limit - status[used] * 1024)
    return free


def _fields(path: Path) -> dict[str, int]:
    """`Name: 123 kB` or `name 123` lines; what is no number is left out."""
    fields = {}
    for line in path.read_text().splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            fields[words[0]] = int(words[1])
    return fields
