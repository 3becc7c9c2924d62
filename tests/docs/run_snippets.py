"""Runs the Python blocks of one Markdown file, in order, in one namespace, the way a notebook would.

Owns the meaning of a fence: ```python runs, every other fence does not. All of it runs inside a running event loop, as
the cells of a notebook do, and `await` is allowed at the top of a block.
A line `expression  # -> text` must have that repr, or one that begins with what stands before a final `...`.
Usage: run_snippets.py FILE
"""

import ast
import asyncio
import inspect
import linecache
import sys
from pathlib import Path


def blocks(text: str) -> list[tuple[int, str]]:
    """(line number of the first line, code) of every block that is to run."""
    found: list[tuple[int, str]] = []
    fence, start, lines, indent = "", 0, [], 0
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        if not fence and bare.startswith("```"):
            fence, start, lines, indent = bare, number + 1, [], len(line) - len(line.lstrip())
        elif fence and bare == "```":
            if fence == "```python":
                found.append((start, "\n".join(lines) + "\n"))
            fence = ""
        elif fence:
            lines.append(line[indent:] if not line[:indent].strip() else line)
    return found


def expected(node: ast.stmt, lines: list[str]) -> str | None:
    if isinstance(node, ast.Expr) and node.end_lineno and "  # -> " in lines[node.end_lineno - 1]:
        return lines[node.end_lineno - 1].partition("  # -> ")[2].strip()
    return None


def run(path: Path) -> int:
    """Run the file's blocks; the number of them."""
    text = path.read_text(encoding="utf-8")
    # Tracebacks then show the line of the Markdown file.
    linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
    found = blocks(text)
    asyncio.run(run_blocks(path, found))
    return len(found)


async def run_blocks(path: Path, found: list[tuple[int, str]]) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for start, code in found:
        for node in ast.parse("\n" * (start - 1) + code, filename=str(path)).body:
            want = expected(node, lines)
            tree = ast.Module([node], []) if want is None else ast.Expression(node.value)
            mode = "exec" if want is None else "eval"
            compiled = compile(tree, str(path), mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            value = eval(compiled, namespace)
            if compiled.co_flags & inspect.CO_COROUTINE:
                value = await value
            if want is not None:
                matches = repr(value).startswith(want[:-3]) if want.endswith("...") else repr(value) == want
                assert matches, f"{path}:{node.lineno} gives {value!r}, the page says {want}"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    run(Path(sys.argv[1]))
