"""Threads that compute: whose they are, and how many while others use the machine."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import embedllm
from embedllm import openmp
from embedllm.openmp import Team

ROOT = Path(embedllm.__file__).parents[1]
TASKS = Path("/proc/self/task")
POOL = """
import os, torch
from embedllm.openmp import release_pool
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
    assert release_pool()
    assert threads() == before
    assert compute() == first and threads() > before
assert release_pool() in (True, False)  # with nothing to release
release_pool()
"""
    )


@pytest.mark.skipif(not TASKS.is_dir(), reason="counts threads in /proc")
def test_loading_leaves_no_thread_pool_behind() -> None:
    run(
        POOL
        + """
import embedllm
before = threads()
compute()
if threads() > before and release_pool():
    with embedllm.LLM(num_kv_blocks=64, progress=False) as llm:
        assert threads() == before + 1  # the engine's thread
        assert llm.generate("def f(", max_tokens=2).tokens
"""
    )


# ---- how many ---------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(openmp, "time", clock)
    return clock


def in_a_thread(function: object) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_team_is_as_large_as_there_is_room(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    library = openmp._library()
    if library is None:
        pytest.skip("torch does not compute with GNU's OpenMP here")
    room, asked = 3, list[int]()

    def look(size: int) -> bool:
        asked.append(size)
        return size <= room

    monkeypatch.setattr(openmp, "_all_find_a_processor", look)
    seen: list[tuple[int, int]] = []

    def run() -> None:
        nonlocal room
        team = Team(16)
        for now, room in ((100.0, 3), (100.9, 16), (101.1, 16), (101.2, 1), (101.4, 1)):  # noqa: B007
            clock.now = now
            team.gather()
            seen.append((team.size, library.omp_get_max_threads()))

    mine = library.omp_get_max_threads()
    in_a_thread(run)
    # Cut down; not looked at again yet; all again; not looked at; cut down to one, which needs no look.
    assert [size for size, _ in seen] == [2, 2, 16, 16, 1]
    assert all(size == told for size, told in seen), "OpenMP was told something else"
    assert asked == [16, 8, 4, 2, 16, 16, 8, 4, 2]
    assert library.omp_get_max_threads() == mine, "another thread's team was changed"


@pytest.mark.parametrize("processors", [1, 10_000])
def test_a_team_is_no_larger_than_torch_and_the_process_allow(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    monkeypatch.setattr(openmp, "_all_find_a_processor", lambda size: True)
    monkeypatch.setattr(openmp, "num_processors", lambda: processors)
    found: list[tuple[int, int]] = []

    def run() -> None:
        before, team = torch.get_num_threads(), Team()
        team.gather()
        found.append((team.size, min(before, processors)))

    in_a_thread(run)
    assert found[0][0] == found[0][1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins a process to a processor")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="with one processor OpenMP never spins")
def test_threads_that_share_a_processor_are_noticed() -> None:
    """Two threads, both spinning, on one processor: each operation lasts until the system swaps them."""
    run(
        """
import os, torch
torch.set_num_threads(2)
from embedllm.openmp import Team, _library
if _library() is not None:
    team = Team(2)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    team.gather()
    assert team.size == 1 and torch.get_num_threads() == 1, team.size
"""
    )
