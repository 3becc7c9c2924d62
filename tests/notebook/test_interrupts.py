"""Stop means stop, pressed in a real kernel 0.6 s into a cell, however the cell reads.

The model sleeps in each step and writes down when it stepped: for the last time within 250 ms of Stop or one step. The
next cell must be right. Also run with other ipykernels: `make test-matrix`.
"""

import time
from collections.abc import Iterator

import pytest

from tests.notebook.kernels import Kernel, kernel

pytestmark = pytest.mark.serial

STEP = 0.02
LIMIT = 0.25 + 2 * STEP  # one step that runs, one that is seen to be the last
SETUP = f"""
import asyncio, threading, time, embedllm, ipykernel
from tests.engine.hooked import Hooked, prompt_of, until

model = Hooked(delay={STEP})
steps = []
model.after = lambda plan, output: steps.append(time.monotonic())
llm = embedllm.LLM(model, num_kv_blocks=8192, max_model_len=60_000)
long = dict(max_tokens=50_000)
prompt = prompt_of(1)
kept = []

async def take_all():
    async for _ in llm.stream(prompt, **long):
        pass

def read_in_a_function():
    generation = llm.stream(prompt, **long)
    for delta in generation:
        time.sleep(5)

def in_a_thread(call):
    thread = threading.Thread(target=quiet, args=(call,))
    thread.start()
    while thread.is_alive():
        thread.join(0.05)

def quiet(call):
    try:
        call()
    except embedllm.errors.RequestCancelled:
        pass

def right():
    prompt = prompt_of(2)
    return llm.generate(prompt, max_tokens=6).tokens == model.expected(prompt, 6)
"""

# A to H are the rows of the table; the rest are other ways to wait.
CELLS = {
    "A for, in next": "for _ in llm.stream(prompt, **long): pass",
    "B for, in its body": "for _ in llm.stream(prompt, **long): time.sleep(5)",
    "C for over a name, in its body": "s = llm.stream(prompt, **long)\nfor _ in s: time.sleep(5)",
    "D in a function's body": "read_in_a_function()",
    "E result": "s = llm.stream(prompt, **long)\ns.result()",
    "F async for, in anext": "async for _ in llm.stream(prompt, **long): pass",
    "G async for, awaiting in its body": "async for _ in llm.stream(prompt, **long): await asyncio.sleep(5)",
    "H async for, blocking in its body": "async for _ in llm.stream(prompt, **long): time.sleep(2)",
    "generate": "llm.generate(prompt, **long)",
    "generate a list": "llm.generate([prompt] * 3, **long)",
    "generate in a thread": "in_a_thread(lambda: llm.generate(prompt, **long))",
    "generate a list in a thread": "in_a_thread(lambda: llm.generate([prompt] * 3, **long))",
    "await": "await llm.stream(prompt, **long)",
    "await of a name": "s = llm.stream(prompt, **long)\nawait s",
    "await, submitted and not kept": "await llm.submit(prompt, **long)",
    "result, submitted and not kept": "llm.submit(prompt, **long).result()",
    "gather": "await asyncio.gather(*(take_all() for _ in range(3)))",
    "async for over a name": "s = llm.stream(prompt, **long)\nasync for _ in s: await asyncio.sleep(5)",
    "shown": "llm.stream(prompt, **long)",
    "shown, and more to come": "display(llm.stream(prompt, **long))\nfinished = True",
    "begun and left": "s = [llm.stream(prompt, **long) for _ in range(3)]\ntime.sleep(5)",
    "begun and left, awaiting": "s = llm.stream(prompt, **long)\nc = iter(s)\nnext(c)\nawait asyncio.sleep(3)",
}
# Nothing of Python's runs before the cell's own wait is over; the request ends with that.
LATE = {"H async for, blocking in its body", "begun and left, awaiting"}


@pytest.fixture(scope="module")
def notebook() -> Iterator[Kernel]:
    with kernel() as running:
        running.run(SETUP)
        yield running


@pytest.mark.parametrize("cell", CELLS)
def test_stop(notebook: Kernel, cell: str) -> None:
    notebook.run("steps.clear()")
    number = notebook.start(CELLS[cell])
    time.sleep(0.6)
    pressed = notebook.stop()
    ran = notebook.finish(number)
    assert ran.error in ("KeyboardInterrupt", "CancelledError")
    notebook.run("until(lambda: llm.stats().num_requests_running == 0, 0.5)")
    assert notebook.value("steps[-1]") - (ran.ended if cell in LATE else pressed) <= LIMIT
    assert notebook.value("right()")


def test_a_background_request_goes_on(notebook: Kernel) -> None:
    number = notebook.start("background = llm.submit(prompt, max_tokens=200)\nfor _ in background: time.sleep(5)")
    time.sleep(0.6)
    notebook.stop()
    assert notebook.finish(number).error == "KeyboardInterrupt"
    assert notebook.value("background.result(30).tokens == model.expected(prompt, 200)")


def test_requests_of_other_cells_go_on(notebook: Kernel) -> None:
    """Stop ends what the cell that it stops has begun."""
    notebook.run("earlier = llm.stream(prompt, max_tokens=200)\ncursor = iter(earlier)\nnext(cursor)")
    number = notebook.start("for _ in llm.stream(prompt_of(3), **long): pass")
    time.sleep(0.6)
    notebook.stop()
    assert notebook.finish(number).error == "KeyboardInterrupt"
    assert notebook.value("len([token for delta in cursor for token in delta.tokens]) + 1 >= 200")
    assert notebook.value("earlier.result(30).tokens == model.expected(prompt, 200)")


def test_a_cell_that_ends_otherwise_ends_nothing(notebook: Kernel) -> None:
    number = notebook.start("left = llm.stream(prompt, max_tokens=100)\n1 / 0")
    assert notebook.finish(number).error == "ZeroDivisionError"
    assert notebook.value("left.result(30).tokens == model.expected(prompt, 100)")


def test_the_hook_is_there_once(notebook: Kernel) -> None:
    count = "[f.__module__ for f in get_ipython().events.callbacks['post_run_cell']].count('embedllm.cells')"
    assert notebook.value(count) == 1
    notebook.run("import importlib, embedllm.cells\nimportlib.reload(embedllm.cells)\nright()")
    assert notebook.value(count) == 1
