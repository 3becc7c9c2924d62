"""Grammars that callers write, before a library reads them.

Owns the limits that keep a library from running out of stack or memory. Knows no library and no dialect. Invariant: it
refuses what is too large, never what is only malformed: that is the library's to say.
"""

from __future__ import annotations

import re

from embedllm.errors import InvalidRequest
from embedllm.structured.caps import MAX_DEPTH, MAX_REPEAT

MAX_BYTES = 64 * 1024
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\\n]|\\.)*\]|#[^\n]*|//[^\n]*')
_BOUNDS = re.compile(r"[{~]\s*([0-9]*)\s*(?:(?:,|\.\.)\s*([0-9]*))?")


def check_source(source: str) -> None:
    """Raises InvalidRequest for a grammar that is too long, too deeply nested or repeats too often."""
    if len(source.encode(errors="replace")) > MAX_BYTES:
        raise InvalidRequest(f"the grammar is over {MAX_BYTES:,} bytes; write less, or ask for a JSON schema")
    if "\0" in source or any("\ud800" <= c <= "\udfff" for c in source):
        raise InvalidRequest("the grammar holds NUL or half of a surrogate pair, which no answer can; remove it")
    depth = 0
    bare = _QUOTED.sub(" ", source)
    for character in bare:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"the grammar nests brackets more than {MAX_DEPTH} deep; name parts of it as rules")
    for match in _BOUNDS.finditer(source):
        if any(len(bound) > 9 or int(bound) > MAX_REPEAT for bound in match.groups() if bound):
            raise InvalidRequest(f"the grammar repeats {match.group()!r} times; the limit is {MAX_REPEAT:,}")


def readable(message: object) -> str:
    """A library's message without the places in its own sources and its stack traces, cut to one short line."""
    text = re.sub(r"^\[[0-9:]+\] \S+?:[0-9]+: ", "", str(message).strip())
    line = " ".join(text.split("\n<backtrace>")[0].split())
    return line if len(line) <= 400 else f"{line[:400]}..."
