"""What embedllm changes in the process around it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import embedllm

ROOT = Path(embedllm.__file__).parents[1]
TASKS = Path("/proc/self/task")
POOL = """
import os, torch
from embedllm.process import release_thread_pool
def threads(): return len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
x = torch.arange(4_000_000, dtype=torch.float64)
def compute(): return float((x * 2).sum())
"""


def run(code: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env={**env, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
def test_the_thread_pool_ends_and_comes_back() -> None:
    run(
        POOL
        + """
before = threads()
first = compute()
if threads() > before:  # this torch computes with OpenMP threads that live on
    assert release_thread_pool()
    assert threads() == before
    assert compute() == first and threads() > before
assert release_thread_pool() in (True, False)  # with nothing to release
release_thread_pool()
"""
    )


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
@pytest.mark.skipif(
    not (ROOT / "embedllm" / "demo" / "model" / "model.safetensors").exists(),
    reason="the model in the box is not there",
)
def test_loading_leaves_no_thread_pool_behind() -> None:
    run(
        POOL
        + """
import embedllm
before = threads()
compute()
if threads() > before and release_thread_pool():
    with embedllm.LLM(num_kv_blocks=64, progress=False) as llm:
        assert threads() == before + 1  # the engine's thread
        assert llm.generate("def f(", max_tokens=2).tokens
"""
    )
