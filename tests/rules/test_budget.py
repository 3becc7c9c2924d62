"""The size that keeps the house readable. Over budget is a question about the design, not a reason to golf."""

import ast

import pytest

from tests.rules.tree import Source, code_lines, docstring_lines, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
POLICY_GOAL, MAX_POLICY_LINES = 900, 1_100  # floors 1 and 2, lines of code
MAX_CORE_LINES = 9_000  # floors 1 to 6 without what only shows them, lines of code
MAX_VIEW_LINES = 1_800  # of what only shows them: docs/decisions/0015
VIEW = ("replay", "wire", "trace", "picture", "text_picture", "perfetto", "monitor", "view", "cells", "display")
VIEW += ("safe_markdown",)


def lines_of_code(floors: range, view: bool | None = None) -> int:
    """view: only what shows the engine, or only the rest."""
    counted = [source for source in sources() if source.floor in floors]
    if view is not None:
        counted = [source for source in counted if (".".join(source.module.split(".")[1:2]) in VIEW) is view]
    return sum(len(code_lines(source.tree, source.text)) for source in counted)


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_file_and_functions(source: Source) -> None:
    assert len(source.text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring_lines(node))
            assert length <= MAX_FUNCTION_LINES, f"{source.name}:{node.lineno} {node.name} has {length} lines"


def test_floors_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {floor: lines_of_code(range(floor, floor + 1)) for floor in range(8)}
    policy, core, view = (
        lines_of_code(range(1, 3)),
        lines_of_code(range(1, 7), view=False),
        lines_of_code(range(1, 7), view=True),
    )
    with capsys.disabled():
        per_floor = ", ".join(f"{floor}: {lines:,}" for floor, lines in figures.items())
        print(f"\nlines of code by floor: {per_floor}")
        print(f"policy {policy:,} (goal {POLICY_GOAL}), core {core:,}, view {view:,}")
    assert policy <= MAX_POLICY_LINES
    assert core <= MAX_CORE_LINES
    assert view <= MAX_VIEW_LINES
