"""Kernel tests run on one thread: the shapes are tiny and other tests run beside them."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def why_not_interpreted() -> str:
    """ "" where Triton's interpreter works."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy"))
    broken = triton < (3, 7) and numpy >= (2, 4)
    return "the interpreter of Triton before 3.7 takes NumPy's arrays for numbers, which 2.4 refuses" if broken else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not_interpreted()
    for item in items:
        name = item.path.name
        if (
            reason
            and item.path.parent.name == "kernels"
            and (name.startswith("test_triton") or name == "test_graphs.py")
        ):
            item.add_marker(pytest.mark.skip(reason=reason))
