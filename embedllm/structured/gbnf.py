"""Rules as xgrammar's EBNF text.

Owns spelling, escapes and how counts are written: xgrammar looks masks up only within a rule, so that a counted repeat
becomes a chain of rules, each with one more to come. Knows no library: it writes text. Invariant: what it writes
matches the same texts.
"""

from __future__ import annotations

from embedllm.structured.expressions import Alt, Chars, Literal, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import parts_of


def gbnf(rules: Rules) -> str:
    """The text of rules in normal form, one rule per line."""
    return _Text(rules).text


def num_counted(rules: Rules) -> int:
    """How many rules their counted repeats become; what compiles take grows with it."""
    found: set[Repeat] = set()
    waiting = list(rules.values())
    while waiting:
        node = waiting.pop()
        waiting += parts_of(node)
        if isinstance(node, Repeat) and _is_counted(node):
            found.add(node)
    return sum(node.most or node.least for node in found)


def _is_counted(node: Repeat) -> bool:
    return (node.least, node.most) not in ((0, 1), (0, None), (1, None))


class _Text:
    def __init__(self, rules: Rules) -> None:
        self._lines: list[str] = []
        self._names: dict[Node, str] = {}  # rules made for items of repeats
        self._counts: dict[tuple[str, int, int], str] = {}  # and for what is left of them
        for name, node in rules.items():
            self._lines.append(f"{name} ::= {self._node(node)}\n")
        self.text = "".join(self._lines)

    def _node(self, node: Node) -> str:
        if isinstance(node, Literal):
            return f'"{"".join(map(_escaped, node.text))}"'
        if isinstance(node, Chars):
            inside = (_point(low) if low == high else f"{_point(low)}-{_point(high)}" for low, high in node.ranges)
            return f"[{''.join(inside)}]"
        if isinstance(node, Seq):
            return f"({' '.join(map(self._node, node.items))})"
        if isinstance(node, Alt):
            return f"({' | '.join(map(self._node, node.options))})"
        if isinstance(node, Repeat):
            if not _is_counted(node):
                return f"({self._node(node.item)})" + ("?" if node.most else "+" if node.least else "*")
            item = self._item(node.item)
            if node.most is not None:
                return self._counted(item, node.least, node.most)
            return f"({self._counted(item, node.least, node.least)} {item}*)"
        if isinstance(node, Ref):
            return node.name
        raise TypeError(f"not in normal form: {type(node).__name__}")

    def _item(self, node: Node) -> str:
        if node not in self._names:
            spelled = self._node(node)
            self._names[node] = name = f"i{len(self._names)}"
            self._lines.append(f"{name} ::= {spelled}\n")
        return self._names[node]

    def _counted(self, item: str, least: int, most: int) -> str:
        following = '""'
        for most_left in range(1, most + 1):
            least_left = max(0, least - most + most_left)
            key = (item, least_left, most_left)
            if key not in self._counts:
                self._counts[key] = name = f"n{len(self._counts)}"
                none = "" if least_left else '"" | '
                self._lines.append(f"{name} ::= {none}{item} {following}\n")
            following = self._counts[key]
        return following


def _escaped(character: str) -> str:
    plain = character.isascii() and character.isprintable() and character not in '"\\'
    return character if plain else _point(ord(character))


def _point(code: int) -> str:
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
