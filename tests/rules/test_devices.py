"""What depends on the kind of device stands in few places, so that everything else is written once."""

import ast
from collections.abc import Iterator

import pytest

from tests.rules.test_bans import dotted
from tests.rules.tree import Source, sources

# ops picks; gpu and transfer are what it picks; the others own what lies on a device.
PLACES = {"ops", "gpu", "transfer", "runner", "graphs", "kv_cache"}
SPEAKS_OF_CUDA = [s for s in sources() if s.module.startswith("embedllm.") and (s.floor or 7) < 7]


def complaints(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr == "is_cuda" or dotted(node).startswith("torch.cuda")):
            yield f"{node.lineno}: {dotted(node) or node.attr}"
        if isinstance(node, ast.Compare) and any(
            isinstance(part, ast.Constant) and part.value == "cuda" for part in [node.left, *node.comparators]
        ):
            yield f"{node.lineno}: asks whether it is CUDA"


@pytest.mark.parametrize("source", SPEAKS_OF_CUDA, ids=lambda source: source.name)
def test_only_a_few_places_ask_for_the_device(source: Source) -> None:
    if source.module.split(".")[1] not in PLACES:
        assert not list(complaints(source.tree))


def test_the_rule_finds_what_it_is_for() -> None:
    text = "if tensor.is_cuda: pass\nif device.type == 'cuda': torch.cuda.synchronize()\nprint('cuda')"
    assert sorted({int(found.split(":")[0]) for found in complaints(ast.parse(text))}) == [1, 2]
