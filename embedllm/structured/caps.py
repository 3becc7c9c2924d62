"""What lowering takes and what it assumes: the limits on what comes in, the lengths of what a schema leaves open.

Owns the numbers and the first look at untrusted data. Knows no schema and no grammar. Invariant: data that `plain`
gives back is JSON, small and shallow, so what reads it may recurse.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from embedllm.errors import InvalidRequest

# What is refused.
MAX_SOURCE_BYTES = 256 * 1024  # of a schema or structural tag, written as JSON
MAX_SOURCE_NODES = 10_000  # values in it, at every level
MAX_DEPTH = 64  # levels of it; groups inside groups of a regular expression
MAX_ENTRIES = 5_000  # of one enum, or of choice
MAX_ENTRY_BYTES = 256 * 1024  # of one enum, or of choice, together
MAX_NODES = 50_000  # of the rules, counted as they are written out
MAX_REPEAT = 4_096  # in {m,n}, minLength and minItems; a larger maxLength or maxItems means this
MAX_REPEAT_PRODUCT = 65_536  # of bounds inside bounds, in one regular expression
MAX_REGEX_BYTES = 16 * 1024
MAX_MERGED = 64  # schemas merged into one, and options of a oneOf
MAX_STEP = 64  # multipleOf, unless it is a power of ten

# What holds where a schema says nothing.
STRING_LENGTH = 256  # characters of a string, and of each open end or repeat of a pattern
ARRAY_ITEMS = 16
EXTRA_PROPERTIES = 16
NAME_LENGTH = 64  # characters of a name that no schema gives
INTEGER = 10**15 - 1  # integers and numbers lie within plus and minus this
FRACTION_DIGITS = 15
FREE_DEPTH = 4  # levels of objects and arrays in a value of any kind
RECURSION_DEPTH = 8  # levels of a schema within itself


def refuse(where: str, why: str) -> NoReturn:
    raise InvalidRequest(f"{where}: {why}")


def plain(value: Any, where: str) -> Any:
    """A copy of JSON data. Raises InvalidRequest for what is not JSON, or is over a limit."""
    num_nodes, level = 1, [value]
    for _ in range(MAX_DEPTH + 1):  # before it is written: parts that it holds many times over are written as often
        level = [child for node in level if isinstance(node, (dict, list, tuple)) for child in _children(node)]
        num_nodes += len(level)
        if num_nodes > MAX_SOURCE_NODES:
            refuse(where, f"it holds {num_nodes:,} values or more, the limit is {MAX_SOURCE_NODES:,}; make it smaller")
        if not level:
            break
    else:
        refuse(where, f"it is nested more than {MAX_DEPTH} levels deep; make it flatter")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        num_bytes = len(text.encode())
    except (TypeError, ValueError) as error:
        refuse(where, f"it must be plain JSON data: {error}")
    if num_bytes > MAX_SOURCE_BYTES:
        refuse(where, f"it takes {num_bytes:,} bytes as JSON, the limit is {MAX_SOURCE_BYTES:,}; make it smaller")
    return json.loads(text)


def _children(node: dict[str, Any] | list[Any] | tuple[Any, ...]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def check_text(text: str, where: str) -> str:
    """The text, if a model can write it. Raises InvalidRequest for lone surrogates and NUL."""
    if "\0" in text:
        refuse(where, f"{text[:80]!r} holds the character NUL, which no answer can; leave it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(where, f"{text[:80]!r} holds half of a surrogate pair at {error.start}; write the whole character")
    return text


def check_entries(texts: list[str], where: str) -> None:
    """Raises InvalidRequest unless these are few and short enough to choose from."""
    if len(texts) > MAX_ENTRIES:
        refuse(where, f"it has {len(texts):,} entries, the limit is {MAX_ENTRIES:,}; offer fewer")
    if (num_bytes := sum(len(text.encode()) for text in texts)) > MAX_ENTRY_BYTES:
        refuse(where, f"its entries take {num_bytes:,} bytes, the limit is {MAX_ENTRY_BYTES:,}; offer fewer")
