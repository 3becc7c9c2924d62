"""Imports go down only: a module may use its own floor and those below it, wherever the import stands in the file."""

import ast
from collections.abc import Iterator

import pytest

from tests.rules.tree import (
    FLOORS,
    KERNELS,
    PUBLIC_MODULES,
    ROOT,
    Source,
    is_own,
    is_standard_library,
    modules,
    sources,
    targets,
)


def complaints(source: Source) -> Iterator[str]:
    for found in source.imports:
        for target in targets(found):
            problem = judge(source, target) if is_own(target) else judge_foreign(source, target)
            if problem:
                yield f"{source.name}:{found.line} imports {target}: {problem}"


def judge(source: Source, target: str) -> str | None:
    if source.module == "embedllm":
        return None  # the front door names everything; test_import_time.py checks that it loads nothing heavy
    if target == "embedllm":
        return None if source.floor == 7 else "only floor 7 goes through the front door"
    other = modules().get(target)
    if other is None or other.floor is None:
        return "no such module, or no floor for it in tests/rules/tree.py"
    if source.floor is not None and other.floor > source.floor:
        return f"floor {source.floor} imports floor {other.floor}"
    if source.floor == 3 and other.floor == 2:
        return "floor 3 is numerics and never sees policy"
    if source.floor == 3 and target == "embedllm.sequence":
        return "floor 3 sees plain plans, never sequences"
    if source.floor == 7 and not public_for(source, target):
        return "floor 7 uses only the public names of embedllm"
    return None


def public_for(source: Source, target: str) -> bool:
    """Floor 7 may use what is public, and whatever stands on floor 7 beside it; the bench also times kernels."""
    top, *rest = target.split(".")
    if top == KERNELS:
        return source.module.startswith("embedllm.bench.")
    if top != "embedllm":
        return source.module.startswith(top)
    return bool(rest) and (rest[0] in PUBLIC_MODULES or rest[0] in FLOORS[7])


def judge_foreign(source: Source, target: str) -> str | None:
    if is_standard_library(target):
        return None
    if source.floor in (1, 2):
        return f"floor {source.floor} stands on the standard library only"
    if source.floor == 0 and target.partition(".")[0] not in ("torch", "triton"):
        return "the kernels stand on torch and triton only"
    return None


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_imports_go_down(source: Source) -> None:
    assert not list(complaints(source))


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.name)
def test_module_has_a_floor(source: Source) -> None:
    assert source.module == "embedllm" or source.floor is not None, "give it a floor in tests/rules/tree.py"


@pytest.mark.parametrize("source", [s for s in sources() if s.floor == 7], ids=lambda source: source.name)
def test_floor_seven_takes_public_names(source: Source) -> None:
    """`from embedllm import X` and `embedllm.X` name only what embedllm.__all__ names."""
    public = public_names() | PUBLIC_MODULES | {"__version__"} | set(FLOORS[7])
    taken = {name: found.line for found in source.imports if found.module == "embedllm" for name in found.names}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "embedllm":
            taken[node.attr] = node.lineno
    assert not {name: line for name, line in taken.items() if name not in public}


def test_no_import_cycles() -> None:
    """Modules on one floor may use each other, never in a circle while loading."""
    graph = {
        source.module: {t for found in source.imports if found.at_load for t in targets(found) if t in modules()}
        for source in sources()
        if source.module != "embedllm"
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, set()) - {module}):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_container_folders_are_no_packages() -> None:
    """An __init__.py here would make a top-level package that shadows somebody else's (Hugging Face's `kernels`)."""
    for folder in ("kernels", "integrations", "notebooks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


def public_names() -> set[str]:
    front = modules().get("embedllm")
    for node in front.tree.body if front else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
