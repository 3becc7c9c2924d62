"""CPython's standard library sources as training and held-out text.

Owns the split: whole packages are held out together with their tests, and near-duplicates across the split are removed.
It reads the running interpreter's own library folder and nothing else. Invariant: no held-out file, and no file that
shares a tenth of its five-line shingles with one, is ever in the training part.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = ("concurrent", "email", "json", "logging", "tomllib", "wsgiref", "xmlrpc", "zoneinfo")
SKIPPED = ("site-packages", "dist-packages", "__pycache__", "bad_coding", "badsyntax", "bad_getattr")
TABLES = ("encodings/cp", "encodings/iso", "encodings/mac", "encodings/koi", "pydoc_data", "idlelib/idle_test/htest")
SHINGLE_LINES = 5
MAX_SHARED = 0.1


@dataclass(frozen=True)
class Source:
    """One file: its path below the library folder with forward slashes, and its text."""

    path: str
    text: str

    @property
    def is_test(self) -> bool:
        return any(part in ("test", "tests", "idle_test") or part.startswith("test_") for part in self.path.split("/"))


def is_held_out(path: str) -> bool:
    """Whether a path belongs to a held-out package or to the tests of one."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] in HELD_OUT:
        return True
    return any(part == f"test_{name}" or part.startswith(f"test_{name}_") for part in parts for name in HELD_OUT)


def read_library(root: Path | None = None) -> list[Source]:
    """Every readable UTF-8 source of the standard library in path order, generated tables left out."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if any(word in path for word in SKIPPED) or path.startswith(TABLES) or path.startswith("config-"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and "\r" not in text:
            sources.append(Source(path, text))
    return sources


def shingles(text: str) -> set[int]:
    """Hashes of every run of five non-blank lines, compared without indentation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    runs = range(len(lines) - SHINGLE_LINES + 1)
    return {hash(tuple(lines[i : i + SHINGLE_LINES])) for i in runs}


def split(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    """(train, held out). Exact copies are kept once; training files too close to a held-out one are dropped."""
    unique = list({source.text: source for source in sources}.values())
    held_out = [source for source in unique if is_held_out(source.path)]
    seen = set().union(*(shingles(source.text) for source in held_out))
    train = []
    for source in unique:
        if is_held_out(source.path):
            continue
        own = shingles(source.text)
        if not own or len(own & seen) <= MAX_SHARED * len(own):
            train.append(source)
    return train, held_out


def functions(source: Source, min_lines: int = 4) -> list[str]:
    """The functions and methods of a file, dedented, each from its first decorator to its last line."""
    try:
        tree = ast.parse(source.text)
    except (SyntaxError, ValueError):
        return []
    lines = source.text.splitlines(keepends=True)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            last = node.end_lineno or node.lineno
            if last - node.lineno + 1 >= min_lines:
                found.append(textwrap.dedent("".join(lines[node.lineno - 1 : last])))
    return found
