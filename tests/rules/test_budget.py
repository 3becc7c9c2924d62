"""The size that keeps the house readable. Over budget is a question about the design, not a reason to golf."""

import ast

import pytest

from tests.rules.tree import Source, code_lines, docstring_lines, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
POLICY_GOAL, MAX_POLICY_LINES = 900, 1_150  # floors 1 and 2, lines of code
MAX_CORE_LINES = 9_000  # floors 1 to 6 without the two wings below, lines of code
MAX_VIEW_LINES = 1_800  # of what only shows them: docs/decisions/0015
VIEW = ("replay", "wire", "trace", "picture", "text_picture", "perfetto", "monitor", "view", "cells", "display")
VIEW += ("safe_markdown",)
MAX_LANGUAGE_LINES = 4_400  # of what reads and writes other languages, schemas and chats: docs/decisions/0016
LANGUAGE = ("structured", "structured_output", "chat")


def lines_of_code(floors: range, only: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> int:
    """Of the modules of these floors: `only` those of these names, or those `without` them."""
    counted = [source for source in sources() if source.floor in floors]
    named = {source.module: ".".join(source.module.split(".")[1:2]) for source in counted}
    counted = [s for s in counted if named[s.module] not in without and (not only or named[s.module] in only)]
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
    policy = lines_of_code(range(1, 3), without=LANGUAGE)
    core = lines_of_code(range(1, 7), without=(*VIEW, *LANGUAGE))
    view, language = lines_of_code(range(1, 7), only=VIEW), lines_of_code(range(1, 7), only=LANGUAGE)
    with capsys.disabled():
        per_floor = ", ".join(f"{floor}: {lines:,}" for floor, lines in figures.items())
        print(f"\nlines of code by floor: {per_floor}")
        print(f"policy {policy:,} (goal {POLICY_GOAL}), core {core:,}, view {view:,}, languages {language:,}")
    assert policy <= MAX_POLICY_LINES
    assert core <= MAX_CORE_LINES
    assert view <= MAX_VIEW_LINES
    assert language <= MAX_LANGUAGE_LINES
