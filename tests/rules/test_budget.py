"""The size that keeps the house readable. Over budget is a question about the design, not a reason to golf."""

import ast

import pytest

from tests.rules.tree import Source, code_lines, docstring_lines, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
POLICY_GOAL, MAX_POLICY_LINES = 900, 1_100  # floors 1 and 2, lines of code
MAX_CORE_LINES = 9_000  # floors 1 to 6, lines of code


def lines_of_code(floors: range) -> int:
    return sum(len(code_lines(source.tree, source.text)) for source in sources() if source.floor in floors)


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_file_and_functions(source: Source) -> None:
    assert len(source.text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring_lines(node))
            assert length <= MAX_FUNCTION_LINES, f"{source.name}:{node.lineno} {node.name} has {length} lines"


def test_floors_stay_small(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {floor: lines_of_code(range(floor, floor + 1)) for floor in range(8)}
    policy, core = lines_of_code(range(1, 3)), lines_of_code(range(1, 7))
    with capsys.disabled():
        per_floor = ", ".join(f"{floor}: {lines:,}" for floor, lines in figures.items())
        print(f"\nlines of code by floor: {per_floor}; policy {policy:,} (goal {POLICY_GOAL}), core {core:,}")
    assert policy <= MAX_POLICY_LINES
    assert core <= MAX_CORE_LINES
