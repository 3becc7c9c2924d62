"""How many tokens a step may have so that it ends in time.

Owns one number, learnt from the steps that really ran: no start-up measurement, and a machine that gets busy is
noticed. Knows no sequences. Invariant: least <= budget <= most.
"""

from __future__ import annotations

START = 256


class Pace:
    """The token budget that keeps a step near `target` seconds.

    A step that took too long shrinks the budget in proportion, to half at most; one that used the whole budget and was
    quick lets it grow, to double at most. A quick step that had little to do says nothing.
    """

    def __init__(self, target: float, least: int, most: int) -> None:
        self.target = target
        self.least = least
        self.most = most
        self.budget = min(most, max(least, START))

    def observe(self, num_tokens: int, seconds: float) -> int:
        """Learn from one step; returns the budget of the next."""
        ratio = self.target / max(seconds, 1e-6)
        if ratio < 1.0 or num_tokens >= self.budget:
            scaled = int(self.budget * min(2.0, max(0.5, ratio)))
            self.budget = min(self.most, max(self.least, scaled))
        return self.budget
