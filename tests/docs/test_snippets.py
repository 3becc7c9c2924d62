"""Every Python block of the README and the docs runs, in a process and a folder of its own, offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.run_snippets import blocks, run
from tests.rules.tree import ROOT

RUNNER = ROOT / "tests" / "docs" / "run_snippets.py"
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
WITH_CODE = [path for path in PAGES if blocks(path.read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "integrations"))
    done = subprocess.run(
        # From Python 3.12 on, forking beside threads warns; the page that does it says so.
        [sys.executable, "-W", "error", "-W", "ignore:This process (pid=:DeprecationWarning", RUNNER, page],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-4_000:]


def write(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_only_python_fences_run(tmp_path: Path) -> None:
    page = write(tmp_path, "```python\na = 1\n```\n```python {.no-run}\n1 / 0\n```\n```text\n1 / 0\n```\n")
    assert run(page) == 1


def test_blocks_share_names_and_may_await(tmp_path: Path) -> None:
    code = "```python\nimport asyncio\nn = 1\n```\n\n```python\nn += await asyncio.sleep(0, 2)\nn  # -> 3\n```\n"
    assert run(write(tmp_path, code)) == 2


def test_expected_values_are_compared(tmp_path: Path) -> None:
    assert run(write(tmp_path, "```python\n'abcdef'  # -> 'abc...\nsorted('ba')  # -> ['a', 'b']\n```\n")) == 1
    with pytest.raises(AssertionError, match="gives 3, the page says 4"):
        run(write(tmp_path, "```python\n1 + 2  # -> 4\n```\n"))


def test_a_failure_names_the_line_of_the_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run(write(tmp_path, "# Title\n\n```python\nx = 0\n1 / x\n```\n"))
    assert caught.traceback[-1].lineno == 4  # counted from 0
