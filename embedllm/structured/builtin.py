"""The backend that needs no package: rules followed byte by byte, in Python and numpy.

Owns a pushdown automaton with stacks that share their tails, and the masks it found. Knows no library. Invariant: a
position holds every way in which the bytes so far can be read, and each way can go on to a whole text.
"""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from embedllm.errors import InvalidRequest, RequestFailed
from embedllm.structured.automaton import CONSUMED, REFUSED, Parts
from embedllm.structured.backend import Shape, Vocabulary
from embedllm.structured.normal import normal_form
from embedllm.structured.trie import Level, trie
from embedllm.structured.vocabulary import whole_text

MAX_FORCED = 4_096  # bytes looked ahead
MAX_POSITIONS = 20_000  # remembered per grammar
MAX_WAYS = 16_000  # in which the text so far may be read; JSON has a handful, an enum one per entry


class Stack:
    """What is still to come: a part, two numbers of its own, and the rest after it (None: the end of the text).

    clamped: the same with counts that no token can exhaust made equal, as no mask depends on them; None if it is that.
    Equal ones are one object, so they are compared by identity, however deep they are.
    """

    __slots__ = ("__weakref__", "clamped", "least", "most", "part", "rest")

    def __init__(self, part: int, least: int, most: int, rest: Stack | None, clamped: Stack | None) -> None:
        self.part, self.least, self.most, self.rest, self.clamped = part, least, most, rest, clamped


Position = frozenset[Stack | None]


class BuiltinBackend:
    """Takes rules; for grammars that a caller wrote it has no parser."""

    name = "builtin"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._levels: list[Level] = []
        self._preparing = threading.Lock()

    def prepare(self) -> None:
        """Sort the vocabulary, once."""
        with self._preparing:
            self._levels = self._levels or trie(self._vocabulary.tokens)

    def refuses(self, shape: Shape) -> str | None:
        """Whatever is not rules."""
        if shape.rules is None:
            return f"a grammar in {shape.dialect} needs a package: `pip install 'embedllm[structured]'`"
        return None

    def compile(self, shape: Shape) -> BuiltinGrammar:
        """Raises InvalidRequest for a shape that is malformed."""
        self.prepare()
        if shape.rules is None:
            raise InvalidRequest(self.refuses(shape) or "")
        return BuiltinGrammar(Parts(normal_form(shape.rules)), self._vocabulary, self._levels)


class BuiltinGrammar:
    """Rules in parts, and for every position met what each byte does there."""

    def __init__(self, parts: Parts, vocabulary: Vocabulary, levels: list[Level]) -> None:
        self._parts, self._vocabulary, self._levels = parts, vocabulary, levels
        self._finding = threading.Lock()
        self._stacks: WeakValueDictionary[tuple[int, int, int, Stack | None], Stack] = WeakValueDictionary()
        self._limit = len(levels) + 1  # no token goes on so often
        self._masks: dict[Position, NDArray[np.int32]] = {}
        self._forget()
        self.start = self._opened([self._stack(parts.root, *parts.first[parts.root], None)], set())

    def new_state(self) -> BuiltinState:
        """A state before the first token."""
        return BuiltinState(self, self._vocabulary)

    def _stack(self, part: int, least: int, most: int, rest: Stack | None) -> Stack:
        key = (part, least, most, rest)
        found = self._stacks.get(key)
        if found is None:
            clamped = None
            limit = self._limit if self._parts.is_repeat[part] else max(least, most)
            below = rest if rest is None else rest.clamped or rest
            if least > limit or most > limit or below is not rest:
                clamped = self._stack(part, min(least, limit), min(most, limit), below)
            found = Stack(part, least, most, rest, clamped)
            self._stacks[key] = found
        return found

    def after(self, position: Position, byte: int) -> Position:
        """Where one more byte leads; empty if it cannot come."""
        there: set[Stack | None] = set()
        popped: list[Stack | None] = []
        for stack in position:
            if stack is not None:
                text, at = self._parts.texts[stack.part], stack.least
                if text:
                    goes = REFUSED if text[at] != byte else at + 1 if at + 1 < len(text) else CONSUMED
                else:
                    goes = self._parts.tables[stack.part][at][byte]
                if goes == CONSUMED:
                    popped.append(stack.rest)
                elif goes != REFUSED:
                    there.add(self._stack(stack.part, goes, 0, stack.rest))
        return self._opened(popped, there)

    def _opened(self, waiting: list[Stack | None], there: set[Stack | None]) -> Position:
        """`there` and what is waiting, opened until each begins with a part that takes a byte."""
        parts = self._parts
        seen = set(waiting)
        while waiting:
            stack = waiting.pop()
            if stack is None or parts.texts[stack.part] or parts.tables[stack.part]:
                there.add(stack)
                continue
            new: list[Stack | None] = []
            if parts.is_repeat[stack.part]:
                if stack.least == 0:
                    new.append(stack.rest)
                if stack.most:
                    left = stack.most - 1 if stack.most > 0 else -1
                    again = self._stack(stack.part, max(stack.least - 1, 0), left, stack.rest)
                    (item,) = parts.options[stack.part][0]
                    new.append(self._stack(item, *parts.first[item], again))
            else:
                for sequence in parts.options[stack.part]:
                    rest = stack.rest
                    for item in reversed(sequence):
                        rest = self._stack(item, *parts.first[item], rest)
                    new.append(rest)
            waiting += [one for one in new if one not in seen]
            seen.update(new)
            if len(seen) > MAX_WAYS:
                raise RequestFailed(
                    f"what was written can be read in over {MAX_WAYS:,} ways, more than the built-in grammar backend "
                    "follows: `pip install 'embedllm[structured]'`, or ask for a less ambiguous shape"
                )
        return frozenset(there)

    def only_byte(self, position: Position) -> int | None:
        """The byte that must come next; None where there is a choice, or at the end."""
        found: set[int] = set()
        for stack in position:
            if stack is None:
                return None
            text = self._parts.texts[stack.part]
            if text:
                found.add(text[stack.least])
            else:
                row = self._parts.tables[stack.part][stack.least]
                found.update([byte for byte in range(256) if row[byte] != REFUSED])
            if len(found) > 1:
                return None
        return found.pop() if found else None

    def mask(self, position: Position) -> NDArray[np.int32]:
        """The tokens that can come next, int32 [num_words]."""
        clamped = frozenset([stack and (stack.clamped or stack) for stack in position])
        found = self._masks.get(clamped)
        if found is None:
            with self._finding:
                found = self._found(clamped)
                if len(self._masks) >= MAX_POSITIONS:
                    self._masks.clear()
                self._masks[clamped] = found
        return found

    def _forget(self) -> None:
        self._numbers: dict[Position, int] = {}
        self._positions: list[Position] = []
        # [positions, kinds of bytes]: the number of the next position; -1 none, -2 not known yet
        self._table = np.full((64, self._parts.num_kinds), -2, np.int32)

    def _number(self, position: Position) -> int:
        if not position:
            return -1
        number = self._numbers.setdefault(position, len(self._positions))
        if number == len(self._positions):
            self._positions.append(position)
            if number == len(self._table):
                self._table = np.concatenate([self._table, np.full_like(self._table, -2)])
        return number

    def _found(self, position: Position) -> NDArray[np.int32]:
        """All tokens at once, one level of their tree after the other."""
        if len(self._positions) > MAX_POSITIONS:
            self._forget()
        chosen = np.zeros(self._vocabulary.num_words * 32, bool)
        there = np.array([self._number(position)], np.int32)  # [nodes of a level]: where each leads
        for level in self._levels:
            above, kinds = there[level.parents], self._parts.kind_of[level.bytes]
            alive = np.flatnonzero(above >= 0)
            if not alive.size:
                break
            above, kinds = above[alive], kinds[alive]
            unknown = np.flatnonzero(self._table[above, kinds] == -2)
            for number, kind in set(zip(above[unknown].tolist(), kinds[unknown].tolist(), strict=True)):
                following = self._number(self.after(self._positions[number], self._parts.byte_of[kind]))
                self._table[number, kind] = following
            there = np.full(len(level.parents), -1, np.int32)
            there[alive] = self._table[above, kinds]
            chosen[level.ids[there[level.ends] >= 0]] = True
        chosen[list(self._vocabulary.eos_ids)] = None in position
        return np.packbits(chosen, bitorder="little").view(np.int32)


class BuiltinState:
    """Where one sequence is; for one thread at a time."""

    def __init__(self, grammar: BuiltinGrammar, vocabulary: Vocabulary) -> None:
        self._grammar, self._vocabulary = grammar, vocabulary
        self._positions = [grammar.start]  # one more than tokens; empty after EOS

    def fill(self, row: NDArray[np.int32]) -> None:
        """Write which ids may come next into int32 [num_words]."""
        row[:] = 0 if self.done else self._grammar.mask(self._positions[-1])

    def accept(self, token: int) -> bool:
        """Go on by one token; False, with nothing changed, if it may not come here."""
        position: Position = self._positions[-1]
        if token in self._vocabulary.eos_ids:
            if None in position:
                self._positions.append(frozenset())
            return None in position
        spelled = self._vocabulary.tokens[token] if 0 <= token < len(self._vocabulary.tokens) else b""
        for byte in spelled:
            position = self._grammar.after(position, byte)
        if spelled and position:
            self._positions.append(position)
        return bool(spelled and position)

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens accepted."""
        del self._positions[len(self._positions) - num_tokens :]

    def forced_text(self) -> str:
        """The text that must come next; "" where there is a choice, or at the end."""
        position, forced = self._positions[-1], bytearray()
        while len(forced) < MAX_FORCED and (byte := self._grammar.only_byte(position)) is not None:
            forced.append(byte)
            position = self._grammar.after(position, byte)
        return whole_text(bytes(forced))

    @property
    def can_end(self) -> bool:
        """Whether EOS may come next."""
        return None in self._positions[-1]

    @property
    def done(self) -> bool:
        """Whether EOS was accepted."""
        return not self._positions[-1]
