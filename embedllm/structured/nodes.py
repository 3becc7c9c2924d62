"""Builds nodes and checks finished rules.

Owns the constructors that keep rules small, and `well_formed`. Knows no schema. Invariant: rules that leave here are
within the limit, reachable from "root", never begin with themselves, and every choice in them can come to an end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from embedllm.structured.caps import MAX_NODES, refuse
from embedllm.structured.expressions import EMPTY, Alt, Chars, Dispatch, Literal, Node, Ref, Repeat, Rules, Seq

NOTHING = Alt(())
MAX_CODE_POINT = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)


def chars(ranges: Iterable[tuple[int, int]]) -> Chars:
    """These code points in the order a Chars keeps, without NUL and surrogates."""
    merged: list[tuple[int, int]] = []
    cuts = [(low, high) for low, high in _without_surrogates(ranges) if low <= high]
    for low, high in sorted(cuts):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return Chars(tuple(merged))


def _without_surrogates(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for low, high in ranges:
        yield max(low, 1), min(high, SURROGATES[0] - 1)
        yield max(low, SURROGATES[1] + 1), min(high, MAX_CODE_POINT)


def without(ranges: Iterable[tuple[int, int]]) -> Chars:
    """Every character but these."""
    gaps, start = [], 1
    for low, high in sorted(ranges):
        gaps.append((start, low - 1))
        start = max(start, high + 1)
    return chars([*gaps, (start, MAX_CODE_POINT)])


ANY = without([])


def seq(*items: Node) -> Node:
    flat: list[Node] = []
    for item in items:
        for part in item.items if isinstance(item, Seq) else (item,):
            if isinstance(part, Literal) and flat and isinstance(flat[-1], Literal):
                flat[-1] = Literal(flat[-1].text + part.text)
            elif part != EMPTY:
                flat.append(part)
    if NOTHING in flat:
        return NOTHING
    return flat[0] if len(flat) == 1 else Seq(tuple(flat)) if flat else EMPTY


def alt(*options: Node) -> Node:
    flat = [part for option in options for part in (option.options if isinstance(option, Alt) else (option,))]
    return flat[0] if len(flat) == 1 else Alt(tuple(flat))


def optional(node: Node) -> Node:
    return node if node == EMPTY else alt(node, EMPTY)


def repeat(item: Node, least: int, most: int | None) -> Node:
    if most == 0:
        return EMPTY
    return item if least == most == 1 else Repeat(item, least, most)


def rule(node: Node, rules: dict[str, Node]) -> Node:
    """A reference to a new rule with this node."""
    if isinstance(node, (Literal, Ref)):
        return node
    name = f"r{len(rules)}"
    rules[name] = node
    return Ref(name)


def lengths(node: Node) -> tuple[int, int | None]:
    """Fewest and most characters of a text it matches, None for no end; for nodes without Ref and Dispatch."""
    if isinstance(node, Literal):
        return len(node.text), len(node.text)
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Repeat):
        low, high = lengths(node.item)
        return low * node.least, 0 if high == 0 else None if high is None or node.most is None else high * node.most
    assert isinstance(node, (Seq, Alt))
    parts = [lengths(part) for part in (node.items if isinstance(node, Seq) else node.options)]
    lows, highs = [low for low, _ in parts], [high for _, high in parts if high is not None]
    open_end = len(highs) < len(parts)
    if isinstance(node, Seq):
        return sum(lows), None if open_end else sum(highs)
    return min(lows, default=0), None if open_end else max(highs, default=0)


def parts_of(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside it."""
    if isinstance(node, Seq):
        return node.items
    if isinstance(node, Alt):
        return node.options
    if isinstance(node, Repeat):
        return (node.item,)
    return tuple(follows for _, follows in node.options) if isinstance(node, Dispatch) else ()


def refs_in(node: Node) -> set[str]:
    """Names of the rules it refers to."""
    return {node.name} if isinstance(node, Ref) else set[str]().union(*map(refs_in, parts_of(node)))


def checked(rules: Rules, where: str) -> dict[str, Node]:
    """The rules that "root" needs. Raises InvalidRequest if they are too many or one begins with itself."""
    reached = _reached(rules, where)
    _check_left_recursion(reached, where)
    return reached


def well_formed(rules: Rules, where: str) -> Rules:
    """The same without what can never end. Raises InvalidRequest too if nothing matches them."""
    reached = checked(rules, where)
    ending = _ending(reached)
    if "root" not in ending:
        refuse(where, "no finite value can match it; look for parts that exclude or endlessly require each other")
    refs: dict[str, Node] = {}
    for start in reached:
        # A rule that is only another one's name is that one.
        path, node = [start], reached[start]
        while isinstance(node, Ref) and node.name not in refs:
            path.append(node.name)
            node = reached[node.name]
        last = refs[node.name] if isinstance(node, Ref) else Ref(path[-1]) if path[-1] in ending else NOTHING
        refs.update(dict.fromkeys(path, last))
    return _reached({name: _pruned(node, refs) for name, node in reached.items() if name in ending}, where)


def _reached(rules: Rules, where: str) -> dict[str, Node]:
    reached: dict[str, Node] = {}
    num_nodes, names = 0, ["root"]
    while names:
        name = names.pop()
        if name in reached:
            continue
        reached[name] = rules[name]
        stack = [rules[name]]
        while stack:
            node = stack.pop()
            num_nodes += 1
            if isinstance(node, Ref):
                names.append(node.name)
            stack += parts_of(node)
            if num_nodes > MAX_NODES:
                refuse(
                    where, f"its grammar has more than {MAX_NODES:,} parts, which is the limit; ask for less at once"
                )
    return reached


def _nullable(node: Node) -> bool:
    """Whether it may match "", taking rules as never doing so: those of a recursion all begin with a bracket."""
    if isinstance(node, Literal):
        return not node.text
    if isinstance(node, Seq):
        return all(map(_nullable, node.items))
    if isinstance(node, Alt):
        return any(map(_nullable, node.options))
    if isinstance(node, Repeat):
        return node.least == 0 or _nullable(node.item)
    return isinstance(node, Dispatch) and node.may_end


def _leading(node: Node) -> Iterator[str]:
    """Rules that may stand at its very beginning."""
    if isinstance(node, Ref):
        yield node.name
    elif isinstance(node, Seq):
        for item in node.items:
            yield from _leading(item)
            if not _nullable(item):
                return
    elif isinstance(node, (Alt, Repeat)):
        for part in parts_of(node):
            yield from _leading(part)


def _check_left_recursion(rules: Rules, where: str) -> None:
    clear: set[str] = set()
    for start in rules:
        path: dict[str, Iterator[str]] = {} if start in clear else {start: _leading(rules[start])}
        while path:
            name = next(reversed(path))
            following = next(path[name], None)
            if following is None:
                clear.add(name)
                del path[name]
            elif following in path:
                refuse(where, "a $ref leads back to itself with nothing in between; let it stand inside a property")
            elif following not in clear:
                path[following] = _leading(rules[following])


def _ending(rules: Rules) -> set[str]:
    """Names of rules that match some text: a node is settled once enough of its parts are, each looked at once."""
    missing: list[int] = []
    above: list[int | str] = []  # the node that a node is part of; the rule that it is
    users: dict[str, list[int]] = defaultdict(list)
    ready: list[int | str] = []

    def add(node: Node, parent: int | str) -> None:
        me = len(missing)
        above.append(parent)
        empty = node.least == 0 if isinstance(node, Repeat) else isinstance(node, Dispatch) and node.may_end
        fixed = empty or isinstance(node, (Literal, Chars)) or node == Seq(())
        missing.append(0 if fixed else len(node.items) if isinstance(node, Seq) else 1)
        if isinstance(node, Ref):
            users[node.name].append(me)
        for part in parts_of(node):
            add(part, me)
        if fixed:
            ready.append(me)

    for name, node in rules.items():
        add(node, name)
    ending: set[str] = set()
    while ready:
        settled = ready.pop()
        if isinstance(settled, str):
            ending.add(settled)
            waiting = users[settled]
        elif isinstance(parent := above[settled], str):
            ready.append(parent)
            continue
        else:
            waiting = [parent]
        for node_id in waiting:
            missing[node_id] -= 1
            if missing[node_id] == 0:
                ready.append(node_id)
    return ending


def _pruned(node: Node, refs: Mapping[str, Node]) -> Node:
    """The node with what stands for each Ref, and without options that match nothing; NOTHING if none is left."""
    if isinstance(node, Ref):
        return refs[node.name]
    if isinstance(node, Seq):
        return seq(*(_pruned(item, refs) for item in node.items))
    if isinstance(node, Alt):
        return alt(*(_pruned(option, refs) for option in node.options))
    if isinstance(node, Repeat):
        item = _pruned(node.item, refs)
        return Repeat(item, node.least, node.most) if item != NOTHING else NOTHING if node.least else EMPTY
    if isinstance(node, Dispatch):
        return Dispatch(tuple((text, _pruned(f, refs)) for text, f in node.options), node.may_end, node.again)
    return node
