"""`import embedllm` is quick and loads nothing heavy: a notebook's first cell, a web app's cold start."""

import subprocess
import sys

import pytest

from tests.rules.tree import ROOT, modules

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif("embedllm" not in modules(), reason="embedllm/__init__.py is not there yet"),
]

MAX_SECONDS = 0.3
HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "tokenizers",
    "safetensors",
    "jinja2",
    "ipywidgets",
    "langchain_core",
    "tqdm",
}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]; "
    *flags, code = arguments
    return subprocess.run(
        [sys.executable, *flags, "-c", path + code], capture_output=True, text=True, check=True, timeout=60
    )


def test_import_loads_nothing_heavy() -> None:
    loaded = set(python("import embedllm; print(*sys.modules)").stdout.split())
    assert "embedllm" in loaded
    assert not HEAVY & loaded


def test_import_is_quick() -> None:
    """Best of five, so that a neighbour on the machine cannot decide the test."""
    seconds = min(import_seconds() for _ in range(5))
    assert seconds < MAX_SECONDS


def import_seconds() -> float:
    for line in python("-X", "importtime", "import embedllm").stderr.splitlines():
        # "import time: self [us] | cumulative | imported package"
        own, _, rest = line.removeprefix("import time:").partition("|")
        cumulative, _, name = rest.partition("|")
        if name.strip() == "embedllm" and own.strip().isdigit():
            return int(cumulative) / 1e6
    raise AssertionError("-X importtime did not report embedllm")
