"""What a grammar backend is to the engine: shapes in, masks over token ids out.

Owns the protocol and the two plain things that cross it. Knows no library. Invariant: a state depends on nothing but
its grammar and the tokens it accepted, so it can be made again from them at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from embedllm.structured.expressions import Rules


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one model, as grammars see them.

    tokens: the bytes of each id, one per logit; b"" for an id that no grammar may choose (control tokens, ids without
    text). eos_ids: they end an answer. encode: text to ids, without special tokens.
    """

    tokens: Sequence[bytes]
    eos_ids: tuple[int, ...]
    encode: Callable[[str], list[int]]

    @property
    def num_words(self) -> int:
        """Length of a mask: int32 words of 32 ids."""
        return -(-len(self.tokens) // 32)


@dataclass(frozen=True, eq=False)
class Shape:
    """A checked shape: `rules`, or the `source` of a grammar that the caller wrote, in its `dialect`."""

    rules: Rules | None = None
    source: str = ""
    dialect: Literal["rules", "gbnf", "lark"] = "rules"


class State(Protocol):
    """Where one sequence is in its grammar. For one thread at a time."""

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write which ids may come next: bit id % 32 of word id // 32; every other bit is 0."""

    def accept(self, token: int) -> bool:
        """Go on by one token; False, with nothing changed, if it may not come here. An EOS id ends the grammar."""

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens accepted."""

    def forced_text(self) -> str:
        """The text that must come next whatever is chosen; "" where there is a choice, or at the end."""

    @property
    def can_end(self) -> bool:
        """Whether EOS may come next."""

    @property
    def done(self) -> bool:
        """Whether EOS was accepted: nothing more may come."""


class Grammar(Protocol):
    """A compiled shape. Immutable; any number of sequences on any thread make their states from it."""

    def new_state(self) -> State:
        """A state before the first token."""


class Backend(Protocol):
    """Compiles shapes for one vocabulary. `compile` may be called from any thread."""

    name: str

    def prepare(self) -> None:
        """Import and set up what takes long, once. Raises MissingDependency."""

    def refuses(self, shape: Shape) -> str | None:
        """Why it cannot take this shape, None if it can; quick, and without compiling."""

    def compile(self, shape: Shape) -> Grammar:
        """Raises InvalidRequest for a shape that is malformed."""
