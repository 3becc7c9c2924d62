"""Rules taken apart into numbered parts over bytes, for the built-in backend.

Owns UTF-8: characters become tables of bytes. Knows no tokens. Invariant: a part either takes bytes (it has a text or
tables) or opens into other parts, never both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import Alt, Chars, Literal, Node, Ref, Repeat, Rules, Seq

CONSUMED, REFUSED = -1, -2
_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)  # largest code point of 1, 2, 3 and 4 bytes

# Per state of a part that takes bytes, what each of 256 does: the next state, CONSUMED or REFUSED.
Tables = Sequence[list[int]]


class Parts:
    """The parts of rules in normal form, by number.

    texts: the bytes that a part takes one by one, else b"". tables: of parts that take one character, else none.
    options: sequences of parts that the others open into. is_repeat: it opens into its one part again and again.
    first: the two numbers that a part starts with: the least and most times (-1: without end) of a repeat, else the
    state and 0. kind_of, byte_of, num_kinds: bytes that no part tells apart are of one kind.
    """

    def __init__(self, rules: Rules) -> None:
        self.texts: list[bytes] = []
        self.tables: list[Tables] = []
        self.options: list[Sequence[Sequence[int]]] = []
        self.is_repeat: list[bool] = []
        self.first: list[tuple[int, int]] = []
        self._classes: dict[Node, int] = {}
        numbers = {name: self._add() for name in rules}
        try:
            for name, node in rules.items():
                self.options[numbers[name]] = [[self._part(node, numbers)]]
        except RecursionError:
            raise InvalidRequest("the shape is nested too deeply to be compiled; name parts of it") from None
        self.root = numbers["root"]
        rows = [row for tables in self.tables for row in tables]
        rows += [[int(byte == spelled) for byte in range(256)] for spelled in {*b"".join(self.texts)}]
        columns = np.array(rows or [[REFUSED] * 256], np.int32)
        _, first, kinds = np.unique(columns, axis=1, return_index=True, return_inverse=True)
        self.kind_of = kinds.reshape(256).astype(np.intp)
        self.byte_of: list[int] = first.tolist()
        self.num_kinds = len(self.byte_of)

    def _add(
        self,
        text: bytes = b"",
        tables: Sequence[list[int]] = (),
        options: Sequence[Sequence[int]] = ((),),
        repeat: tuple[int, int] | None = None,
    ) -> int:
        self.texts.append(text)
        self.tables.append(tables)
        self.options.append(options)
        self.is_repeat.append(repeat is not None)
        self.first.append(repeat or (0, 0))
        return len(self.texts) - 1

    def _part(self, node: Node, numbers: dict[str, int]) -> int:
        if isinstance(node, Literal):
            return self._add(node.text.encode())
        if isinstance(node, Chars):
            if node not in self._classes:
                self._classes[node] = self._add(tables=_of_characters(node))
            return self._classes[node]
        if isinstance(node, Ref):
            return numbers[node.name]
        if isinstance(node, Seq):
            return self._add(options=[[self._part(item, numbers) for item in node.items]])
        if isinstance(node, Alt):
            return self._add(options=[[self._part(option, numbers)] for option in node.options])
        if isinstance(node, Repeat):
            most = -1 if node.most is None else node.most
            return self._add(options=[[self._part(node.item, numbers)]], repeat=(node.least, most))
        raise TypeError(f"not in normal form: {type(node).__name__}")


def _of_characters(node: Chars) -> Tables:
    tables = [[REFUSED] * 256]
    for low, high in node.ranges:
        for spans in _utf8(low, high):
            state = 0
            for first, last in spans[:-1]:
                if tables[state][first] == REFUSED:  # else it is one byte, which several sequences begin with
                    tables[state][first : last + 1] = [len(tables)] * (last + 1 - first)
                    tables.append([REFUSED] * 256)
                state = tables[state][first]
            first, last = spans[-1]
            tables[state][first : last + 1] = [CONSUMED] * (last + 1 - first)
    return tables


def _utf8(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences of byte ranges that spell the code points from low to high."""
    waiting = [(low, high)]
    while waiting:
        low, high = waiting.pop()
        for last in _LAST_OF_LENGTH:
            if low <= last < high:
                waiting += [(low, last), (last + 1, high)]
                break
        else:
            cut = _cut(low, high)
            if cut is None:
                yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))
            else:
                waiting += [(low, cut - 1), (cut, high)]


def _cut(low: int, high: int) -> int | None:
    """Where the range must be cut so that every byte takes a range of its own; None if it does already."""
    for bits in (6, 12, 18):
        tail = (1 << bits) - 1
        if low >> bits != high >> bits and high > 0x7F:
            if low & tail:
                return (low | tail) + 1
            if high & tail != tail:
                return high & ~tail
    return None
