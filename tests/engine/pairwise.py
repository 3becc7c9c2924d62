"""Cases that cover every pair of settings at least once, far fewer than all combinations.

Greedy: cases are added, each the best of some random candidates, until no allowed pair is missing. Deterministic.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
_CANDIDATES = 60


def pairwise(factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], seed: int = 0) -> list[Case]:
    """Cases over `factors` such that each two values that occur together in any allowed case do so in one of these."""
    rng = random.Random(seed)
    missing = set()
    for (a, left), (b, right) in itertools.combinations(factors.items(), 2):
        for pair in itertools.product(left, right):
            if _complete(dict(zip((a, b), pair, strict=True)), factors, allowed, rng):
                missing.add(((a, pair[0]), (b, pair[1])))
    cases = []
    while missing:
        best: Case | None = None
        gain = 0
        for _ in range(_CANDIDATES):
            start = dict(rng.choice(sorted(missing, key=repr)))
            case = _complete(start, factors, allowed, rng)
            covered = len(_pairs(case) & missing) if case else 0
            if covered > gain:
                best, gain = case, covered
        assert best is not None
        cases.append(best)
        missing -= _pairs(best)
    return cases


def _complete(
    start: Case, factors: Mapping[str, Sequence[Any]], allowed: Callable[[Case], bool], rng: random.Random
) -> Case | None:
    """`start` with the other factors drawn so that the whole is allowed; None if forty draws find none."""
    for _ in range(40):
        case = {name: start.get(name, rng.choice(list(values))) for name, values in factors.items()}
        if allowed(case):
            return case
    return None


def _pairs(case: Case | None) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    return set(itertools.combinations(case.items(), 2)) if case else set()
