"""Rules in the form that backends read: plain names, and no Dispatch.

Owns the expansion of Dispatch (Aho and Corasick, "Efficient string matching", 1975). Knows no backend. Invariant: the
same texts match, and no rule begins with itself.
"""

from __future__ import annotations

from collections import deque

from embedllm.errors import InvalidRequest
from embedllm.structured.expressions import EMPTY, Alt, Dispatch, Node, Ref, Repeat, Rules, Seq
from embedllm.structured.nodes import NOTHING, alt, chars, seq, without

MAX_TRIGGERS = 4_096  # characters in all triggers of one Dispatch


def normal_form(rules: Rules) -> dict[str, Node]:
    """Well-formed rules that "root" uses, named "root", "r1", "r2", ..., with a rule per state of each Dispatch.

    Raises InvalidRequest if triggers or nesting are beyond what is read.
    """
    try:
        return _Expansion(rules).made
    except RecursionError:
        raise InvalidRequest("the shape is nested too deeply to be compiled; name parts of it ($ref, rules)") from None


class _Expansion:
    """Walks the rules from the root; `made` has them with new names, and a rule per state of each Dispatch."""

    def __init__(self, rules: Rules) -> None:
        self.made: dict[str, Node] = {}
        self._names, self._waiting = {"root": "root"}, ["root"]
        self._num_free = 0
        while self._waiting:
            name = self._waiting.pop()
            self.made[self._names[name]] = self._node(rules[name])

    def _node(self, node: Node) -> Node:
        if isinstance(node, Seq):
            return seq(*map(self._node, node.items))
        if isinstance(node, Alt):
            return alt(*map(self._node, node.options))
        if isinstance(node, Repeat):
            return Repeat(self._node(node.item), node.least, node.most)
        if isinstance(node, Dispatch):
            return self._dispatch(node)
        if isinstance(node, Ref):
            if node.name not in self._names:
                self._names[node.name] = f"r{len(self._names)}"
                self._waiting.append(node.name)
            return Ref(self._names[node.name])
        return node

    def _dispatch(self, node: Dispatch) -> Ref:
        if sum(len(trigger) for trigger, _ in node.options) > MAX_TRIGGERS:
            raise InvalidRequest(f"triggers have over {MAX_TRIGGERS:,} characters together; use fewer or shorter ones")
        steps = _automaton([trigger for trigger, _ in node.options])
        follow = [self._node(then) for _, then in node.options]
        self._num_free += 1
        before, after = f"b{self._num_free}_", f"a{self._num_free}_"
        if node.again:
            follow = [NOTHING if then == NOTHING else seq(then, Ref(f"{after}0")) for then in follow]
            self._add_free(after, steps, follow, may_end=True)
        self._add_free(before, steps, follow, node.may_end)
        return Ref(f"{before}0")

    def _add_free(
        self, name: str, steps: list[dict[tuple[str, int], list[int]]], follow: list[Node], may_end: bool
    ) -> None:
        for state, goes in enumerate(steps):
            options: list[Node] = [EMPTY] if may_end else []
            for (kind, target), points in goes.items():
                then = Ref(f"{name}{target}") if kind == "free" else follow[target]
                if then != NOTHING:
                    options.append(seq(chars((point, point) for point in points), then))
            known = [(point, point) for points in goes.values() for point in points]
            self.made[f"{name}{state}"] = alt(*options, seq(without(known), Ref(f"{name}0")))


def _automaton(triggers: list[str]) -> list[dict[tuple[str, int], list[int]]]:
    """Per state what each character of a trigger does: ("free", next state) or ("trigger", its index): code points."""
    trie: list[dict[str, int]] = [{}]
    ends: dict[int, int] = {}
    for index, trigger in enumerate(triggers):
        at = 0
        for character in trigger:
            if character not in trie[at]:
                trie[at][character] = len(trie)
                trie.append({})
            at = trie[at][character]
        ends[at] = index
    goes: list[dict[str, int]] = [{} for _ in trie]  # where not to the start
    fails = [0] * len(trie)
    waiting = deque([0])
    while waiting:
        state = waiting.popleft()
        goes[state] = {**goes[fails[state]], **trie[state]} if state else dict(trie[0])
        for character, child in trie[state].items():
            fails[child] = goes[fails[state]].get(character, 0) if state else 0
            waiting.append(child)
    inner = [state for state in range(len(trie)) if state not in ends]
    number = {state: n for n, state in enumerate(inner)}
    found: list[dict[tuple[str, int], list[int]]] = []
    for state in inner:
        targets: dict[tuple[str, int], list[int]] = {}
        found.append(targets)
        for character, target in goes[state].items():
            key = ("trigger", ends[target]) if target in ends else ("free", number[target])
            targets.setdefault(key, []).append(ord(character))
    return found
