"""The tokens of a vocabulary by their bytes, level by level.

Owns one tree of all tokens, as arrays. Knows no grammar. Invariant: the level of a node is the number of bytes before
and at it, and its parent is on the level above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Level:
    """The nodes at one depth: their parents' indices on the level above and their bytes, [nodes]; and which tokens end
    at which of them, [tokens ending here]."""

    parents: NDArray[np.intp]
    bytes: NDArray[np.uint8]
    ends: NDArray[np.intp]
    ids: NDArray[np.intp]


def trie(tokens: Sequence[bytes]) -> list[Level]:
    """The levels below the root; tokens without bytes are in none."""
    levels: list[Level] = []
    found = sorted((token, i) for i, token in enumerate(tokens) if token)
    above: dict[bytes, int] = {b"": 0}
    depth = 1
    while found:
        nodes: dict[bytes, int] = {}
        for token, _ in found:
            nodes.setdefault(token[:depth], len(nodes))
        ending = [(nodes[token], i) for token, i in found if len(token) == depth]
        levels.append(
            Level(
                np.array([above[prefix[:-1]] for prefix in nodes], np.intp),
                np.array([prefix[-1] for prefix in nodes], np.uint8),
                np.array([node for node, _ in ending], np.intp),
                np.array([i for _, i in ending], np.intp),
            )
        )
        found = [(token, i) for token, i in found if len(token) > depth]
        above, depth = nodes, depth + 1
    return levels
