"""Ranges of numbers as texts.

Owns integers and decimals within bounds, and multiples. Knows no schema. Invariant: a text that matches reads as a
number within the bounds, also after it was rounded to a float.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Any

from embedllm.structured.caps import FRACTION_DIGITS, INTEGER, MAX_STEP, refuse
from embedllm.structured.expressions import EMPTY, Chars, Literal, Node, Ref
from embedllm.structured.nodes import NOTHING, alt, optional, repeat, seq

DIGIT = Chars(((0x30, 0x39),))
LARGEST = Decimal(10**30)
LARGEST_DECIMAL = Decimal(f"{INTEGER}.{'9' * FRACTION_DIGITS}")
Rest = Callable[[int, int], Node]  # (num_digits, remainder) -> that many digits, with that remainder


def _digits(low: int, high: int) -> Chars:
    return Chars(((0x30 + low, 0x30 + high),))


def number(schema: Mapping[str, Any], name: str, where: str, rules: dict[str, Node]) -> Node:
    """The numbers or integers (`name`) within the bounds of a schema. Raises InvalidRequest if there are none."""
    bounds: dict[str, Decimal] = {}
    for key in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"):
        given = schema.get(key, 1)
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            refuse(where, f"{key} must be a number, got {given!r}")
        if key in schema:
            # Nothing between the largest integers that are written and the end of floats changes what matches.
            bounds[key] = max(-LARGEST, min(LARGEST, Decimal(repr(given))))
    step = bounds.get("multipleOf")
    if step is not None and (step <= 0 or step != step.to_integral_value()):
        refuse(where, f"multipleOf must be a whole number from 1 up, got {schema['multipleOf']}")
    if step is not None and step > MAX_STEP and str(int(step)).strip("0") != "1":
        refuse(where, f"multipleOf is {schema['multipleOf']}; the limit is {MAX_STEP}, or any power of ten")
    node = _within(bounds, int(step or 1), rules) if name == "integer" or step else _decimals_within(bounds, rules)
    if node == NOTHING:
        refuse(where, f"no {name} of those that can be written (docs: structured output) lies within the bounds")
    if not bounds:
        rules.setdefault(name, node)
    return node if bounds else Ref(name)


def _within(bounds: Mapping[str, Decimal], step: int, rules: dict[str, Node]) -> Node:
    lows = [math.ceil(bounds["minimum"])] if "minimum" in bounds else []
    highs = [math.floor(bounds["maximum"])] if "maximum" in bounds else []
    if "exclusiveMinimum" in bounds:
        lows.append(math.floor(bounds["exclusiveMinimum"]) + 1)
    if "exclusiveMaximum" in bounds:
        highs.append(math.ceil(bounds["exclusiveMaximum"]) - 1)
    # An end that is left open lies beyond the one that is given, however large that is.
    low = max(lows, default=min([-INTEGER, *(10 * high for high in highs)]))
    high = min(highs, default=max([INTEGER, *(10 * low for low in lows)]))
    return integers(low, high, step, rules) if low <= high else NOTHING


def _decimals_within(bounds: Mapping[str, Decimal], rules: dict[str, Node]) -> Node:
    low, high = LARGEST_DECIMAL.copy_negate(), LARGEST_DECIMAL
    low, high = max(low, bounds.get("minimum", low)), min(high, bounds.get("maximum", high))
    if "exclusiveMinimum" in bounds:
        low = max(low, _inside(bounds["exclusiveMinimum"], math.inf))
    if "exclusiveMaximum" in bounds:
        high = min(high, _inside(bounds["exclusiveMaximum"], -math.inf))
    return decimals(low, high, rules) if low <= high else NOTHING


def _inside(bound: Decimal, towards: float) -> Decimal:
    """The bound that excludes `bound` itself from texts that are read as floats: its neighbour."""
    return Decimal(math.nextafter(float(bound), towards))


def integers(low: int, high: int, step: int, rules: dict[str, Node]) -> Node:
    """The multiples of `step` from `low` to `high`, as `str` writes them; NOTHING if there are none.

    Steps that are no power of ten take a rule per digit and remainder, which are put into `rules`.
    """
    zeros = ""
    if step > 1 and str(step).strip("0") == "1":
        zeros = str(step)[1:]
        low, high, step = -(-low // step), high // step, 1
    parts: list[Node] = []
    if low < 0:
        parts.append(seq(Literal("-"), _positive(max(1, -high), -low, step, rules), Literal(zeros)))
    if low <= 0 <= high:
        parts.append(Literal("0"))
    if high > 0:
        parts.append(seq(_positive(max(1, low), high, step, rules), Literal(zeros)))
    return alt(*parts)


def _positive(low: int, high: int, step: int, rules: dict[str, Node]) -> Node:
    rest = _rest(step, rules)
    if step == 1 and len(str(high)) - len(str(low)) > 1:
        # Whole lengths in the middle are one node.
        shortest, longest = len(str(low)) + (not _all(str(low - 1), "9") and low > 1), len(str(high + 1)) - 1
        parts: list[Node] = [seq(_digits(1, 9), repeat(DIGIT, shortest - 1, longest - 1))]
        if shortest > len(str(low)):
            parts.insert(0, _span(str(low), "9" * len(str(low)), 0, 1, rest))
        if longest < len(str(high)):
            parts.append(_span("1" + "0" * longest, str(high), 0, 1, rest))
        return alt(*parts)
    options = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1)), min(high, 10**length - 1)
        options.append(_span(str(first), str(last), 0, step, rest))
    return alt(*options)


def _all(text: str, digit: str) -> bool:
    return not text.strip(digit)


def _rest(step: int, rules: dict[str, Node]) -> Rest:
    def any_digits(count: int, remainder: int) -> Node:
        return repeat(DIGIT, count, count)

    def multiples(count: int, remainder: int) -> Node:
        if count == 0:
            return EMPTY if remainder == 0 else NOTHING
        name = f"multiple{step}_{count}_{remainder}"
        if name not in rules:
            rules[name] = NOTHING  # reserved
            rules[name] = _middle(0, 9, count, remainder, step, multiples)
        return Ref(name)

    return any_digits if step == 1 else multiples


def _middle(low: int, high: int, count: int, remainder: int, step: int, rest: Rest) -> Node:
    """`count` digits, the first from `low` to `high`, the others any that give the remainder."""
    groups: dict[int, list[int]] = defaultdict(list)
    for digit in range(low, high + 1):
        groups[(remainder - digit * 10 ** (count - 1)) % step].append(digit)
    options = []
    for left, group in groups.items():
        following = rest(count - 1, left)
        if following != NOTHING:
            runs = tuple((0x30 + d, 0x30 + d) for d in group) if step > 1 else ((0x30 + low, 0x30 + high),)
            options.append(seq(Chars(_joined(runs)), following))
    return alt(*options)


def _joined(runs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for low, high in runs:
        if joined and joined[-1][1] + 1 == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return tuple(joined)


def _span(low: str, high: str, remainder: int, step: int, rest: Rest) -> Node:
    """Digit strings from `low` to `high`, which are equally long, with that remainder modulo `step`."""
    same = _common(low, high)
    count = len(low) - len(same) - 1  # digits after the first in which they differ
    remainder = (remainder - int(same or "0") * 10 ** (count + 1)) % step
    if count < 0:
        return Literal(low) if remainder == 0 else NOTHING
    first, last = int(low[-count - 1]), int(high[-count - 1])
    parts: list[Node] = []
    tail: list[Node] = []
    after_low, after_high = low[len(same) + 1 :], high[len(same) + 1 :]
    if not _all(after_low, "0"):
        left = (remainder - first * 10**count) % step
        parts.append(seq(Literal(str(first)), _edge(after_low, "0", left, step, rest)))
        first += 1
    if not _all(after_high, "9"):
        left = (remainder - last * 10**count) % step
        tail.append(seq(Literal(str(last)), _edge(after_high, "9", left, step, rest)))
        last -= 1
    if first <= last:
        parts.append(_middle(first, last, count + 1, remainder, step, rest))
    return seq(Literal(same), alt(*parts, *tail))


def _edge(bound: str, end: str, remainder: int, step: int, rest: Rest) -> Node:
    """Digit strings as long as `bound`, from it up (end "0") or up to it (end "9"); side by side, not nested."""
    parts: list[Node] = []
    for i, digit in enumerate(bound):
        count = len(bound) - i
        if _all(bound[i:], end):
            return alt(*parts, seq(Literal(bound[:i]), rest(count, remainder)))
        first, last = (int(digit) + 1, 9) if end == "0" else (0, int(digit) - 1)
        if first <= last:
            parts.append(seq(Literal(bound[:i]), _middle(first, last, count, remainder, step, rest)))
        remainder = (remainder - int(digit) * 10 ** (count - 1)) % step
    return alt(*parts, Literal(bound) if remainder == 0 else NOTHING)


def _common(low: str, high: str) -> str:
    """The digits that both begin with."""
    return low[: next((i for i, pair in enumerate(zip(low, high, strict=True)) if len(set(pair)) > 1), len(low))]


def decimals(low: Decimal, high: Decimal, rules: dict[str, Node]) -> Node:
    """Numbers from `low` to `high` as plain decimals with up to FRACTION_DIGITS digits; NOTHING if there are none."""
    with localcontext() as context:
        context.prec = 60
        unit = Decimal(1).scaleb(-FRACTION_DIGITS)
        low, high = low.quantize(unit, ROUND_CEILING), high.quantize(unit, ROUND_FLOOR)
        if low > high:
            return NOTHING
        parts: list[Node] = []
        if low < 0:
            parts.append(seq(Literal("-"), _magnitudes(max(Decimal(0), -high), -low, rules)))
        if high >= 0:
            parts.append(_magnitudes(max(Decimal(0), low), high, rules))
    return alt(*parts)


def _magnitudes(low: Decimal, high: Decimal, rules: dict[str, Node]) -> Node:
    (first, after_low), (last, after_high) = (f"{bound:.{FRACTION_DIGITS}f}".split(".") for bound in (low, high))
    nines, zeros = "9" * FRACTION_DIGITS, "0" * FRACTION_DIGITS
    if first == last:
        return seq(Literal(first), _fraction(after_low, after_high))
    start, end, parts = int(first), int(last), []
    tail: list[Node] = []
    if after_low != zeros:
        parts.append(seq(Literal(first), _fraction(after_low, nines)))
        start += 1
    if after_high != nines:
        tail.append(seq(Literal(last), _fraction(zeros, after_high)))
        end -= 1
    if start <= end:
        parts.append(seq(integers(start, end, 1, rules), _fraction(zeros, nines)))
    return alt(*parts, *tail)


def _fraction(low: str, high: str) -> Node:
    """The point and the digits after it, which stand for at least `low` and at most `high`; zeros may be left out."""
    same = _common(low, high)
    count = len(low) - len(same) - 1
    parts: list[Node] = [Literal(f".{low[:i]}") for i in range(1, len(same) + 1) if _all(low[i:], "0")]
    if count >= 0:
        first, last = int(low[-count - 1]), int(high[-count - 1])
        tail: list[Node] = []
        after_low, after_high = low[len(same) + 1 :], high[len(same) + 1 :]
        if not _all(after_low, "0"):
            parts += _fraction_edge(f".{same}{first}", after_low, "0")
            first += 1
        if not _all(after_high, "9"):
            tail = _fraction_edge(f".{same}{last}", after_high, "9")
            last -= 1
        if first <= last:
            parts.append(seq(Literal(f".{same}"), _digits(first, last), repeat(DIGIT, 0, count)))
        parts += tail
    return optional(alt(*parts)) if _all(low, "0") else alt(*parts)


def _fraction_edge(before: str, bound: str, end: str) -> list[Node]:
    """`before` and up to len(bound) digits more: from the bound up (end "0"), or up to it (end "9")."""
    parts: list[Node] = []
    for i, digit in enumerate(bound):
        text, count = Literal(before + bound[:i]), len(bound) - i
        if _all(bound[i:], end):
            return [*parts, seq(text, repeat(DIGIT, 0, count))]
        if end == "9":
            parts.append(text)
        first, last = (int(digit) + 1, 9) if end == "0" else (0, int(digit) - 1)
        if first <= last:
            parts.append(seq(text, _digits(first, last), repeat(DIGIT, 0, count - 1)))
    return [*parts, Literal(before + bound)]
