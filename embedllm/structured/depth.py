"""Recursion with an end: rules that use themselves are written out, as many levels as there may be.

Owns that rewriting. Knows no JSON. A level begins where a rule of `heads`, on a cycle, is referred to. Invariant: what
the result matches the rules match too; what nests deeper is left out, by a reference to nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from embedllm.structured.expressions import Alt, Dispatch, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import NOTHING, refs_in


def bounded(rules: Rules, heads: frozenset[str], depth: int) -> dict[str, Node]:
    """The rules, in which `heads` nest at most `depth` deep."""
    uses = {name: refs_in(node) for name, node in rules.items()}
    users: dict[str, set[str]] = defaultdict(set)
    for name, used in uses.items():
        for other in used:
            users[other].add(name)
    recursive = _stuck(uses)  # leads to a cycle
    levels = heads & recursive & _stuck({name: users[name] for name in rules})  # is on one
    made: dict[str, Node] = {}
    pending = [("root", 0)]

    def placed(name: str, level: int) -> str:
        return f"{name}.{level}" if level else name

    while pending:
        name, level = pending.pop()
        if placed(name, level) in made:
            continue

        def step(used: str, level: int = level) -> Node:
            level = (level + (used in levels)) if used in recursive else 0
            if level > depth:
                return NOTHING
            pending.append((used, level))
            return Ref(placed(used, level))

        made[placed(name, level)] = _mapped(rules[name], step)
    return made


def _stuck(uses: Mapping[str, set[str]]) -> set[str]:
    """Names from which a cycle can be reached."""
    users: dict[str, list[str]] = defaultdict(list)
    missing = {name: len(used) for name, used in uses.items()}
    for name, used in uses.items():
        for other in used:
            users[other].append(name)
    free = [name for name, count in missing.items() if not count]
    for name in free:
        for user in users[name]:
            missing[user] -= 1
            if not missing[user]:
                free.append(user)
    return set(uses) - set(free)


def _mapped(node: Node, step: Callable[[str], Node]) -> Node:
    if isinstance(node, Ref):
        return step(node.name)
    if isinstance(node, Seq):
        return Seq(tuple(_mapped(item, step) for item in node.items))
    if isinstance(node, Alt):
        return Alt(tuple(_mapped(option, step) for option in node.options))
    if isinstance(node, Repeat):
        return Repeat(_mapped(node.item, step), node.least, node.most)
    if isinstance(node, Dispatch):
        options = tuple((trigger, _mapped(follows, step)) for trigger, follows in node.options)
        return Dispatch(options, node.may_end, node.again)
    return node
