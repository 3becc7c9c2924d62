"""Strings as JSON writes them.

Owns the escapes, the formats and how lengths and patterns go together. Knows no schema. Invariant: each string is
written in exactly one way, the one of `json.dumps(ensure_ascii=False)`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

from embedllm.structured.caps import STRING_LENGTH, refuse
from embedllm.structured.expressions import Alt, Chars, Literal, Node, Ref, Repeat, Seq
from embedllm.structured.nodes import alt, chars, lengths, optional, repeat, rule, seq
from embedllm.structured.regex import search

QUOTED = (0x22, 0x5C)  # " and \
PLAIN = chars([(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)])
SHORT = '"\\bfnrt'  # after a backslash
# The other control characters are \u00XX, with lower-case digits.
ESCAPED = seq(
    Literal("\\"),
    alt(
        Chars(chars([(ord(c), ord(c)) for c in SHORT]).ranges),
        seq(Literal("u000"), chars([(0x30, 0x37), (0x62, 0x62), (0x65, 0x66)])),
        seq(Literal("u001"), chars([(0x30, 0x39), (0x61, 0x66)])),
    ),
)

_MONTH_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
)
_YEAR = r"(?:000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_BY_4 = r"(?:0[48]|[2468][048]|[13579][26])"
_DATE = rf"(?:{_YEAR}-{_MONTH_DAY}|(?:\d\d{_BY_4}|{_BY_4}00)-02-29)"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_CLOCK = r"T(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}S)?)?|\d{1,4}M(?:\d{1,4}S)?|\d{1,4}S)"
_DAYS = r"(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,33}[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}\.){{0,5}}[A-Za-z](?:[A-Za-z0-9-]{{0,33}}[A-Za-z0-9])?"
_ATOM = r"[A-Za-z0-9_+-]{1,21}"
_BYTE = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_BYTE}\.{_BYTE}\.{_BYTE}\.{_BYTE}"
_H16 = r"[0-9a-f]{1,4}"
_PATH_CHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-F]{2})"
_PATH = rf"(?:{_PATH_CHAR}|/)"
_AFTER = rf"(?:\?(?:{_PATH}|\?){{0,128}})?(?:#(?:{_PATH}|\?){{0,64}})?"

# RFC 3339 (date, time, date-time, duration), RFC 5321 without quoting (email), RFC 1123 (hostname), RFC 2673 (ipv4),
# RFC 4291 without a dotted tail (ipv6), RFC 4122 (uuid), RFC 3986 (uri). Each is a part of what the RFC allows.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P(?:{_DAYS}(?:{_CLOCK})?|{_CLOCK}|\d{{1,4}}W)",
    "email": rf"{_ATOM}(?:\.{_ATOM}){{0,2}}@(?:{_LABEL}\.){{1,4}}[A-Za-z]{{2,24}}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": "|".join(
        [rf"(?:{_H16}:){{7}}{_H16}", "::"]
        + [rf"(?:{_H16}:){{{n - 1}}}{_H16}::(?:{_H16}(?::{_H16}){{0,{6 - n}}})?" for n in range(1, 7)]
        + [rf"(?:{_H16}:){{6}}{_H16}::", rf"::{_H16}(?::{_H16}){{0,6}}"]
    ),
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": rf"[A-Za-z][A-Za-z0-9+.-]{{0,15}}:(?://{_HOST}(?::\d{{1,4}})?(?:/{_PATH}{{0,256}})?|{_PATH_CHAR}{_PATH}{{0,256}})"
    + _AFTER,
}
# Pydantic's pattern for Decimal has a look-ahead; this is a part of it without one.
SAME_AS = {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?\d{1,30}(?:\.\d{0,30})?$"}


def quoted(text: str) -> Literal:
    return Literal(json.dumps(text, ensure_ascii=False))


def in_json(node: Node) -> Node:
    """The same texts with each character written as inside a JSON string."""
    if isinstance(node, Literal):
        return Literal(json.dumps(node.text, ensure_ascii=False)[1:-1])
    if isinstance(node, Chars):
        special = [Literal(json.dumps(chr(c))[1:-1]) for c in (*range(1, 0x20), *QUOTED) if _holds(node, c)]
        raw = _cut(node)
        return alt(*([raw] if raw.ranges else []), *([ESCAPED] if len(special) == 33 else special))
    if isinstance(node, Seq):
        return seq(*map(in_json, node.items))
    if isinstance(node, Alt):
        return alt(*map(in_json, node.options))
    assert isinstance(node, Repeat)
    return Repeat(in_json(node.item), node.least, node.most)


def _holds(node: Chars, code: int) -> bool:
    return any(low <= code <= high for low, high in node.ranges)


def _cut(node: Chars) -> Chars:
    """Its characters that stand for themselves in a JSON string."""
    common = ((max(low, start), min(high, end)) for low, high in node.ranges for start, end in PLAIN.ranges)
    return chars(pair for pair in common if pair[0] <= pair[1])


def free(least: int, most: int) -> Node:
    """What stands between the quotes of any string of these lengths."""
    return repeat(Ref("character"), least, most)


def common_rules() -> dict[str, Node]:
    """The rules that strings refer to."""
    return {"escaped": ESCAPED, "character": alt(PLAIN, Ref("escaped"))}


def shaped(pattern: str | None, format_name: str | None, least: int, most: int | None, where: str) -> Node | None:
    """The raw texts of a string with a pattern or a known format; None if it has neither.

    Raises InvalidRequest where both are given, or where the lengths cannot be promised.
    """
    known = FORMATS.get(format_name or "")
    if pattern is None and known is None:
        return None
    if pattern is not None and known is not None:
        refuse(where, f"pattern beside format {format_name!r} is not supported; say both in the pattern")
    source = SAME_AS.get(pattern, pattern) if pattern is not None else f"^(?:{known})$"
    node = _fitted(search(source or "", where, STRING_LENGTH), least, most)
    low, high = lengths(node)
    if low < least or high is None or (most is not None and high > most):
        refuse(
            where,
            f"the pattern matches {low} to {high} characters, minLength and maxLength ask for {least} to "
            f"{'any number' if most is None else most}; let the pattern count them: {{m,n}} for * and +",
        )
    return node


def _fitted(node: Node, least: int, most: int | None) -> Node:
    """The node with its lengths within the bounds, where all that varies is one repeat of single characters."""
    items: list[Node] = list(node.items) if isinstance(node, Seq) else [node]
    varying = [i for i, item in enumerate(items) if len(set(lengths(item))) > 1]
    if len(varying) != 1:
        return node
    item = items[varying[0]]
    if not isinstance(item, Repeat) or item.most is None or lengths(item.item) != (1, 1):
        return node
    fixed = sum(lengths(other)[0] for other in items) - item.least
    low = max(item.least, least - fixed)
    high = item.most if most is None else min(item.most, most - fixed)
    if low > high:
        return node
    items[varying[0]] = repeat(item.item, low, high)
    return seq(*items)


def other_than(names: Iterable[str], most: int, depth: int, rules: dict[str, Node]) -> Node:
    """What stands between the quotes of a string that is none of these.

    A name of `depth` characters or more also excludes every string that begins with its first `depth` characters.
    """
    below: dict[str, list[str]] = defaultdict(list)
    for name in names:
        below[name[:1]].append(name[1:])
    is_name = below.pop("", None) is not None
    codes = [ord(character) for character in below]
    escapes: list[Node] = [] if any(code < 0x20 or code in QUOTED for code in codes) else [Ref("escaped")]
    options: list[Node] = [seq(alt(chars(_gaps(codes)), *escapes), free(0, most))]
    if depth > 1:
        for character, rests in below.items():
            after = other_than(rests, most, depth - 1, rules)
            # Grammar libraries take only so much nesting within one rule.
            after = after if depth % 8 else rule(after, rules)
            options.append(seq(in_json(Literal(character)), after))
    return alt(*options) if is_name else optional(alt(*options))


def _gaps(codes: list[int]) -> list[tuple[int, int]]:
    """PLAIN without these."""
    gaps = []
    for low, high in PLAIN.ranges:
        start = low
        for code in sorted(code for code in codes if low <= code <= high):
            gaps.append((start, code - 1))
            start = code + 1
        gaps.append((start, high))
    return [(low, high) for low, high in gaps if low <= high]
