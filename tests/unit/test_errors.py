"""The tree of errors is the one its module draws, and each can be caught by the built-in type that fits."""

import pickle
import re

import pytest

from embedllm import errors
from embedllm.outputs import Completion

LINE = re.compile(r"^    ([│ ├└─]*)(\w+)(?: \((\w+)\))?", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Name -> (parent, built-in base), as the docstring draws it."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[str] = []
    for indent, name, builtin in LINE.findall(errors.__doc__ or ""):
        level = len(indent) // 4
        path[level:] = [name]
        tree[name] = (path[level - 1] if level else None, builtin or None)
    return tree


def test_tree_is_as_drawn() -> None:
    tree = drawn()
    assert set(tree) == set(errors.__all__) and len(tree) > 15
    for name, (parent, builtin) in tree.items():
        error = getattr(errors, name)
        assert error.__doc__ and issubclass(error, Exception)
        if parent:
            assert issubclass(error, getattr(errors, parent)), f"{name} is no {parent}"
        bases = [base for base in error.__mro__ if base.__module__ == "builtins"]
        own = {b.__name__ for b in bases} - {"object", "BaseException", "Exception"}
        inherited = {"ValueError"} if issubclass(error, errors.InvalidRequest) else set()
        assert own - inherited - {builtin} <= {"OSError"}, f"{name} is also {own}"
        assert builtin is None or builtin in own


def test_nearest_name() -> None:
    error = errors.UnknownOption.named("blocksize", ["block_size", "seed"], "LLM")
    assert str(error) == "LLM has no option 'blocksize'; did you mean 'block_size'?"
    assert isinstance(error, (TypeError, ValueError)) and isinstance(error, errors.InvalidRequest)
    assert str(errors.UnknownOption.named("x", [], "LLM")) == "LLM has no option 'x'"


@pytest.mark.parametrize("kind", [errors.RequestFailed, errors.DeadlineExceeded, errors.RequestCancelled])
def test_ended_requests_carry_what_there_was(kind: type[Exception]) -> None:
    partial = Completion("ab", [1, 2], "error")
    error = kind("it failed", partial)
    assert str(error) == "it failed" and error.completion is partial and error.completions == []
    assert kind("it failed").completion is None


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_cross_process_boundaries(name: str) -> None:
    error = pickle.loads(pickle.dumps(getattr(errors, name)("what happened")))
    assert type(error).__name__ == name and str(error) == "what happened"
