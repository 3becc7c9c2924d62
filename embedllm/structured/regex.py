"""Regular expressions to nodes.

Owns the syntax: what ECMAScript and Python write the same way and mean the same by. Knows no JSON. Invariant: what is
not supported is refused with its position; nothing is read as something else. Texts never hold NUL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from embedllm.structured.caps import MAX_DEPTH, MAX_REGEX_BYTES, MAX_REPEAT, MAX_REPEAT_PRODUCT, check_text, refuse
from embedllm.structured.expressions import EMPTY, Chars, Literal, Node, Repeat
from embedllm.structured.nodes import ANY, alt, chars, repeat, seq, without

Ranges = list[tuple[int, int]]

CLASSES: dict[str, Ranges] = {
    "d": [(0x30, 0x39)],
    "w": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "s": [(0x09, 0x0D), (0x20, 0x20)],
}
# What some readers of the pattern take as \s and others do not: in neither \s nor \S.
WIDER_SPACES = [
    *((0x1C, 0x1F), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F)),
    *((0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
COUNTS = re.compile(r"\{(\d*)(,?)(\d*)\}")
NOT_NEWLINE = without([(0x0A, 0x0A)])
REFUSED_ESCAPES = {
    "b": "word boundaries are not supported",
    "B": "word boundaries are not supported",
    "A": "write ^ for the beginning",
    "Z": "write $ for the end",
    "z": "write $ for the end",
    "k": "back-references are not supported",
    "p": "Unicode classes are not supported; write the ranges of characters",
    "P": "Unicode classes are not supported; write the ranges of characters",
    "c": "write control characters as \\xHH",
    "0": "the character NUL is not supported",
}


def regex(pattern: str, where: str) -> Node:
    """What the pattern matches as a whole; \\d \\w \\s are ASCII, . is not a newline, ^ and $ only at the ends.

    Raises InvalidRequest with the position of what is malformed or not supported.
    """
    return alt(*(branch.node for branch in _Reader(pattern, where, None).branches()))


def search(pattern: str, where: str, open_end: int) -> Node:
    """The texts in which the pattern matches somewhere: up to `open_end` other characters stand where no anchor does.

    `*`, `+` and `{m,}` repeat at most max(m, open_end) times. Raises as `regex`.
    """
    around = Repeat(ANY, 0, open_end)
    branches = _Reader(pattern, where, open_end).branches()
    return alt(*(seq(EMPTY if b.begins else around, b.node, EMPTY if b.ends else around) for b in branches))


@dataclass(frozen=True)
class _Branch:
    node: Node
    begins: bool  # anchored
    ends: bool


class _Reader:
    """Reads one pattern from left to right; the nodes it returns carry the product of the bounds inside them."""

    def __init__(self, pattern: str, where: str, open_end: int | None) -> None:
        self.where = where
        self.text = check_text(pattern, where)
        if (size := len(pattern.encode())) > MAX_REGEX_BYTES:
            refuse(where, f"the pattern takes {size:,} bytes, the limit is {MAX_REGEX_BYTES:,}; shorten it")
        self.open_end = open_end
        self.at = 0

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        position = self.at if at is None else at
        shown = self.text if len(self.text) <= 60 else f"{self.text[:60]}..."
        refuse(self.where, f"{why} (position {position} of the pattern {shown!r})")

    @property
    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, text: str) -> bool:
        if self.text.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def branches(self) -> list[_Branch]:
        found = [self.branch()]
        while self.take("|"):
            found.append(self.branch())
        if self.next:
            self.fail("this ) closes nothing; write \\)")
        return found

    def branch(self) -> _Branch:
        begins = self.take("^")
        node, _ = self.sequence(0)
        ends = self.take("$")
        if self.next in ("^", "$"):
            self.fail(f"{self.next} may stand only at the ends; write \\{self.next} for the character")
        if ends and self.next not in ("", "|", ")"):
            self.fail("$ may stand only at the end; write \\$ for the character", self.at - 1)
        return _Branch(node, begins, ends)

    def alternatives(self, depth: int) -> tuple[Node, int]:
        options, product = [], 1
        while True:
            node, inner = self.sequence(depth)
            options.append(node)
            product = max(product, inner)
            if not self.take("|"):
                return alt(*options), product

    def sequence(self, depth: int) -> tuple[Node, int]:
        items, product = [], 1
        while self.next not in ("", "|", ")"):
            if self.next in "^$":
                if depth == 0:
                    break
                self.fail(f"{self.next} may stand only at the ends of the pattern, not in a group; move it out")
            node, inner = self.quantified(*self.atom(depth))
            items.append(node)
            product = max(product, inner)
        return seq(*items), product

    def atom(self, depth: int) -> tuple[Node, int]:
        if self.next in "*+?" or (self.next == "{" and COUNTS.match(self.text, self.at)):
            self.fail(f"{self.next} has nothing to repeat; write \\{self.next} for the character")
        start = self.at
        self.at += 1
        match self.text[start]:
            case "(":
                return self.group(depth, start)
            case "[":
                return self.char_class(start), 1
            case ".":
                return NOT_NEWLINE, 1
            case "\\":
                ranges = self.escape(start)
                single = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
                return (Literal(chr(ranges[0][0])) if single else chars(ranges)), 1
            case character:
                return Literal(character), 1

    def group(self, depth: int, start: int) -> tuple[Node, int]:
        if depth >= MAX_DEPTH:
            self.fail(f"groups are nested more than {MAX_DEPTH} deep; make it flatter", start)
        if self.take("?"):
            for sign, name in (("=", "look-ahead"), ("!", "look-ahead"), ("<=", "look-behind"), ("<!", "look-behind")):
                if self.take(sign):
                    self.fail(f"{name} is not supported; describe the text without it", start)
            named = re.compile(r":|P?<[A-Za-z_]\w*>").match(self.text, self.at)
            if not named:
                self.fail("groups of this kind (flags, atomic, conditional) are not supported; use (?:...)", start)
            self.at = named.end()
        inner = self.alternatives(depth + 1)
        if not self.take(")"):
            self.fail("this ( is never closed; write \\( for the character", start)
        return inner

    def quantified(self, node: Node, product: int) -> tuple[Node, int]:
        start = self.at
        if self.take("*"):
            least, most = 0, None
        elif self.take("+"):
            least, most = 1, None
        elif self.take("?"):
            least, most = 0, 1
        elif counts := COUNTS.match(self.text, self.at):
            self.at = counts.end()
            least, most = self.counts(counts, start)
        else:
            return node, product
        if self.take("?"):
            pass  # lazy: the same texts
        elif self.take("+"):
            self.fail("possessive quantifiers are not supported", start)
        if self.next in ("*", "+", "?") or COUNTS.match(self.text, self.at):
            self.fail("a quantifier may not follow another; use a group", self.at)
        product *= max(1, least if most is None else most)
        if product > MAX_REPEAT_PRODUCT:
            self.fail(f"repeats inside repeats come to {product:,}, the limit is {MAX_REPEAT_PRODUCT:,}", start)
        if most is None and self.open_end is not None:
            most = max(least, self.open_end)
        return repeat(node, least, most), product

    def counts(self, found: re.Match[str], start: int) -> tuple[int, int | None]:
        low, comma, high = found.groups()
        if not low:
            self.fail("a count needs a lower bound: write {0,n}, or \\{ for the character", start)
        # Length first: int() of a long text is slow, and refused by Python itself.
        for bound in (low, high):
            if len(bound.lstrip("0")) > len(str(MAX_REPEAT)) or int(bound or 0) > MAX_REPEAT:
                self.fail(f"{bound[:20]} repeats are over the limit of {MAX_REPEAT:,}; write a smaller bound", start)
        least, most = int(low), int(high) if high else None if comma else int(low)
        if most is not None and least > most:
            self.fail(f"{{{least},{most}}} has its bounds the wrong way round", start)
        return least, most

    def char_class(self, start: int) -> Chars:
        negated = self.take("^")
        if self.next == "]":
            self.fail("a class must not begin with ]; write \\]", start)
        ranges: Ranges = []
        while not self.take("]"):
            low = self.class_item(start)
            if self.next == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.class_item(start)
                if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                    self.fail("a range needs one character on each side; write \\- for the character")
                if low[0][0] > high[0][0]:
                    self.fail(f"the range {chr(low[0][0])!r} to {chr(high[0][0])!r} is the wrong way round")
                low = [(low[0][0], high[0][0])]
            ranges += _wider(low) if negated else low
        found = without(ranges) if negated else chars(ranges)
        if not found.ranges:
            self.fail("this class holds no character", start)
        return found

    def class_item(self, start: int) -> Ranges:
        if not self.next:
            self.fail("this [ is never closed; write \\[ for the character", start)
        at = self.at
        self.at += 1
        return self.escape(at) if self.text[at] == "\\" else [(ord(self.text[at]), ord(self.text[at]))]

    def escape(self, start: int) -> Ranges:
        """What stands after the backslash at `start`."""
        if not self.next:
            self.fail("a backslash at the end escapes nothing; write \\\\", start)
        if found := HEX.match(self.text, self.at):
            self.at = found.end()
            code = int(found[1] or found[2] or found[3], 16)
            if code == 0 or 0xD800 <= code <= 0xDFFF or code > 0x10FFFF:
                self.fail(f"U+{code:04X} is not a character that an answer can hold", start)
            return [(code, code)]
        character = self.next
        self.at += 1
        if character in CONTROLS:
            return [(ord(CONTROLS[character]),) * 2]
        if character.lower() in CLASSES:
            ranges = CLASSES[character.lower()]
            return ranges if character.islower() else list(without(_wider(ranges)).ranges)
        if character in REFUSED_ESCAPES:
            self.fail(f"\\{character}: {REFUSED_ESCAPES[character]}", start)
        if character.isdigit():
            self.fail("back-references are not supported", start)
        if character.isalpha():
            self.fail(f"\\{character} is not known; write {character} alone, or \\\\ for a backslash", start)
        return [(ord(character), ord(character))]


def _wider(ranges: Ranges) -> Ranges:
    """What the complement of these leaves out."""
    return ranges + WIDER_SPACES if ranges is CLASSES["s"] else ranges
