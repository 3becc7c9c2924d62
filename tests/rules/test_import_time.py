"""How soon it is there: a notebook's first cell, a web app's cold start."""

import subprocess
import sys

import pytest

from tests.rules.tree import ROOT

pytestmark = pytest.mark.serial

MAX_SECONDS = 0.3
MAX_SECONDS_TO_LLM = 0.8  # beyond what `import torch` takes
READY = """
import time, sys
import torch
began = time.perf_counter()
import embedllm
llm = embedllm.LLM()
seconds = time.perf_counter() - began
print(len(llm.generate("def add(a, b):", max_tokens=4).tokens))
print(seconds, *sys.modules)
"""
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


def test_a_fresh_process_is_soon_ready() -> None:
    """An LLM with the model in the box, best of three; transformers' modelling code is none of it."""
    found = []
    for _ in range(3):
        tokens, _, rest = python(READY).stdout.partition("\n")
        seconds, *loaded = rest.split()
        assert 1 <= int(tokens) <= 4
        assert not [name for name in loaded if name.startswith("transformers")]
        found.append(float(seconds))
    assert min(found) < MAX_SECONDS_TO_LLM


def import_seconds() -> float:
    for line in python("-X", "importtime", "import embedllm").stderr.splitlines():
        # "import time: self [us] | cumulative | imported package"
        own, _, rest = line.removeprefix("import time:").partition("|")
        cumulative, _, name = rest.partition("|")
        if name.strip() == "embedllm" and own.strip().isdigit():
            return int(cumulative) / 1e6
    raise AssertionError("-X importtime did not report embedllm")
