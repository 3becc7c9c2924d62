"""Untrusted text shown as Markdown: a small subset that can neither fetch, link, run nor typeset anything.

Owns a parser of that subset and its two writers, HTML and Markdown. Knows no notebook. A model's answer may hold raw
HTML, images, links or LaTeX: none of these exists here, so they stay the text they are. Invariant: the HTML has bare
tags of TAGS only, and every piece of the answer is escaped into it; the Markdown means the same to any reader of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TAGS = frozenset({"p", "em", "strong", "code", "pre", "ul", "ol", "li", "hr", "span", "table", "tr", "th", "td"})
TAGS |= {"h1", "h2", "h3", "h4", "h5", "h6"}
MAX_DEPTH = 8  # of lists in lists

FENCE = re.compile(r"([ \t]*)(`{3,}(?=[^`]*$)|~{3,}).*")
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})")
ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(.*)")
MARK = re.compile(r"\\[*_`#|~]|(?<!`)(`+)(?!`)|\*\*|__|\*|_")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Words that some reader of Markdown makes a link or a formula of, however they are escaped.
RISKY = re.compile(r"[$\\]|//|[^\W_]\.[^\W\d_]{2}")


@dataclass(frozen=True, slots=True)
class Block:
    """kind: "p", "h1" to "h6", "ul" or "ol" (one item, `depth` lists deep), "hr", "pre", or "table" (with `rows`)."""

    kind: str
    text: str = ""
    depth: int = 0
    rows: tuple[tuple[str, ...], ...] = ()


class Span(NamedTuple):
    """A run of text in one style."""

    text: str
    code: bool
    strong: bool
    em: bool


def to_html(text: str) -> str:
    """`text` as HTML whose tags are of TAGS, without attributes. Takes time in proportion to the text."""
    parts: list[str] = []
    lists: list[str] = []  # tags of those that are open
    for block in _blocks(text):
        if block.kind in ("ul", "ol"):
            _close_lists(parts, lists, block.depth + 1)
            if len(lists) == block.depth + 1 and lists[-1] != block.kind:
                _close_lists(parts, lists, block.depth)
            parts.append("</li><li>" if len(lists) == block.depth + 1 else f"<{block.kind}><li>")
            lists += [block.kind] * (block.depth + 1 - len(lists))
            parts.append(_inline_html(block.text))
            continue
        _close_lists(parts, lists, 0)
        if block.kind == "hr":
            parts.append("<hr>")
        elif block.kind == "pre":
            parts.append(f"<pre><code>{escape(block.text)}</code></pre>")
        elif block.kind == "table":
            rows = [(("th" if row is block.rows[0] else "td"), row) for row in block.rows]
            cells = ["".join(f"<{tag}>{_inline_html(cell)}</{tag}>" for cell in row) for tag, row in rows]
            parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        else:
            parts.append(f"<{block.kind}>{_inline_html(block.text)}</{block.kind}>")
    _close_lists(parts, lists, 0)
    return "".join(parts)


def to_markdown(text: str) -> str:
    """`text` as Markdown in which nothing but the subset means anything. A table becomes a block of code."""
    parts: list[str] = []
    before = ""
    for block in _blocks(text):
        is_item = block.kind in ("ul", "ol")
        if parts:
            parts.append("\n" if is_item and before in ("ul", "ol") else "\n\n")
        before = block.kind
        if is_item:
            parts.append("    " * block.depth + ("- " if block.kind == "ul" else "1. ") + _inline_markdown(block.text))
        elif block.kind == "hr":
            parts.append("***")
        elif block.kind in ("pre", "table"):
            parts.append(fenced(block.text))
        else:
            parts.append("#" * int(block.kind[1:] or 0) + " " * (block.kind != "p") + _inline_markdown(block.text))
    return "".join(parts)


def escape(text: str) -> str:
    """HTML of plain text. What could begin a formula stands alone in an element, where no typesetter pairs it up."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", html.escape(text))


def fenced(text: str, language: str = "") -> str:
    """A Markdown code block that nothing in `text` closes."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# ---- write ------------------------------------------------------------------------------------------------------


def _close_lists(parts: list[str], lists: list[str], depth: int) -> None:
    while len(lists) > depth:
        parts.append(f"</li></{lists.pop()}>")


def _inline_html(text: str) -> str:
    parts = []
    for span in _spans(text):
        styles = (("em", span.em), ("strong", span.strong), ("code", span.code))
        tags = [tag for tag, on in styles if on and span.text]
        parts += [f"<{tag}>" for tag in tags]
        parts.append(escape(span.text))
        parts += [f"</{tag}>" for tag in reversed(tags)]
    return "".join(parts)


def _inline_markdown(text: str) -> str:
    written = ""
    for span in _spans(text):
        mark = "**" * span.strong + "*" * span.em
        pieces = [_code(span.text)] if span.code else [_word(word) for word in re.split("( +)", span.text)]
        inner = ""
        for piece in pieces:
            inner += " " * (inner.endswith("`") and piece.startswith("`")) + piece  # two runs of ticks would be one
        outer = inner.strip(" ")
        left, _, right = inner.partition(outer) if outer else (inner, "", "")
        styled = left + mark + outer + mark + right if outer else inner
        written += " " * (written.endswith("`") and styled.startswith("`")) + styled
    return re.sub(r"^(\d+)([.)])", lambda found: f"{found[1]}&#{ord(found[2])};", written)


def _word(word: str) -> str:
    if RISKY.search(word):
        return _code(word)
    return re.sub(r"[!-'*+:-@\[-`{-~-]", lambda found: f"&#{ord(found[0])};", word)


def _code(text: str) -> str:
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text[0] == "`" or text[-1] == "`")
    return f"{ticks}{pad}{text}{pad}{ticks}"


# ---- read -------------------------------------------------------------------------------------------------------


def _blocks(text: str) -> Iterator[Block]:
    text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
    lines = text.split("\n")
    gathered: list[str] = []  # lines of the paragraph or the item that is open
    kind, depth = "p", 0
    indents: list[int] = []  # of the lists that are open
    at = 0
    while at < len(lines):
        block, used = _block(lines, at, indents)
        line = lines[at].strip()
        at += used
        if block is None and line:
            if not gathered:
                kind, depth = "p", 0
                indents.clear()
            gathered.append(line)
            continue
        if gathered:
            yield Block(kind, " ".join(gathered), depth)
            gathered = []
        if block is not None and block.kind in ("ul", "ol"):
            kind, depth, gathered = block.kind, block.depth, [block.text]
        elif block is not None:
            indents.clear()
            yield block
    if gathered:
        yield Block(kind, " ".join(gathered), depth)


def _block(lines: list[str], at: int, indents: list[int]) -> tuple[Block | None, int]:
    """The block that begins at this line and the lines it takes; None for a blank line and one of a paragraph."""
    line = lines[at]
    if found := FENCE.fullmatch(line):
        return _code_block(lines, at, len(found[1]), found[2])
    if found := HEADING.fullmatch(line):
        title = found[2].strip()
        bare = title.rstrip("#")
        return Block(f"h{len(found[1])}", title if bare and not bare[-1].isspace() else bare.rstrip()), 1
    if RULE.fullmatch(line):
        return Block("hr"), 1
    if found := ITEM.fullmatch(line):
        kind, indent = "ul" if found[2] in "-*+" else "ol", len(found[1].expandtabs(4))
        if kind == "ul" or indents or int(found[2][:-1]) == 1:  # a number that begins no list is text
            depth = min(sum(indent > outer + 1 for outer in indents), MAX_DEPTH - 1)
            indents[depth:] = [indent]
            return Block(kind, found[3].strip(), depth), 1
    if "|" in line and at + 1 < len(lines):
        rule = lines[at + 1].strip()
        if "-" in rule and set(rule) <= set("|:- \t") and len(_cells(rule)) == len(_cells(line)):
            end = at + 2
            while end < len(lines) and "|" in lines[end]:
                end += 1
            rows = tuple(_cells(row) for row in (line, *lines[at + 2 : end]))
            return Block("table", "\n".join(lines[at:end]), rows=rows), end - at
    return None, 1


def _code_block(lines: list[str], at: int, indent: int, fence: str) -> tuple[Block, int]:
    """Up to the fence that closes it, or the end."""
    closing = re.compile(rf"[ \t]*{fence}{fence[0]}*[ \t]*")
    end = at + 1
    while end < len(lines) and not closing.fullmatch(lines[end]):
        end += 1
    body = [line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in lines[at + 1 : end]]
    return Block("pre", "\n".join(body)), min(end + 1, len(lines)) - at


def _cells(row: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|"))


def _spans(text: str) -> Iterator[Span]:
    """The runs of one block, some of them empty. A mark that nothing closes is text."""
    text = " ".join(text.split())
    marks = list(MARK.finditer(text))
    last = {found[0]: i for i, found in enumerate(marks) if found[1] or _closes(text, found)}
    style = {"*": "", "**": ""}  # the mark that opened it
    plain, done, i = "", 0, -1
    while (i := i + 1) < len(marks):
        found, mark = marks[i], marks[i][0]
        plain, done = plain + text[done : found.start()], found.end()
        kind = mark.replace("_", "*")
        strong, em = bool(style["**"]), bool(style["*"])
        if mark[0] == "\\":
            plain += mark[1]
        elif found[1] and last[mark] > i:
            i = next(j for j in range(i + 1, len(marks)) if marks[j][0] == mark)
            code = text[done : marks[i].start()]
            yield Span(plain, False, strong, em)
            yield Span(code.strip() or code, True, strong, em)
            plain, done = "", marks[i].end()
        elif not found[1] and style[kind] == mark and _closes(text, found):
            yield Span(plain, False, strong, em)
            plain, style[kind] = "", ""
        elif not found[1] and not style[kind] and _opens(text, found) and last.get(mark, -1) > i:
            yield Span(plain, False, strong, em)
            plain, style[kind] = "", mark
        else:
            plain += mark
    yield Span(plain + text[done:], False, bool(style["**"]), bool(style["*"]))


def _opens(text: str, found: re.Match[str]) -> bool:
    before, after = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
    return bool(after.strip()) and not (found[0][0] == "_" and before.isalnum())


def _closes(text: str, found: re.Match[str]) -> bool:
    before, after = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
    return bool(before.strip()) and not (found[0][0] == "_" and after.isalnum())
