"""The example notebooks: each run in a kernel of its own, and written back with what it showed.

Owns how they are executed and what of their output is kept. Knows nothing of what they are about. Invariant: what is
written holds no widget, no time of day, no path and no address of the machine that ran it.

    python -m tests.notebook.freeze                       # all of them
    python -m tests.notebook.freeze notebooks/04_*.ipynb
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.notebook.kernels import PATH
from tests.rules.tree import ROOT

FOLDER = ROOT / "notebooks"
SECONDS = 60  # that a notebook may take
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
WIDGET = "application/vnd.jupyter.widget-view+json"  # progress bars; the live view is frozen
LANGUAGE = {"language_info": {"name": "python"}}


def execute(path: Path) -> NotebookNode:
    """What a notebook is after its cells ran top to bottom in a fresh kernel that finds this tree.

    Raises nbclient's CellExecutionError where a cell fails, and CellTimeoutError where the notebook takes too long.
    """
    notebook = nbformat.read(path, as_version=4)
    end = time.monotonic() + SECONDS
    client = NotebookClient(
        notebook,
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    client.create_kernel_manager().kernel_spec.argv[0] = sys.executable
    paths = filter(None, (PATH, os.environ.get("PYTHONPATH")))
    client.execute(env={**os.environ, "EMBEDLLM_FREEZE": "1", "PYTHONPATH": os.pathsep.join(paths)}, cwd=str(FOLDER))
    return notebook


def clean(notebook: NotebookNode) -> NotebookNode:
    """Without what a kernel or a front end adds of its own."""
    notebook.metadata = nbformat.from_dict({**KERNEL, **LANGUAGE})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        began = time.monotonic()
        nbformat.write(clean(execute(path)), path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
