"""JSON arrays and objects as texts, from the texts of what they hold.

Owns brackets, commas and what may be left out between them. Knows no schema. Invariant: what is written in more than
one place is a rule, so that nesting does not multiply it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from embedllm.structured import numbers, strings
from embedllm.structured.caps import ARRAY_ITEMS, EXTRA_PROPERTIES, MAX_DEPTH, NAME_LENGTH, STRING_LENGTH
from embedllm.structured.expressions import EMPTY, Literal, Node, Ref
from embedllm.structured.nodes import alt, optional, repeat, rule, seq

Item = tuple[Node, bool]  # what is written, and whether it must be
COMMA = Literal(", ")


def anything(depth: int, rules: dict[str, Node]) -> Ref:
    """Any JSON value, nested at most `depth` deep."""
    name = f"any{depth}"
    if name not in rules:
        text = seq(Literal('"'), strings.free(0, STRING_LENGTH), Literal('"'))
        options = [text, *map(Literal, ("true", "false", "null")), numbers.number({}, "number", "", rules)]
        if depth:
            options += [free_object(depth, rules), array([], anything(depth - 1, rules), 0, ARRAY_ITEMS, rules)]
        rules[name] = alt(*options)
    return Ref(name)


def free_object(depth: int, rules: dict[str, Node]) -> Node:
    """Any JSON object, nested at most `depth` deep."""
    properties = extras([], anything(depth - 1, rules), EXTRA_PROPERTIES, rules)
    return seq(Literal("{"), optional(properties), Literal("}"))


def extras(names: Iterable[str], value: Node, most: int, rules: dict[str, Node]) -> Node:
    """One to `most` properties with other names than these."""
    key = strings.other_than(names, NAME_LENGTH, MAX_DEPTH, rules)
    one = rule(seq(Literal('"'), key, Literal('": '), value), rules)
    return seq(one, repeat(seq(COMMA, one), 0, most - 1))


def array(first: Sequence[Node], rest: Node, least: int, most: int, rules: dict[str, Node]) -> Node:
    """An array of `least` to `most` items: those of `first`, then as many of `rest` as it takes."""
    if most == 0:
        return Literal("[]")
    rest = rule(rest, rules) if most > len(first) else EMPTY
    if not first:
        body = seq(rest, repeat(seq(COMMA, rest), max(0, least - 1), most - 1))
        return seq(Literal("["), body if least else optional(body), Literal("]"))
    tail = repeat(seq(COMMA, rest), max(0, least - len(first)), most - len(first))
    for item in first[max(1, least) :][::-1]:
        tail = rule(optional(seq(COMMA, item, tail)), rules)
    body = seq(first[0], *(seq(COMMA, item) for item in first[1:least]), tail)
    return seq(Literal("["), body if least else optional(body), Literal("]"))


def members(items: Sequence[Item], separator: str, rules: dict[str, Node], least: int = 0) -> Node:
    """The items in their order with the separator between them; those that need not be may be left out.

    least: 1 where something must be written though no item must be.
    """
    first = next((i for i, (_, must) in enumerate(items) if must), len(items))
    lead = [node if first == 1 else rule(node, rules) for node, _ in items[:first]]
    between = Literal(separator)

    def some(start: int, end: int) -> Node:
        # One or more of lead[start:end], in halves: an item is written log(n) times, and nothing is nested deep.
        if end - start == 1:
            return lead[start]
        middle = (start + end) // 2
        after = (optional(seq(between, node)) for node in lead[middle:end])
        return alt(seq(some(start, middle), *after), some(middle, end))

    if first == len(items):
        return EMPTY if not items else some(0, first) if least else optional(some(0, first))
    head = optional(seq(some(0, first), between)) if first else EMPTY
    tail = [seq(between, node) if must else optional(seq(between, node)) for node, must in items[first + 1 :]]
    return seq(head, items[first][0], *tail)
