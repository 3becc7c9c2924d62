"""Ways for a process to end while an engine is busy, each in a child of its own. A program.

    python tests/engine/exits.py NAME...

Torch is imported once; every child is forked before any engine exists, opens its own, and ends as an interpreter does.
One line of JSON per scene: name, exit code, seconds from the last statement until the engines had ended and until the
process had, what was on stderr and stdout.
"""

# ruff: noqa: E402

import asyncio
import atexit
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

MARKS: list[int] = []  # where a child writes its times


def mark() -> None:
    if MARKS:
        os.write(MARKS[0], f"{time.monotonic()}\n".encode())


atexit.register(mark)  # functions run in reverse order, so this one runs after embedllm's own

import embedllm
from embedllm import registry
from tests.engine.hooked import LONG, Hooked, prompt_of, until

KEPT: list[Any] = []  # what a module holds until the interpreter takes it apart


def busy(count: int = 100, delay: float = 0.01) -> embedllm.LLM:
    """An LLM with that many requests running."""
    llm = embedllm.LLM(Hooked(delay=delay), max_num_seqs=128, num_kv_blocks=4_096)
    KEPT.extend(llm.submit(prompt_of(number), max_tokens=LONG) for number in range(count))
    until(lambda: llm.stats().num_requests_running == count)
    return llm


def nothing() -> None:
    """What it takes a process with torch in it to end."""


def end_of_the_main_module() -> None:
    KEPT.append(busy())


def handles_in_a_local_frame() -> None:
    llm = busy()
    assert llm.stats().num_requests_running == 100


def system_exit() -> None:
    KEPT.append(busy())
    sys.exit(0)


def an_exception() -> None:
    KEPT.append(busy())
    raise ZeroDivisionError("this one is meant")


def half_read_streams() -> None:
    llm = busy(50)
    for number in range(50):
        cursor = iter(llm.stream(prompt_of(number), max_tokens=LONG))
        next(cursor)
        KEPT.append(cursor)


def a_reading_generator() -> None:
    llm = busy(10)

    def texts() -> Any:
        for delta in llm.stream(prompt_of(1), max_tokens=LONG):
            yield delta.text

    generator = texts()
    next(generator)
    KEPT.append(generator)


def from_a_thread() -> None:
    """Opened and used in a thread that has ended."""
    thread = threading.Thread(target=lambda: KEPT.append(busy()))
    thread.start()
    thread.join()


def daemon_threads_that_wait() -> None:
    llm = busy(20)
    KEPT.append(llm)
    for number in range(20):
        threading.Thread(
            target=llm.generate, args=(prompt_of(number),), kwargs={"max_tokens": LONG}, daemon=True
        ).start()
    until(lambda: llm.stats().num_requests_running == 40)
    # What they hear is an error, as it would be after close(); nobody is there to print it to.
    threading.excepthook = lambda args: None


def a_thread_that_is_waited_for() -> None:
    """The interpreter waits for threads that are no daemons, and the engine serves them until they are done."""
    llm = embedllm.LLM(Hooked(delay=0.002))

    def finish() -> None:
        time.sleep(0.1)
        print(len(llm.generate(prompt_of(1), max_tokens=50).tokens))

    threading.Thread(target=finish).start()


def asyncio_tasks_left_behind() -> None:
    llm = busy(10)

    async def main() -> None:
        for number in range(20):
            KEPT.append(asyncio.ensure_future(read(number)))
        await asyncio.sleep(0.05)

    async def read(number: int) -> None:
        async for _ in llm.stream(prompt_of(number), max_tokens=LONG):
            pass

    asyncio.run(main())


def several_engines() -> None:
    for _ in range(4):
        KEPT.append(busy(25))


def an_idle_engine() -> None:
    llm = embedllm.LLM(Hooked())
    llm.generate(prompt_of(1), max_tokens=3)
    KEPT.append(llm)


def closed_before() -> None:
    llm = busy()
    llm.close()


def used_in_an_atexit_function() -> None:
    llm = embedllm.LLM(Hooked())
    atexit.register(lambda: print(len(llm.generate(prompt_of(1), max_tokens=5).tokens)))


def in_a_cycle_with_a_finalizer() -> None:
    class Application:
        def __init__(self) -> None:
            self.llm = busy(10)
            self.me = self

        def __del__(self) -> None:
            self.llm.close()

    Application()


def during_a_load() -> None:
    """A daemon thread is loading when the main thread ends."""
    inside = threading.Event()

    def build() -> Any:
        inside.set()
        time.sleep(30)

    threading.Thread(target=registry.acquire, args=("slow", build, Hooked()), daemon=True).start()
    assert inside.wait(5)


def terminated() -> None:
    """SIGTERM does what it does to any process: no handler of ours is in its way."""
    KEPT.append(busy())
    mark()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def a_long_step() -> None:
    """Longer than anybody waits at exit, and not to be left in between."""
    model = Hooked()
    llm = embedllm.LLM(model)
    model.before = lambda plan: time.sleep(20)
    KEPT.append((llm, llm.submit(prompt_of(1))))
    time.sleep(0.05)


SCENES: dict[str, Callable[[], None]] = {
    name: scene
    for name, scene in list(globals().items())
    if callable(scene) and getattr(scene, "__module__", "") == __name__ and name not in ("busy", "mark")
}


def run_forked(name: str) -> bool:
    """In the parent: run a scene in a child and report, False. In the child: True, once the scene is over."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            MARKS.append(writing)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            try:
                SCENES[name]()
            finally:
                mark()
            return True
        os.close(writing)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        gone = time.monotonic()
        over, ended = map(float, [*os.read(reading, 100).split(), gone][:2])
        os.close(reading)
        out.seek(0)
        err.seek(0)
        found = {"name": name, "code": code, "engines": ended - over, "process": gone - over}
        found |= {"stderr": err.read(), "stdout": out.read()}
    print(json.dumps(found), flush=True)
    return False


if __name__ == "__main__":
    for scene_name in sys.argv[1:] or SCENES:
        if run_forked(scene_name):
            break
