"""What people do with cells: run them again, reload code under them, load one model after another, make mistakes.

With an LLM in the kernel none of it costs a second model, a print from nowhere, or memory that does not come back.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.memory_cycles import MODEL_MIB, write_llama
from tests.notebook.kernels import Kernel, kernel
from tests.rules.tree import ROOT

SETUP = """
import gc, logging, sys, threading, time, weakref, embedllm, torch
from tests.engine.hooked import Hooked, prompt_of, engine_of, until
from tests.engine.memory_cycles import OPTIONS, forget_peak, status, trim
torch.set_num_threads(1)

def right(llm, model):
    return llm.generate(prompt_of(2), max_tokens=6).tokens == model.expected(prompt_of(2), 6)
"""
TOLERANCE = 12.0  # MiB of resident memory: what malloc and the kernel's own records make of it


@pytest.fixture(scope="module")
def notebook() -> Iterator[Kernel]:
    with kernel() as running:
        running.run(SETUP)
        yield running


def test_the_load_cell_again(notebook: Kernel) -> None:
    """The same cell gives the engine that is there; changed, it ends the old one before it loads."""
    notebook.run("model = Hooked()\nother = Hooked()\nclosed_first = []")
    notebook.run(
        "runner = other.runner\nother.runner = lambda limits: (closed_first.append(model.closed), runner(limits))[1]"
    )
    notebook.run("llm = embedllm.LLM(model, num_kv_blocks=64)", cell="load")
    notebook.run("core = weakref.ref(llm._core)\nright(llm, model)", cell="use")
    notebook.run("llm = embedllm.LLM(model, num_kv_blocks=64)", cell="load")
    assert notebook.value("llm._core is core() and right(llm, model)")
    notebook.run("llm = embedllm.LLM(other, num_kv_blocks=64)", cell="load")
    assert notebook.value("closed_first, right(llm, other)") == ([True], True)
    notebook.run("llm.close()")


def test_never_two_models_at_the_peak(tmp_path: Path) -> None:
    """The load cell of a real model, changed and run again, closed, and another model after it."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("reads Linux's accounts")
    folder = write_llama(tmp_path / "one")
    shutil.copytree(folder, tmp_path / "two")
    with kernel() as notebook:
        notebook.run(SETUP)
        notebook.run(f"folders = [{str(folder)!r}, {str(tmp_path / 'two')!r}]\nafter, peaks = [], []")
        notebook.run("def measure():\n    trim()\n    after.append(status('VmRSS'))")
        for number in range(8):
            notebook.run("forget_peak()")
            notebook.run(
                f"llm = embedllm.LLM(folders[{number % 2}], max_num_seqs={8 + number}, **OPTIONS)", cell="load"
            )
            notebook.run("llm.generate([5, 9], max_tokens=4)", cell="use")
            notebook.run("peaks.append(status('VmHWM'))\nmeasure()")
        peaks, open_after = notebook.value("peaks"), notebook.value("after")
        notebook.run("llm.close()\nmeasure()")
        closed = notebook.value("after[-1]")
        notebook.run("llm = embedllm.LLM(folders[0], **OPTIONS)\nllm.generate([5, 9], max_tokens=4)", cell="elsewhere")
        notebook.run("thread = llm._core.worker._thread\ndel llm")
        notebook.run("until(lambda: not thread.is_alive())\nmeasure()")
        dropped = notebook.value("after[-1]")
    assert max(peaks[1:]) - peaks[0] <= MODEL_MIB / 2, f"a second model was there: {peaks}"
    assert open_after[-1] - open_after[1] <= TOLERANCE, f"memory grows: {open_after}"
    assert open_after[-1] - closed >= MODEL_MIB and dropped - closed <= TOLERANCE


def test_autoreload(notebook: Kernel, tmp_path: Path) -> None:
    """Every module of the package is touched while a request runs: it goes on, and the next ones are right."""
    copied = shutil.copytree(
        ROOT / "embedllm", tmp_path / "embedllm", ignore=shutil.ignore_patterns("__pycache__", "model")
    )
    with kernel() as own:
        own.run(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{SETUP}")
        assert own.value("embedllm.__file__") == str(copied / "__init__.py")
        own.run("%load_ext autoreload\n%autoreload 2\n%load_ext embedllm")
        own.run("model = Hooked(delay=0.005)\nllm = embedllm.LLM(model, num_kv_blocks=512)", cell="load")
        own.run("running = llm.submit(prompt_of(1), max_tokens=300)\ncore = llm._core")
        for name in ("generation", "llm", "worker", "channel", "registry", "cells", "process", "display", "outputs"):
            path = copied / f"{name}.py"
            path.write_text(path.read_text() + "\nTOUCHED = True\n")
        ran = own.run("right(llm, model)")
        assert "autoreload of" not in ran.printed and own.value("embedllm.worker.TOUCHED and embedllm.llm.TOUCHED")
        assert own.value("running.result(30).tokens == model.expected(prompt_of(1), 300)")
        own.run("llm = embedllm.LLM(model, num_kv_blocks=512)", cell="load")
        assert own.value("llm._core is core and right(llm, model)")
        hooks = "[f.__module__ for f in get_ipython().events.callbacks['post_run_cell']].count('embedllm.cells')"
        assert own.value(hooks) == 1
        number = own.start("s = llm.stream(prompt_of(1), max_tokens=1_500)\nfor _ in s: time.sleep(5)")
        time.sleep(0.6)
        own.stop()
        assert own.finish(number).error == "KeyboardInterrupt"
        own.run("until(lambda: llm.stats().num_requests_running == 0, 1)")
        own.run("llm.close()")
        assert own.value("model.closed")


def test_the_engine_says_nothing(notebook: Kernel) -> None:
    """Steps that fail, requests that fail and an engine that dies: errors where somebody asked, and no line beside."""
    notebook.run(
        "model = Hooked(delay=0.002)\nllm = embedllm.LLM(model, num_kv_blocks=256)\n"
        "def fail(plan):\n    if model.num_steps % 5 == 0: raise ZeroDivisionError\n"
        "model.before = fail\nasked = [llm.submit(prompt_of(n), max_tokens=60) for n in range(4)]"
    )
    ran = notebook.run("for one in asked: one.wait(30)")
    assert not ran.printed
    assert notebook.value("llm.stats().num_step_faults") > 0
    notebook.run(
        "def fail(plan): raise ZeroDivisionError\nmodel.before = fail\nlost = llm.submit(prompt_of(1), max_tokens=9)"
    )
    assert not notebook.run("lost.wait(30)").printed
    assert not [m for m in notebook.shown(0.5) if m["msg_type"] == "stream"]
    notebook.run("del asked, lost\nllm.close()")


def test_whoever_wants_the_log_gets_it(notebook: Kernel) -> None:
    notebook.run("handler = logging.StreamHandler(sys.stdout)\nlogging.getLogger('embedllm').addHandler(handler)")
    notebook.run(
        "model = Hooked()\nllm = embedllm.LLM(model)\ndef fail(plan): raise ZeroDivisionError\nmodel.before = fail"
    )
    ran = notebook.run(
        "llm.submit(prompt_of(1), max_tokens=9).wait(30)\nlogging.getLogger('embedllm').removeHandler(handler)"
    )
    assert "ZeroDivisionError" in ran.printed
    notebook.run("llm.close()")


MISTAKES = {
    "a refused request": "llm.generate(prompt_of(1), max_tokens=10**9)",
    "a failed request": "llm.generate(prompt_of(1), max_tokens=9, logits_processor=lambda *args: 1 / 0)",
    "an error in a loop": "for delta in llm.stream(prompt_of(1), max_tokens=900): 1 / 0",
    "a task that fails": "await llm.submit(prompt_of(1), max_tokens=9, logits_processor=lambda *args: 1 / 0)",
    "a timeout": "llm.submit(prompt_of(1), max_tokens=900).result(timeout=0.01)",
}


@pytest.mark.parametrize("cell", MISTAKES)
def test_a_kept_traceback_keeps_no_engine(notebook: Kernel, cell: str) -> None:
    """IPython keeps the last error for %debug. Dropping the LLM ends its engine all the same."""
    notebook.run("model = Hooked(delay=0.002)\nllm = embedllm.LLM(model, num_kv_blocks=512)")
    assert notebook.finish(notebook.start(MISTAKES[cell])).content["status"] == "error"
    notebook.run("kept = sys.last_value\ndel llm\nuntil(lambda: model.closed)")
    assert notebook.value("kept is sys.last_value and kept.__traceback__ is not None")


def test_a_users_own_frames_stay_for_debugging(notebook: Kernel) -> None:
    notebook.run("model = Hooked()\nllm = embedllm.LLM(model)")
    notebook.run("def mine():\n    seen = 'here'\n    llm.generate([1], max_tokens=10**9)")
    assert notebook.finish(notebook.start("mine()")).error == "RequestTooLong"
    frames = (
        "import traceback\nframes = {f.f_code.co_name: f for f, _ in traceback.walk_tb(sys.last_value.__traceback__)}"
    )
    notebook.run(frames)
    assert notebook.value("frames['mine'].f_locals['seen'], 'self' in frames['generate'].f_locals") == ("here", False)
    notebook.run("llm.close()")
