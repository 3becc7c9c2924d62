"""The small language that every shape is lowered to, and every backend reads.

Owns the node types. Knows no JSON, no regular expressions and no tokens: these are texts over Unicode characters.
Invariant: a `Rules` holds a node for "root" and for every name a Ref in it uses, and no rule begins with itself before
it has consumed a character.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Literal:
    """This text; "" matches nothing and goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of these ranges of code points, both ends included; sorted, apart, without surrogates."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of these; none of them matches nothing at all."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The item, `least` to `most` times; most=None is without end."""

    item: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Ref:
    """What the rule of this name says; rules may be recursive."""

    name: str


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Free text without a trigger in it; where a trigger completes, what belongs to it must follow.

    options: (trigger, what follows it); no trigger is part of another. may_end: the whole may end in free text, before
    any trigger; else one must come. again: after an option free text goes on, which may end; else it ends there.
    """

    options: tuple[tuple[str, Node], ...]
    may_end: bool
    again: bool


Node = Literal | Chars | Seq | Alt | Repeat | Ref | Dispatch
Rules = Mapping[str, Node]
EMPTY = Literal("")
