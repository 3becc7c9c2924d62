"""What the rule tests know of the source tree: its files, its floors, its imports.

Owns the table of floors. It reads sources as text and never imports them, so a rule holds for broken code too.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Imports go down only. A new module is given its floor here, in the change that brings it.
FLOORS: dict[int, tuple[str, ...]] = {
    1: ("errors", "params", "structured_output", "config", "outputs", "sequence", "plan_types", "events", "request"),
    2: ("blocks", "scheduler", "invariants"),
    3: (
        "ops",
        "quant",
        "batch",
        "layers",
        "models",
        "loader",
        "kv_cache",
        "process",
        "machine",
        "openmp",
        "gpu",
        "transfer",
    ),
    4: ("sampler", "edits", "choice", "speculative", "structured", "graphs", "runner"),
    5: (
        "engine",
        "faults",
        "live",
        "flight",
        "deadlines",
        "resizing",
        "pins",
        "readout",
        "tokenizer",
        "detokenizer",
        "metrics",
        "recording",
        "replay",
        "picture",
        "text_picture",
        "wire",
        "perfetto",
        "pace",
    ),
    6: (
        "llm",
        "asking",
        "grammars",
        "outbox",
        "generation",
        "cells",
        "display",
        "safe_markdown",
        "channel",
        "worker",
        "watchdog",
        "core",
        "trace",
        "options",
        "cache",
        "monitor",
        "view",
        "prompts",
        "registry",
        "chat",
        "sizing",
        "testing",
    ),
    7: ("notebook", "cli", "bench", "demo", "__main__"),
}
KERNELS = "embedllm_kernels"
# Submodules that are public themselves; every other public name is in embedllm.__all__.
PUBLIC_MODULES = frozenset({"errors", "testing"})

_FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with the names taken from it."""

    module: str
    names: tuple[str, ...]
    line: int
    at_load: bool  # runs when the importing module is loaded: not inside a function, not for type checkers only


@dataclass(frozen=True)
class Source:
    """One Python file of a package that is shipped."""

    path: Path
    module: str  # "embedllm.models.decoder"

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def floor(self) -> int | None:
        """The floor the file stands on; None where the table does not say, and for the package's own __init__."""
        top, *rest = self.module.split(".")
        if top == KERNELS:
            return 0
        if top != "embedllm":
            return 7  # integrations
        return _FLOOR_OF.get(rest[0]) if rest else None

    @functools.cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @functools.cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self, self.tree.body, at_load=True))

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.module if self.path.name == "__init__.py" else self.module.rpartition(".")[0]


def _imports(source: Source, body: list[ast.stmt], at_load: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(_absolute(source, node), names, node.lineno, at_load)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(source, node.body, at_load=False)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _imports(source, node.body, at_load=False)
            yield from _imports(source, node.orelse, at_load)
        else:
            for _, value in ast.iter_fields(node):
                for child in value if isinstance(value, list) else ():
                    if isinstance(child, ast.stmt):
                        yield from _imports(source, [child], at_load)
                    elif isinstance(child, ast.ExceptHandler | ast.match_case):
                        yield from _imports(source, child.body, at_load)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = source.package.split(".")
    base = parts[: len(parts) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


@functools.cache
def sources() -> tuple[Source, ...]:
    """Every Python file of every package that is shipped, as far as it exists."""
    found = []
    for package in package_folders():
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(path, module))
    return tuple(found)


def package_folders() -> list[Path]:
    """`embedllm`, and what stands directly in `kernels/` and `integrations/`."""
    below = [child for parent in ("kernels", "integrations") for child in sorted((ROOT / parent).glob("*"))]
    return [path for path in (ROOT / "embedllm", *below) if path.is_dir() and path.name.isidentifier()]


def modules() -> dict[str, Source]:
    return {source.module: source for source in sources()}


def targets(found: Import) -> Iterator[str]:
    """The modules of this tree that an import statement reaches: `from embedllm import blocks` reaches a submodule."""
    known = modules()
    for name in found.names:
        if f"{found.module}.{name}" in known:
            yield f"{found.module}.{name}"
    if not found.names or any(f"{found.module}.{name}" not in known for name in found.names):
        yield found.module


def is_own(module: str) -> bool:
    return module.partition(".")[0] in {folder.name for folder in package_folders()}


def is_standard_library(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def code_lines(tree: ast.Module, text: str) -> set[int]:
    """Numbers of the lines that hold code: no blank lines, comments or docstrings."""
    import io
    import tokenize

    quiet = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENCODING,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in quiet:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            lines -= docstring_lines(node)
    return lines


def docstring_lines(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> set[int]:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return set()
