"""Figures with goals, and the sheet they stand on.

Owns what one measured line holds, how it is judged against its goal and how it is printed. Knows nothing of how it was
measured. Invariant: a line without a value says why.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NAME_WIDTH = 54
LONGEST_REASON = 240  # characters of an error that a line shows


@dataclass(frozen=True)
class Goal:
    """What a figure should reach: `limit` in the figure's own unit, or under it where at_most is set."""

    limit: float
    at_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.limit if self.at_most else value >= self.limit


@dataclass(frozen=True)
class Figure:
    """One line. value: None where there is none, and then `beside` or `failure` says why.

    share: of what the hardware can do, as measured in the same run; `of` names that. 1.0 is all of it.
    """

    name: str
    value: float | None = None
    unit: str = ""
    share: float | None = None
    of: str = ""
    goal: Goal | None = None
    beside: str = ""
    failure: str = ""

    @staticmethod
    def failed(name: str, error: BaseException) -> Figure:
        """The line of a measurement that raised."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Figure(name, failure=reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + "…")

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None where there is no goal or no value."""
        return None if self.goal is None or self.value is None else self.goal.is_met(self.value)

    def line(self) -> str:
        """For a terminal."""
        if self.value is None:
            return f"  {self.name:<{NAME_WIDTH}} {'FAILED ' + self.failure if self.failure else self.beside}"
        notes = []
        if self.share is not None:
            notes.append(f"{self.share:.1%} of {self.of}")
        if self.goal is not None:
            sign, verdict = "≤" if self.goal.at_most else "≥", "met" if self.is_met else "missed"
            notes.append(f"goal {sign} {self.goal.limit:,.6g}, {verdict}")
        notes += [self.beside] if self.beside else []
        return f"  {self.name:<{NAME_WIDTH}} {self.value:>12,.2f} {self.unit:<8}  {'; '.join(notes)}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """share and goal are left out where there are none; `failure` is there where the line failed."""
        found: dict[str, Any] = {"name": self.name, "value": self.value, "unit": self.unit}
        if self.share is not None:
            found |= {"share": self.share, "of": self.of}
        if self.goal is not None:
            found["goal"] = {"limit": self.goal.limit, "at_most": self.goal.at_most, "met": self.is_met}
        if self.beside:
            found["beside"] = self.beside
        return found | ({"failure": self.failure} if self.failure else {})


@dataclass
class Sheet:
    """All figures of one run. facts: what it ran on, such as device, driver and versions, in the order of printing."""

    facts: dict[str, str]
    figures: list[Figure] = field(default_factory=list)

    @property
    def num_failed(self) -> int:
        return sum(bool(figure.failure) for figure in self.figures)

    def value(self, name: str) -> float | None:
        """The value of the line of this name; None where it has none or was not measured."""
        return next((figure.value for figure in self.figures if figure.name == name), None)

    def heading(self) -> str:
        return "gpu: " + ", ".join(f"{key} {value}" if key != "device" else value for key, value in self.facts.items())

    def summary(self) -> str:
        """How many goals are met, and how many lines failed."""
        judged = [figure.is_met for figure in self.figures if figure.is_met is not None]
        lost = f"; {self.num_failed} lines failed" if self.num_failed else ""
        return f"  {sum(judged)} of {len(judged)} goals met{lost}"

    def table(self) -> str:
        """For a terminal."""
        return "\n".join([self.heading(), *(figure.line() for figure in self.figures), self.summary()])

    def as_json(self) -> dict[str, Any]:
        figures = [figure.as_json() for figure in self.figures]
        return {"probe": "gpu", **self.facts, "weights": "random", "failed": self.num_failed, "figures": figures}
