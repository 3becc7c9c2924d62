"""What a model writes, told apart as it comes: reasoning, text, and tool calls that became complete.

Owns one machine for all families (`families.py`). Knows no tokens and no model. Invariants: every character that is fed
is given out once, as text or reasoning, unless it belongs to a call or only separates markers; the parts do not depend
on how the text was cut; time is linear in its length, and what is held back is at most MAX_CALL characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from embedllm.chat.calls import Schemas, read_calls
from embedllm.chat.families import Family, Reasoning
from embedllm.outputs import Said, ToolCall

MAX_CALL = 2**20  # characters of one call; a longer one is text
MAX_NESTING = 64
MAX_SPACE = 4096  # characters of whitespace that are held back
_XML_QUOTES = {"qwen_xml": ("<parameter=", "</parameter>"), "glm_xml": ("<arg_value>", "</arg_value>")}
_IN_STRING = re.compile(r'["\\\x00-\x1f]')


class _Marks:
    """A few literal texts, none the beginning of another, looked for in a text that is still growing."""

    def __init__(self, *texts: str) -> None:
        self.texts = tuple(sorted({text for text in texts if text}, key=len, reverse=True))
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self.longest = max(map(len, self.texts), default=0)

    def held(self, text: str, at: int) -> int:
        """How many characters at the end, from `at` on, may be the beginning of one of the texts."""
        for length in range(min(self.longest - 1, len(text) - at), 0, -1):
            if any(each.startswith(text[-length:]) for each in self.texts):
                return length
        return 0


class CallParser:
    """A Parser (outputs.py) for one sample.

    family: how calls are written; None where no tools were offered. schemas: the tools that were offered; a call of
    another one stays text, as does a malformed one. reasoning: its markers, None if the model has none. opened: whether
    the prompt has opened the reasoning already.
    """

    def __init__(
        self, family: Family | None, schemas: Schemas, reasoning: Reasoning | None = None, opened: bool = False
    ) -> None:
        self._family, self._schemas = family, schemas
        self._begins, self._noise = (family.begins, family.noise) if family else ((), ())
        self._whole = family is not None and family.whole
        self._quotes = _XML_QUOTES.get(family.style) if family else None
        think = (reasoning.open,) if reasoning else ()
        again = think if reasoning and reasoning.again else ()
        self._start_marks = _Marks(*think, *self._noise, *self._begins)
        self._text_marks = _Marks(*again, *self._noise, *(() if self._whole else self._begins))
        self._think_marks = _Marks(reasoning.close if reasoning else "")
        json = '"{}' if family and family.style == "named" else '"{}[]'  # a header may have brackets
        self._call_marks = _Marks(family.end if family else "", *(self._quotes[:1] if self._quotes else json))
        self._value_marks = _Marks(*(self._quotes[1:] if self._quotes else ()))
        self._buffer, self._at = "", 0
        self._state: Callable[[CallParser], bool] = CallParser._start
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: list[ToolCall] = []
        self._kept = self._loose = ""  # whitespace after text, and after a marker, not given out yet
        self._spoke = self._marked = False  # whether text was given out; whether a marker came since
        self._newlines = ""  # of the reasoning, not given out yet
        self._opening = False  # at the beginning of the reasoning, or of the text after it: newlines are dropped
        self._begin, self._body, self._size = "", [""], 0  # of the call that is being read
        self._depth, self._quoted = 0, False
        if opened:
            self._open(reasoning.open if reasoning else "")

    def feed(self, text: str) -> Said:
        """What this text completes."""
        self._buffer += text
        while self._state(self):
            pass
        self._buffer, self._at = self._buffer[self._at :], 0
        return self._take()

    def finish(self) -> Said:
        """What was held back; a call whose end marker is missing counts if it is complete otherwise."""
        rest, self._buffer = self._buffer, ""
        if self._state is CallParser._reason:
            self._think(rest)
        elif self._state is CallParser._call:
            self._body.append(rest)
            self._close_call("")
        else:
            self._say((self._begin if self._state is CallParser._head else "") + rest)
        if not self._marked:
            self._text.append(self._kept)
        self._kept = self._loose = ""
        return self._take()

    def _take(self) -> Said:
        said = Said("".join(self._text), "".join(self._thought), tuple(self._calls))
        self._text, self._thought, self._calls = [], [], []
        return said

    # What is given out.

    def _say(self, text: str) -> None:
        if self._opening:
            text = text.lstrip("\n")
            self._opening = not text
        core = text.rstrip()
        if core:
            self._text += [self._kept, self._loose, core]
            self._kept, self._loose = text[len(core) :], ""
            self._spoke, self._marked = True, False
        elif self._marked:
            self._loose += text
        else:
            self._kept += text
        if len(self._kept) + len(self._loose) > MAX_SPACE:
            self._text += [self._kept, self._loose]
            self._kept = self._loose = ""

    def _mark(self) -> None:
        """A marker stands here: whitespace between it and another marker, or an end, is no text."""
        self._loose = ""
        if not self._spoke:
            self._kept = ""
        self._marked, self._opening = True, False

    def _think(self, text: str) -> None:
        if self._opening:
            text = text.lstrip("\n")
            self._opening = not text
        core = text.rstrip("\n")
        if core:
            self._thought += [self._newlines, core]
            self._newlines = ""
        self._newlines += text[len(core) :]
        if len(self._newlines) > MAX_SPACE:
            self._thought.append(self._newlines)
            self._newlines = ""

    # The states. Each reads on from self._at, and says whether the next one can go on with what is there.

    def _start(self) -> bool:
        """Where an answer begins, or a call of a family whose calls are the whole answer has ended."""
        near = self._buffer[self._at : self._at + MAX_SPACE + 1]
        near = near[: len(near) - len(near.lstrip(" \t\r\n;" if self._whole and self._marked else " \t\r\n"))]
        at, size = self._at + len(near), len(self._buffer)
        found = self._start_marks.pattern.match(self._buffer, at)
        if len(near) > MAX_SPACE or (found is None and self._start_marks.held(self._buffer, at) < size - at):
            self._state = CallParser._free
            return True
        if found is None:
            return False
        if self._marked:
            self._loose += near
        else:
            self._say(near)
        self._at = found.end()
        self._open(found[0])
        return True

    def _free(self) -> bool:
        """Text, with markers in it."""
        found = self._upto(self._text_marks, self._say)
        if found:
            self._open(found)
        return bool(found)

    def _reason(self) -> bool:
        if not self._upto(self._think_marks, self._think):
            return False
        self._newlines = ""
        self._mark()
        self._marked, self._opening = False, True
        self._state = CallParser._start if self._whole else CallParser._free
        return True

    def _upto(self, marks: _Marks, give: Callable[[str], None]) -> str:
        """Give what stands before the next marker, and go behind it; "" if none is there yet."""
        found = marks.pattern.search(self._buffer, self._at)
        end = found.start() if found else len(self._buffer) - marks.held(self._buffer, self._at)
        give(self._buffer[self._at : end])
        self._at = found.end() if found else end
        return found[0] if found else ""

    def _open(self, marker: str) -> None:
        """What a marker begins."""
        if marker in self._begins:
            if self._whole:  # the marker is the call's own first character
                self._at -= len(marker)
                marker = ""
            self._begin, self._body, self._size = marker, [], 0
            self._depth, self._quoted = 0, False
            self._state = CallParser._head
            return
        self._mark()
        if marker not in self._noise:
            self._state, self._opening = CallParser._reason, True
            self._start_marks = _Marks(*self._noise, *self._begins)
        elif self._whole:
            self._state = CallParser._start

    def _head(self) -> bool:
        """Whether the body begins as bodies do."""
        heads = self._family.heads if self._family else ()
        rest = self._buffer[self._at : self._at + MAX_SPACE].lstrip()
        if not heads or rest.startswith(heads):
            self._state = CallParser._call
            return True
        if len(self._buffer) - self._at < MAX_SPACE and any(head.startswith(rest) for head in heads):
            return False
        self._release()
        return True

    def _call(self) -> bool:
        """Up to the end of a call: its marker, unless that stands in a string, or the end of its JSON."""
        end = self._family.end if self._family else ""
        while self._state is CallParser._call:
            marks = self._value_marks if self._quoted else self._call_marks
            pattern = _IN_STRING if self._quoted and not self._quotes else marks.pattern
            found = pattern.search(self._buffer, self._at)
            if found is None:
                return self._consume(len(self._buffer) - marks.held(self._buffer, self._at))
            if found[0] == "\\" and found.end() == len(self._buffer):
                return self._consume(found.start())
            if found[0] == end:
                if not self._consume(found.start()):
                    self._at = found.end()
                    self._close_call(end)
            elif not self._consume(found.end() + (found[0] == "\\")):
                self._inside(found[0], end)
        return True

    def _inside(self, mark: str, end: str) -> None:
        """Count what opens and closes. What cannot be JSON any more is text."""
        if self._quoted:
            self._quoted = mark == "\\"
            if mark < " ":
                self._release()
            return
        self._quoted = mark in ('"', *(self._quotes or ())[:1])
        self._depth += (mark in ("{", "[")) - (mark in ("}", "]"))
        if not 0 <= self._depth <= MAX_NESTING:
            self._release()
        elif mark in ("}", "]") and self._depth == 0 and not end:
            self._close_call("")

    def _consume(self, end: int) -> bool:
        """Take this into the call; whether it became too long for one, and so was text."""
        self._body.append(self._buffer[self._at : end])
        self._size += end - self._at
        self._at = end
        if self._size > MAX_CALL:
            self._release()
        return self._size > MAX_CALL

    def _close_call(self, end: str) -> None:
        calls = read_calls(self._family, "".join(self._body), self._schemas) if self._family else None
        if calls is None:
            self._body.append(end)
            self._release()
            return
        self._calls += calls
        self._mark()
        self._state = CallParser._start if self._whole else CallParser._free

    def _release(self) -> None:
        """What looked like a call is text."""
        self._state = CallParser._free
        self._say("".join([self._begin, *self._body]))
        self._body = []
