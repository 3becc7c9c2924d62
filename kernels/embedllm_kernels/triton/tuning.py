"""Launch parameters of the attention kernels by generation of GPU: plain data and its lookup.

Knows only numbers, neither torch nor Triton. The values are starting points that fit into registers and shared memory;
none of them has been tuned by measurement. Invariant: the entry of an unknown GPU fits into 99 KiB of shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Launch", "launch_for"]


@dataclass(frozen=True, slots=True)
class Launch:
    """block_m: rows of a tile of queries (query tokens · the query heads of one KV head); tile: keys per step.

    The decode form takes block_m as the least and adds rows where its queries need more. num_stages is odd because a
    key waits for the id of its block: of two stages that Triton adds, one more tile is under way.
    """

    block_m: int
    tile: int
    num_warps: int
    num_stages: int


NARROW = 128  # dimensions of a head

# (form, compute capability) → the launch for heads of up to NARROW dimensions, and for up to twice that, of two bytes
# each. None: any other GPU.
LAUNCHES: dict[tuple[str, tuple[int, int] | None], tuple[Launch, Launch]] = {
    ("decode", (8, 0)): (Launch(16, 32, 4, 5), Launch(16, 32, 4, 3)),
    ("decode", (8, 9)): (Launch(16, 32, 4, 5), Launch(16, 32, 4, 3)),
    ("decode", (9, 0)): (Launch(16, 32, 4, 5), Launch(16, 32, 4, 3)),
    ("decode", (10, 0)): (Launch(16, 32, 4, 5), Launch(16, 32, 4, 3)),
    ("decode", None): (Launch(16, 32, 4, 3), Launch(16, 32, 4, 3)),
    ("prefill", (8, 0)): (Launch(128, 64, 8, 3), Launch(64, 32, 8, 3)),
    ("prefill", (8, 9)): (Launch(64, 64, 8, 3), Launch(64, 32, 8, 3)),
    ("prefill", (9, 0)): (Launch(128, 64, 8, 3), Launch(128, 32, 8, 3)),
    ("prefill", (10, 0)): (Launch(128, 64, 8, 3), Launch(128, 32, 8, 3)),
    ("prefill", None): (Launch(64, 64, 8, 3), Launch(64, 32, 8, 3)),
}
# The same for a cache of float8, whose conversion takes registers: every warp converts all keys, but for those that
# matrix units of 9.0 and later read from shared memory.
FLOAT8_LAUNCHES: dict[tuple[str, tuple[int, int] | None], tuple[Launch, Launch]] = {
    ("decode", None): (Launch(16, 32, 4, 5), Launch(16, 16, 4, 5)),
    ("prefill", (9, 0)): (Launch(128, 64, 8, 3), Launch(128, 32, 8, 3)),
    ("prefill", None): (Launch(64, 64, 8, 3), Launch(64, 32, 8, 3)),
}
LEAST = 16  # the fewest rows or keys that a matrix unit takes
FLOAT32 = Launch(LEAST, LEAST, 8, 2)  # exact products use no matrix unit and hold their operands in registers


def launch_for(
    form: str, capability: tuple[int, int], dim: int, element_size: int, float8_cache: bool = False
) -> Launch:
    """form: "decode" or "prefill". dim: of one head's key or value, padded to a power of two; element_size: of q."""
    if element_size > 2:
        return FLOAT32
    table = FLOAT8_LAUNCHES if float8_cache else LAUNCHES
    narrow, wide = table[form, capability] if (form, capability) in table else table[form, None]
    if dim <= NARROW:
        return narrow
    excess = -(-dim // (2 * NARROW))  # wider still: fewer rows and keys, of as many bytes as `wide`
    return replace(wide, block_m=max(LEAST, wide.block_m // excess), tile=max(LEAST, wide.tile // excess))
