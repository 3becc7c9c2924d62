"""Addresses in Triton kernels: what may pass 2^31 is an int64 before it is multiplied by a stride.

At an 8B model's sizes a block is 2^20 values across its layers, so int32 wraps at block 2,048; nothing would fail but
the answer.
"""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.rules.tree import Source, sources

WIDE = re.compile(
    r"^((block|table|expert|row|state|expert|weight|x|qkv)_stride|stride|q_token|out_token|token_stride)$"
)
KERNELS = [source for source in sources() if "/triton/" in source.name]


def narrow(function: ast.FunctionDef) -> Iterator[str]:
    """Products of a stride and something that is not known to be an int64."""
    wide = {
        target.id
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and "tl.int64" in ast.unparse(node.value)
        for target in ast.walk(node.targets[0])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(function):
        if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
            continue
        for stride, other in ((node.right, node.left), (node.left, node.right)):
            if isinstance(stride, ast.Name) and WIDE.match(stride.id):
                names = {name.id for name in ast.walk(other) if isinstance(name, ast.Name)}
                if "tl.int64" not in ast.unparse(other) and not names & wide:
                    yield f"line {node.lineno}: {ast.unparse(node)}"


def kernels(source: Source) -> Iterator[ast.FunctionDef]:
    for node in source.tree.body:
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.name)
def test_strides_meet_int64(source: Source) -> None:
    assert not [complaint for kernel in kernels(source) for complaint in narrow(kernel)]


def test_the_rule_sees_what_it_is_for() -> None:
    assert any(list(kernels(source)) for source in KERNELS)
    for code, is_bad in (
        ("block = tl.load(table)\n    offset = block * block_stride", True),
        ("block = tl.load(table).to(tl.int64)\n    offset = block * block_stride", False),
        ("offset = (slot // size) * block_stride", True),
        ("offset = (slot // size).to(tl.int64) * block_stride", False),
    ):
        function = ast.parse(f"def kernel():\n    {code}").body[0]
        assert isinstance(function, ast.FunctionDef)
        assert bool(list(narrow(function))) == is_bad
