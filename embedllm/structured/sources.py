"""Grammars that callers write, before a library reads them.

Owns the limits that keep a library from running out of stack or memory. Knows no library and no dialect. Invariant: it
refuses what is too large, never what is only malformed: that is the library's to say.
"""

from __future__ import annotations

import re

import numpy as np

from embedllm.errors import InvalidRequest, RequestFailed
from embedllm.structured.backend import Grammar
from embedllm.structured.caps import MAX_DEPTH, MAX_REPEAT, MAX_REPEAT_PRODUCT

MAX_BYTES = 64 * 1024
MAX_RULES = 500  # each may lead to the next, and libraries follow them by recursion
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|\[(?:[^\]\\\n]|\\.)*\]|(?:#|//)[^\n]*')
_RULE = re.compile(r"^\s*[!?]*[\w.-]+[^\n:]*(?:::=|:)", re.MULTILINE)
_BOUNDS = re.compile(r"[{~]\s*([0-9]*)\s*(?:(?:,|\.\.)\s*([0-9]*))?\s*}?")


def check_source(source: str) -> None:
    """Raises InvalidRequest for a grammar that is too long, too deeply nested or repeats too often."""
    if len(source.encode(errors="replace")) > MAX_BYTES:
        raise InvalidRequest(f"the grammar is over {MAX_BYTES:,} bytes; write less, or ask for a JSON schema")
    if "\0" in source or any("\ud800" <= c <= "\udfff" for c in source):
        raise InvalidRequest("the grammar holds NUL or half of a surrogate pair, which no answer can; remove it")
    if len(_RULE.findall(source)) > MAX_RULES:
        raise InvalidRequest(f"the grammar has over {MAX_RULES} rules; write less, or ask for a JSON schema")
    for match in _BOUNDS.finditer(source):
        if _bound(match) > MAX_REPEAT:
            raise InvalidRequest(f"the grammar repeats {match.group()!r} times; the limit is {MAX_REPEAT:,}")
    _check_brackets(_QUOTED.sub(" ", source))


def _bound(match: re.Match[str]) -> int:
    return max([int(bound[:9]) for bound in match.groups() if bound], default=1)


def _check_brackets(bare: str) -> None:
    products = [1]  # per open bracket, the largest product of bounds in it
    at = 0
    while at < len(bare):
        if bare[at] in "([":
            products.append(1)
        inner = products.pop() if bare[at] in ")]" and len(products) > 1 else 1
        match = _BOUNDS.match(bare, at + 1)
        products[-1] = max(products[-1], inner * (_bound(match) if match else 1))
        if len(products) > MAX_DEPTH:
            raise InvalidRequest(f"the grammar nests brackets more than {MAX_DEPTH} deep; name parts of it as rules")
        if products[-1] > MAX_REPEAT_PRODUCT:
            raise InvalidRequest(f"the grammar repeats repeats over {MAX_REPEAT_PRODUCT:,} times; ask for less")
        at = match.end() if match else at + 1


def check_start(grammar: Grammar, num_words: int) -> None:
    """Raises InvalidRequest for a compiled grammar that no text can begin."""
    row = np.zeros(num_words, np.int32)
    try:
        grammar.new_state().fill(row)
    except RequestFailed as error:
        raise InvalidRequest(f"no answer can begin as the grammar says: {error}") from error
    if not row.any():
        raise InvalidRequest("no answer can begin as the grammar says: its rules only lead to each other")


def readable(message: object) -> str:
    """A library's message without the places in its own sources and its stack traces, cut to one short line."""
    text = re.sub(r"^\[[0-9:]+\] \S+?:[0-9]+: ", "", str(message).strip())
    line = " ".join(text.split("\n<backtrace>")[0].split())
    return line if len(line) <= 400 else f"{line[:400]}..."
