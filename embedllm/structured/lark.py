"""Rules as Lark text for llguidance.

Owns the one question that matters there: llguidance splits a text into lexemes, each as long as it can be, which is
not what rules say. So rules without recursion become one lexeme, and in recursive ones a lexeme is one character.
Knows no library: it writes text. Invariant: what it writes matches the same texts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from graphlib import CycleError, TopologicalSorter

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import Alt, Chars, Dispatch, Literal, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import ANY, NOTHING, parts_of, refs_in
from embedllm.structured.normal import normal_form


def lark(rules: Rules) -> str:
    """The text of well-formed rules. Raises InvalidRequest if they are nested too deeply."""
    try:
        written = _Lexeme(rules) if _order(rules) else _Characters(normal_form(rules))
    except RecursionError:
        raise InvalidRequest("the shape is nested too deeply to be compiled; name parts of it ($ref, rules)") from None
    # Without forcing: else where a text must come only its first token may, in the spelling that the tokenizer gives.
    return f'%llguidance {{"no_forcing": true}}\nstart: {written.root}\n{"".join(written.lines)}'


def depth(rules: Rules) -> int:
    """Levels of nodes in nodes, through the rules that they name; in recursive rules on one long way down."""
    order = _order(rules)
    found: dict[str, int] = {}
    if not order:
        rules = normal_form(rules)
        order = _way_down(rules)
    for name in order:
        found[name] = _levels(rules[name], found)
    return max(found.values())


def _order(rules: Rules) -> list[str]:
    """The rules, each after those that it uses; [] if one uses itself, in however many steps."""
    try:
        return list(TopologicalSorter({name: refs_in(node) for name, node in rules.items()}).static_order())
    except CycleError:
        return []


def _way_down(rules: Rules) -> list[str]:
    """The rules in the order in which a walk from the root, one branch after the other, leaves them."""
    left: list[str] = []
    seen = {"root"}
    path = [("root", iter(sorted(refs_in(rules["root"]))))]
    while path:
        name, following = path[-1]
        new = next((used for used in following if used not in seen), None)
        if new is None:
            left.append(name)
            path.pop()
        else:
            seen.add(new)
            path.append((new, iter(sorted(refs_in(rules[new])))))
    return left


def _levels(node: Node, found: dict[str, int]) -> int:
    if isinstance(node, Ref):
        return found.get(node.name, 0) + 1
    return 1 + max([_levels(part, found) for part in parts_of(node)], default=0)


class _Text(ABC):
    """Rules as definitions whose names begin with `letter`: Lark tells lexemes (T0) from rules (r0) by their case.

    Every node that holds others is a definition of its own, as llguidance takes few brackets inside brackets.
    """

    letter = ""

    def __init__(self, rules: Rules) -> None:
        self.lines: list[str] = []
        self._names: dict[Node, str] = {}
        for name in rules:
            self._names[Ref(name)] = f"{self.letter}{len(self._names)}"
        for name, node in rules.items():
            self.lines.append(f"{self._names[Ref(name)]}: {self.written(node)}\n")
        self.root = self._names[Ref("root")]

    def node(self, node: Node) -> str:
        """What stands for a node inside another."""
        if isinstance(node, (Literal, Chars)):
            return self.written(node)
        if node not in self._names:
            definition = self.written(node)
            self._names[node] = f"{self.letter}{len(self._names)}"
            self.lines.append(f"{self._names[node]}: {definition}\n")
        return self._names[node]

    def written(self, node: Node) -> str:
        if isinstance(node, Chars):
            return f"/{characters(node)}/"
        if isinstance(node, Literal):
            return self.literal(node.text)
        if isinstance(node, Seq):
            return " ".join([self.node(item) for item in node.items]) or '""'
        if isinstance(node, Alt):
            return " | ".join([self.node(option) for option in node.options])
        if isinstance(node, Repeat):
            item = self.node(node.item)
            if node.most == 0:
                return '""'
            if node.most is None:
                return f"{item}{{{node.least}}} {item}*" if node.least else f"{item}*"
            return f"{item}{{{node.least},{node.most}}}"
        return self.node(node)

    @abstractmethod
    def literal(self, text: str) -> str:
        """A literal's text."""


class _Characters(_Text):
    letter = "r"

    def literal(self, text: str) -> str:
        return f"({' '.join([f'/{_point(ord(c))}/' for c in text])})" if text else '""'


class _Lexeme(_Text):
    letter = "T"

    def literal(self, text: str) -> str:
        return f"/{''.join([_point(ord(c)) for c in text])}/" if text else '""'

    def written(self, node: Node) -> str:
        return self.dispatch(node) if isinstance(node, Dispatch) else super().written(node)

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
        if not parts:
            return free
        one = f"({' | '.join(parts)})"
        if node.again:
            return f"({one}{'*' if node.may_end else '+'} {free})"
        return f"({free} | {one})" if node.may_end else one


def characters(node: Chars) -> str:
    """A regular expression's class."""
    return f"[{''.join([_point(a) if a == b else f'{_point(a)}-{_point(b)}' for a, b in node.ranges])}]"


def _point(code: int) -> str:
    return f"\\u{{{code:x}}}"
