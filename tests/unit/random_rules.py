"""Random rules over a small alphabet that is hard on byte automata: quotes, backslashes, shared lead bytes, astral."""

import random

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import Alt, Dispatch, Literal, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import chars, well_formed

ALPHABET = 'ab"\\\n(éèߐ日😀😁'  # é and è share a first byte, so do the two faces; U+07D0 has two bytes, 日 three
TRIGGERS = (("aab",), ("ab", "éb"), ("(a", "((", "b("), ("😀a", "é😀"), ('"a"',))


def random_rules(seed: int) -> Rules:
    """Well-formed rules, of which some are recursive; the same for the same seed."""
    draw = random.Random(seed)
    while True:
        names = ["root", *(f"rule {i}" for i in range(draw.randrange(3)))]
        rules = {name: _node(draw, 3, names[i + 1 :], names) for i, name in enumerate(names)}
        try:
            return well_formed(rules, "$")
        except InvalidRequest:
            continue  # nothing matches


def _node(draw: random.Random, depth: int, later: list[str], names: list[str]) -> Node:
    kind = draw.choice(("literal", "chars") if depth == 0 else KINDS)
    if kind == "chars":
        points = sorted(ord(c) for c in draw.sample(ALPHABET, 2))
        return chars([(points[0], points[1])] if draw.random() < 0.3 else [(p, p) for p in points])
    if kind == "seq":
        return Seq(tuple(_node(draw, depth - 1, later, names) for _ in range(draw.randrange(4))))
    if kind == "alt":
        return Alt(tuple(_node(draw, depth - 1, later, names) for _ in range(draw.randrange(1, 4))))
    if kind == "repeat":
        least = draw.randrange(3)
        return Repeat(_node(draw, depth - 1, later, names), least, draw.choice((None, least, least + 1, least + 3)))
    if kind == "ref" and later:
        return Ref(draw.choice(later))
    if kind == "recursion":  # behind a character, and not always
        again = Seq((Literal("("), Ref(draw.choice(names)), Literal(draw.choice((")", "")))))
        return Alt((again, _node(draw, depth - 1, later, names)))
    if kind == "dispatch":
        options = tuple((text, _node(draw, depth - 1, later, names)) for text in draw.choice(TRIGGERS))
        return Dispatch(options, draw.random() < 0.5, draw.random() < 0.5)
    return Literal("".join(draw.choices(ALPHABET, k=draw.choice((0, 1, 1, 2, 3)))))


KINDS = ("literal", "chars", "seq", "seq", "alt", "alt", "repeat", "repeat", "ref", "recursion", "dispatch")
