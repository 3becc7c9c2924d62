"""The language of shapes, read in the plainest way: texts drawn from rules, and whether a text matches them."""

import math
import random

from embedllm.structured.expressions import Alt, Chars, Dispatch, Literal, Node, Ref, Repeat, Rules, Seq

MAX_REPEATS = 5  # drawn at most, above the least


def matches(rules: Rules, text: str) -> bool:
    """Whether the whole text matches: every end that a node can reach from every start, kept once found."""
    return len(text) in _Ends(rules, text).of(rules["root"], 0)


class _Ends:
    def __init__(self, rules: Rules, text: str) -> None:
        self.rules, self.text = rules, text
        self.found: dict[tuple[int, int], frozenset[int]] = {}

    def of(self, node: Node, start: int) -> frozenset[int]:
        key = (id(node), start)
        if key not in self.found:
            self.found[key] = frozenset(self.search(node, start))
        return self.found[key]

    def search(self, node: Node, start: int) -> set[int]:
        match node:
            case Literal(text):
                return {start + len(text)} if self.text.startswith(text, start) else set()
            case Chars(ranges):
                code = ord(self.text[start]) if start < len(self.text) else -1
                return {start + 1} if any(low <= code <= high for low, high in ranges) else set()
            case Ref(name):
                return set(self.of(self.rules[name], start))
            case Seq(items):
                ends = {start}
                for item in items:
                    ends = {end for begin in ends for end in self.of(item, begin)}
                return ends
            case Alt(options):
                return {end for option in options for end in self.of(option, start)}
            case Repeat(item, least, most):
                return self.repeats(item, start, least, math.inf if most is None else most)
            case Dispatch():
                return self.dispatch(node, start, node.may_end)
        raise AssertionError(node)

    def repeats(self, item: Node, start: int, least: int, most: float) -> set[int]:
        ends, reached, count = {start}, {start} if least == 0 else set(), 0
        while ends and count < most and count <= least + len(self.text):
            ends = {end for begin in ends for end in self.of(item, begin)}
            count += 1
            if count >= least:
                if ends <= reached:
                    break
                reached |= ends
        return reached

    def dispatch(self, node: Dispatch, start: int, may_end: bool) -> set[int]:
        reached = set()
        for end in range(start, len(self.text) + 1):
            for trigger, follows in node.options:
                if end - len(trigger) >= start and self.text[start:end].endswith(trigger):
                    after = self.of(follows, end)
                    return reached | (
                        set().union(*(self.dispatch(node, e, True) for e in after)) if node.again else after
                    )
            if may_end:
                reached.add(end)
        return reached


def sample(rules: Rules, rng: random.Random, max_depth: int = 12) -> str:
    """A text that matches; below `max_depth` rules inside rules it takes the shortest way out."""
    heights = _heights(rules)
    return _draw(rules["root"], rules, heights, rng, max_depth)


def _draw(node: Node, rules: Rules, heights: dict[str, float], rng: random.Random, depth: int) -> str:
    match node:
        case Literal(text):
            return text
        case Chars(ranges):
            low, high = rng.choice(ranges)
            return chr(rng.choice([low, high, rng.randint(low, high), rng.randint(low, min(high, low + 30))]))
        case Ref(name):
            return _draw(rules[name], rules, heights, rng, depth - 1)
        case Seq(items):
            return "".join(_draw(item, rules, heights, rng, depth) for item in items)
        case Alt(options):
            if depth < 0:
                options = tuple(sorted(options, key=lambda option: _height(option, heights))[:1])
            return _draw(rng.choice(options), rules, heights, rng, depth)
        case Repeat(item, least, most):
            limit = least if depth < 0 else least + MAX_REPEATS
            # Now and then as long as it gets, where that is cheap.
            if most is not None and depth >= 0 and isinstance(item, (Chars, Ref)) and rng.random() < 0.05:
                limit = most
            count = rng.randint(least, limit if most is None else min(limit, most))
            count = limit if limit == most else count
            return "".join(
                _draw(item, rules, heights, rng, depth - (not isinstance(item, Chars))) for _ in range(count)
            )
        case Dispatch(options, may_end, again):
            text = "".join(rng.choice("ab <\n>x") for _ in range(rng.randint(0, 4)))
            text = "" if any(trigger in text + trigger[:-1] for trigger, _ in options) else text
            if may_end and (depth < 0 or rng.random() < 0.3):
                return text
            trigger, follows = rng.choice(options)
            drawn = text + trigger + _draw(follows, rules, heights, rng, depth - 1)
            more = Dispatch(options, True, True)
            return drawn + (_draw(more, rules, heights, rng, depth - 1) if again else "")
    raise AssertionError(node)


def _heights(rules: Rules) -> dict[str, float]:
    """Fewest rules inside rules on the way to a text, per rule."""
    heights = dict.fromkeys(rules, math.inf)
    changed = True
    while changed:
        changed = False
        for name, node in rules.items():
            height = 1 + _height(node, heights)
            if height < heights[name]:
                heights[name], changed = height, True
    return heights


def _height(node: Node, heights: dict[str, float]) -> float:
    match node:
        case Ref(name):
            return heights[name]
        case Seq(items):
            return max((_height(item, heights) for item in items), default=0)
        case Alt(options):
            return min((_height(option, heights) for option in options), default=math.inf)
        case Repeat(item, least, _):
            return _height(item, heights) if least else 0
        case Dispatch(options, may_end, _):
            return 0 if may_end else min(_height(follows, heights) for _, follows in options)
    return 0
