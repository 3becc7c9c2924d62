"""Rules as Lark text for llguidance.

Owns the one question that matters there: llguidance splits a text into lexemes, each as long as it can be, which is
not what rules say. So rules without recursion become one lexeme, and in recursive ones a lexeme is one character.
Knows no library: it writes text. Invariant: what it writes matches the same texts.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import Alt, Chars, Dispatch, Literal, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import ANY, NOTHING, parts_of
from embedllm.structured.normal import normal_form


def lark(rules: Rules) -> str:
    """The text of well-formed rules. Raises InvalidRequest if they are nested too deeply."""
    try:
        if is_recursive(rules):
            written = _Characters(normal_form(rules))
            return f"start: {written.name('root')}\n{written.text}"
        lexeme = _Lexeme(rules)
        return f"start: {lexeme.name('root')}\n{lexeme.text}"
    except RecursionError:
        raise InvalidRequest("the shape is nested too deeply to be compiled; name parts of it ($ref, rules)") from None


def is_recursive(rules: Rules) -> bool:
    """Whether a rule uses itself, in however many steps."""
    try:
        TopologicalSorter({name: _uses(node) for name, node in rules.items()}).prepare()
    except CycleError:
        return True
    return False


def _uses(node: Node) -> set[str]:
    return {node.name} if isinstance(node, Ref) else set().union(*map(_uses, parts_of(node)))


class _Text:
    """Rules as definitions whose names begin with `letter`: Lark tells lexemes (T0) from rules (r0) by their case."""

    letter = ""

    def __init__(self, rules: Rules) -> None:
        self._names: dict[str, str] = {}
        for name in rules:
            self.name(name)
        self.text = "".join([f"{self.name(name)}: {self.node(node)}\n" for name, node in rules.items()])

    def name(self, rule: str) -> str:
        return self._names.setdefault(rule, f"{self.letter}{len(self._names)}")

    def node(self, node: Node) -> str:
        if isinstance(node, Chars):
            return f"/{characters(node)}/"
        if isinstance(node, Seq):
            return f"({' '.join([self.node(item) for item in node.items])})" if node.items else '""'
        if isinstance(node, Alt):
            return f"({' | '.join([self.node(option) for option in node.options])})"
        if isinstance(node, Repeat):
            item = self.node(node.item)
            if node.most is None:
                return f"({item}{{{node.least}}} {item}*)" if node.least else f"{item}*"
            return f"{item}{{{node.least},{node.most}}}"
        if isinstance(node, Ref):
            return self.name(node.name)
        if isinstance(node, Literal):
            return self.literal(node.text)
        return self.dispatch(node)

    def literal(self, text: str) -> str:
        raise NotImplementedError

    def dispatch(self, node: Dispatch) -> str:
        raise NotImplementedError


class _Characters(_Text):
    letter = "r"

    def literal(self, text: str) -> str:
        return f"({' '.join([f'/{_point(ord(c))}/' for c in text])})" if text else '""'


class _Lexeme(_Text):
    letter = "T"

    def literal(self, text: str) -> str:
        return f"/{''.join([_point(ord(c)) for c in text])}/" if text else '""'

    def dispatch(self, node: Dispatch) -> str:
        """With the complements that lexemes have: free text is all text but that with a trigger in it."""
        any_one = characters(ANY)
        spelled = ["".join([_point(ord(c)) for c in trigger]) for trigger, _ in node.options]
        trigger = f"({'|'.join(spelled)})"
        free = f"(/{any_one}*/ & ~/{any_one}*{trigger}{any_one}*/)"
        parts = [
            f"((/{any_one}*{text}/ & ~/{any_one}*{trigger}{any_one}+/) {self.node(then)})"
            for text, (_, then) in zip(spelled, node.options, strict=True)
            if then != NOTHING
        ]
        one = f"({' | '.join(parts)})" if parts else ""
        if not one:
            return free
        if node.again:
            return f"({one}{'*' if node.may_end else '+'} {free})"
        return f"({free} | {one})" if node.may_end else one


def characters(node: Chars) -> str:
    """A regular expression's class."""
    return f"[{''.join([_point(a) if a == b else f'{_point(a)}-{_point(b)}' for a, b in node.ranges])}]"


def _point(code: int) -> str:
    return f"\\u{{{code:x}}}"
