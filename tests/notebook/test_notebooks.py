"""The example notebooks run top to bottom, are kept with what they showed, and lead to each other."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from tests.notebook.freeze import FOLDER, clean, execute

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 300_000  # bytes
LINK = re.compile(r"\]\((?!https?://)([^)#]+)[^)]*\)")
OURS = re.compile(r"/(?:home|root|tmp|work|Users|usr|var)/|0x[0-9a-f]{6,}")  # a path or an address of a machine

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"]


def kinds(notebook: NotebookNode) -> list[list[tuple[str, list[str]]]]:
    """What each cell shows, cell by cell: the kind of output, and its forms."""
    return [[(out.output_type, sorted(out.get("data", ()))) for out in cell.outputs] for cell in code(notebook)]


def printed(notebook: NotebookNode) -> str:
    """All that its cells say in plain text."""
    return "\n".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs(notebook))


def truths(notebook: NotebookNode) -> list[str]:
    """What it found to be so, on any machine: lines with a hit or a miss, and those that end in True or False."""
    return re.findall(r"(?m)^.*(?: hit | miss |\bTrue$|\bFalse$).*$", printed(notebook))


def paging_loses_less_than_four_per_cent(text: str) -> bool:
    paged, known, guessed, longest = map(float, re.findall(r"([\d.]+)% holds no token", text))
    return 0 < paged < 4 < 20 < known < guessed < longest < 100


def few_blocks_preempt(text: str) -> bool:
    first, *_, last = (int(count) for count in re.findall(r"(\d+) preemptions", text))
    return first > last == 0


def users_share_a_prefix(text: str) -> bool:
    [(hits, queries)] = re.findall(r"prefix cache: ([\d,]+) of ([\d,]+)", text)
    return 0.4 < int(hits.replace(",", "")) / int(queries.replace(",", "")) < 1


FIGURES = {
    "04_paging": paging_loses_less_than_four_per_cent,
    "06_async": users_share_a_prefix,
    "08_tuning": few_blocks_preempt,
}


def test_there_are_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08"]


@pytest.mark.slow
@each
def test_it_runs_and_finds_what_it_was_kept_with(path: Path) -> None:
    ran, kept = clean(execute(path)), nbformat.read(path, as_version=4)
    assert not complaints(ran)
    assert kinds(ran) == kinds(kept)
    assert truths(ran) == truths(kept)
    for notebook in (ran, kept):
        assert FIGURES.get(path.stem, bool)(printed(notebook))


@each
def test_it_is_kept_with_its_output_and_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert outputs(notebook)
    assert clean(nbformat.read(path, as_version=4)) == notebook
    assert "widget" not in "".join(kind for output in outputs(notebook) for kind in output.get("data", ()))
    assert not complaints(notebook)
    assert not OURS.search(str([dict(output) for output in outputs(notebook)]))


@each
def test_its_links_lead_somewhere(path: Path) -> None:
    texts = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    for text in texts:
        for target in LINK.findall(text):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
