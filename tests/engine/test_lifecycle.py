"""Open, share, close, drop, open again: memory comes back, threads end, and a failed load leaves nothing."""

import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path
from typing import Any

import pytest

import embedllm
from embedllm import core, registry
from embedllm.errors import EngineClosed, RequestFailed
from embedllm.testing import ByteTokenizer, ScriptedModel
from tests.engine.hooked import LONG, Hooked, engine_of, opened, prompt_of, right, until
from tests.engine.memory_cycles import MODEL_MIB, write_llama

HERE = Path(__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([".", "kernels"])}


def run(program: str, *args: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", str(HERE.with_name(program)), *args],
        cwd=HERE.parents[2],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def thread_of(llm: embedllm.LLM) -> threading.Thread:
    assert llm._core is not None
    return llm._core.worker._thread


# ---- sharing ----------------------------------------------------------------------------------------------------


def test_equal_keys_share_an_engine() -> None:
    model = Hooked()
    one = embedllm.LLM(model, num_kv_blocks=64)
    same = embedllm.LLM(model, num_kv_blocks=64, seed=7, progress=False)  # the handle's own affairs
    assert one._core is same._core
    for other in (
        embedllm.LLM(model, num_kv_blocks=65),
        embedllm.LLM(model, num_kv_blocks=64, prefix_caching=False),
        embedllm.LLM(Hooked(), num_kv_blocks=64),  # equal is not the same
        embedllm.LLM(model, num_kv_blocks=64, tokenizer=ByteTokenizer()),
    ):
        assert other._core is not one._core
        right(other, model)
        other.close()
    one.close()
    right(same, model)
    same.close()
    assert model.closed


def test_an_object_in_a_key_is_itself_as_long_as_the_key_lives() -> None:
    """No other object can come to stand for it, wherever the allocator puts it."""
    for _ in range(5):
        model = Hooked()
        ref = weakref.ref(model)
        llm = embedllm.LLM(model, num_kv_blocks=64)
        del model
        assert ref() is not None
        fresh = Hooked()
        other = embedllm.LLM(fresh, num_kv_blocks=64)
        assert other._core is not llm._core
        llm.close()
        other.close()
        del llm
        gc.collect()


def test_a_folder_whose_files_were_replaced_is_another_model(tmp_path: Path) -> None:
    """Train, save to the same path, open again: the new weights are served, while the old handle goes on."""
    folder = write_llama(tmp_path / "model")
    options: dict[str, Any] = {"dtype": "float32", "num_kv_blocks": 32, "max_model_len": 64}
    with embedllm.LLM(folder, **options) as old:
        with embedllm.LLM(str(folder), **options) as same:
            assert same._core is old._core
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
        with embedllm.LLM(folder, **options) as new:
            assert new._core is not old._core
            assert new.generate([1, 2, 3], max_tokens=8).tokens != old.generate([1, 2, 3], max_tokens=8).tokens


def test_two_side_by_side() -> None:
    one, two = Hooked(delay=0.001), Hooked(delay=0.001)
    two._key = b"another!"  # another function of the context
    with opened(one) as a, opened(two) as b:
        pairs = [(a.submit(prompt_of(n), max_tokens=20), b.submit(prompt_of(n), max_tokens=20)) for n in range(10)]
        for number, (mine, its) in enumerate(pairs):
            assert mine.result(10).tokens == one.expected(prompt_of(number), 20)
            assert its.result(10).tokens == two.expected(prompt_of(number), 20)
            assert mine.tokens != its.tokens


def test_many_threads_that_open_the_same_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    build = core.build

    def slow(model: Any, options: Any) -> core.Core:
        loads.append(model)
        time.sleep(0.1)
        return build(model, options)

    monkeypatch.setattr("embedllm.llm.build", slow)
    model, found = Hooked(), list[embedllm.LLM]()
    threads = [threading.Thread(target=lambda: found.append(embedllm.LLM(model))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found) == 16 and loads == [model] and len({id(llm._core) for llm in found}) == 1
    for llm in found:
        right(llm, model)
        llm.close()
    assert model.closed


# ---- the end ----------------------------------------------------------------------------------------------------


def test_close_ends_the_thread_and_gives_the_model_back() -> None:
    model = Hooked()
    llm = embedllm.LLM(model)
    thread, runner = thread_of(llm), weakref.ref(engine_of(llm)._run)
    running = llm.submit(prompt_of(1), max_tokens=LONG)
    llm.close()
    assert model.closed and llm.closed
    until(lambda: not thread.is_alive(), 0.2)
    assert runner() is None, "a closed LLM still holds its model"
    assert running.done
    llm.close()


def test_dropping_the_last_handle_closes() -> None:
    model = Hooked()
    llm = embedllm.LLM(model)
    other = embedllm.LLM(model)
    thread = thread_of(llm)
    gc.disable()  # no cycle keeps it
    try:
        del llm
        time.sleep(0.05)
        assert thread.is_alive()
        right(other, model)
        del other
        until(lambda: not thread.is_alive())
    finally:
        gc.enable()
    assert model.closed


def test_dropping_it_in_a_cycle_closes() -> None:
    model = Hooked()
    holder: list[Any] = [embedllm.LLM(model)]
    holder.append(holder)
    thread = thread_of(holder[0])
    del holder
    gc.collect()
    until(lambda: not thread.is_alive())


def test_dropping_it_in_the_engines_own_thread() -> None:
    """The last reference goes with the request that held it, on the engine's thread, which then ends itself."""
    model = Hooked(delay=0.001)
    llm = embedllm.LLM(model)
    thread = thread_of(llm)
    generation = llm.submit(prompt_of(1), max_tokens=20)
    del llm
    assert generation.result(5).tokens == model.expected(prompt_of(1), 20)
    until(lambda: not thread.is_alive())
    assert model.closed
    assert [t for delta in generation for t in delta.tokens] == generation.tokens  # results outlive the engine


def test_a_request_keeps_its_llm_open() -> None:
    model = Hooked(delay=0.0005)
    tokens = [t for delta in embedllm.LLM(model).stream(prompt_of(1), max_tokens=30) for t in delta.tokens]
    assert tokens == model.expected(prompt_of(1), 30)
    assert embedllm.LLM(model).generate(prompt_of(2), max_tokens=5).tokens == model.expected(prompt_of(2), 5)


def test_kept_results_keep_nothing_else() -> None:
    """Out[] holds completions, handles and errors; none of them holds the model."""
    model = Hooked()
    llm = embedllm.LLM(model)
    thread, runner = thread_of(llm), weakref.ref(engine_of(llm)._run)
    out: list[Any] = [llm.generate(prompt_of(1), max_tokens=5), llm.submit(prompt_of(2), max_tokens=5)]
    out[-1].result()
    out.append(llm.stream(prompt_of(3), max_tokens=5))
    out.append(list(out[-1]))
    for wrong in ({"logits_processor": lambda *args: 1 / 0}, {"max_tokens": 10**9}):
        try:
            llm.generate(prompt_of(1), **wrong)  # type: ignore[arg-type]
        except embedllm.errors.EmbedLLMError as error:
            out.append(error)
    out.append(llm.trace())
    llm.close()
    del llm
    assert runner() is None
    until(lambda: not thread.is_alive(), 0.2)
    assert len(out) == 7 and isinstance(out[4], RequestFailed)


def test_everything_is_refused_after_close() -> None:
    llm = embedllm.LLM(ScriptedModel(["yes"]), tokenizer=ByteTokenizer())
    cache, monitor, trace = llm.cache, llm.monitor(), llm.trace()
    pin = llm.cache.pin("sixteen letters, and then some more")
    with llm:
        assert llm.generate("x").text == "yes"
    for call in (
        lambda: llm.generate("x"),
        lambda: llm.generate(["x", "y"]),
        lambda: llm.submit("x"),
        lambda: llm.stream("x"),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: llm.stats(),
        lambda: llm.memory(),
        lambda: llm.trace(),
        lambda: llm.monitor(),
        lambda: llm.cache,
        lambda: cache.reset(),
        lambda: cache.pin("sixteen letters, and then some more"),
        lambda: monitor.look(),
    ):
        with pytest.raises(EngineClosed):
            call()
    trace.stop()
    pin.unpin()
    assert llm.closed and "closed" in repr(llm) and llm.info.model == "scripted"
    assert llm.tokenize("ab") == [97, 98]  # text needs no engine


def test_close_from_many_threads_at_once() -> None:
    model = Hooked(delay=0.001)
    llm = embedllm.LLM(model)
    for number in range(10):
        llm.submit(prompt_of(number), max_tokens=LONG)
    threads = [threading.Thread(target=llm.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert model.closed


def test_close_while_others_submit() -> None:
    """Whoever comes too late is refused or cancelled; nobody waits for ever."""
    for _ in range(10):
        model = Hooked()
        llm = embedllm.LLM(model)
        errors: list[BaseException] = []

        def call(llm: embedllm.LLM = llm, errors: list[BaseException] = errors) -> None:
            try:
                while True:
                    llm.generate(prompt_of(1), max_tokens=3)
            except embedllm.errors.EmbedLLMError as error:
                errors.append(error)

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        llm.close()
        for thread in threads:
            thread.join(5)
        assert len(errors) == 6
        assert all(isinstance(e, (EngineClosed, embedllm.errors.RequestCancelled)) for e in errors), errors


# ---- loads that fail --------------------------------------------------------------------------------------------


class Unbuildable(Hooked):
    """Fails while its runner is made."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error: BaseException | None = error

    def runner(self, limits: Any) -> Any:
        if self.error is not None:
            weights = _Held()
            self.held = weakref.ref(weights)
            raise self.error
        return super().runner(limits)


class _Held:
    """What was loaded before the error."""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no"), KeyboardInterrupt(), SystemExit(2)], ids=repr)
def test_a_failed_load_leaves_nothing(error: BaseException) -> None:
    before = threading.active_count()
    model = Unbuildable(error)
    with pytest.raises(type(error)) as kept:
        embedllm.LLM(model)
    assert kept.value is error and model.held() is None, "the error's traceback holds what was loaded"
    assert threading.active_count() == before
    assert not registry._loading
    model.error = None
    with embedllm.LLM(model) as llm:  # and the next one works
        right(llm, model)


def test_others_who_wait_for_a_load_that_fails_try_themselves() -> None:
    model = Unbuildable(MemoryError("too large"))
    seen: list[type] = []

    def open_it() -> None:
        try:
            embedllm.LLM(model)
        except MemoryError as error:
            seen.append(type(error))

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert seen == [MemoryError] * 6


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
        with pytest.raises(RuntimeError, match="can't start"):
            embedllm.LLM(model)
    with embedllm.LLM(model) as llm:
        right(llm, model)


def test_a_cell_that_is_changed_and_run_again_gets_its_memory_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable still holds the old handle while the new model loads; its idle engine ends before that."""
    shell = types.SimpleNamespace(execution_count=1, cell="a")
    shell.get_parent = lambda: {"metadata": {"cellId": shell.cell}}
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))

    def run(cell: str, model: Hooked, **options: Any) -> embedllm.LLM:
        shell.cell, shell.execution_count = cell, shell.execution_count + 1
        return embedllm.LLM(model, **options)

    first, second, third = Hooked(), Hooked(), Hooked()
    llm, other = run("a", first), run("b", second)
    shared = embedllm.LLM(second)
    elsewhere = run("c", second)  # a cell of its own: it keeps what it shares
    closed_before_load: list[bool] = []
    runner = third.runner
    third.runner = lambda limits: (closed_before_load.append(first.closed), runner(limits))[1]  # type: ignore[method-assign]
    old, llm = llm, run("a", third)
    assert closed_before_load == [True] and not second.closed
    with pytest.raises(EngineClosed):
        old.generate(prompt_of(1))
    other = run("b", first)  # cell b again, with another model: the one that c uses too stays
    assert not second.closed and shared._core is elsewhere._core
    busy = llm.submit(prompt_of(1), max_tokens=LONG)
    again = run("a", Hooked())  # somebody still uses the old one
    assert not third.closed and not busy.done
    for one in (llm, other, shared, elsewhere, again, old):
        one.close()


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace(), types.SimpleNamespace(get_parent=lambda: {})])
def test_cells_without_an_id_are_left_alone(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert registry.running_cell() is None
    one, two = Hooked(), Hooked()
    with embedllm.LLM(one) as llm, embedllm.LLM(two):
        right(llm, one)


def test_a_reload_of_the_registry_changes_nothing() -> None:
    """As %autoreload does."""
    model = Hooked()
    with embedllm.LLM(model) as llm:
        importlib.reload(registry)
        with embedllm.LLM(model) as again:
            assert again._core is llm._core
        right(llm, model)


def test_no_threads_but_the_engines() -> None:
    before = threading.active_count()
    with embedllm.LLM(Hooked()) as llm:
        llm.generate([prompt_of(1), prompt_of(2)], max_tokens=3)
        assert threading.active_count() == before + 1
    until(lambda: threading.active_count() == before, 0.2)


# ---- memory of a real model -------------------------------------------------------------------------------------

TOLERANCE = 10.0  # MiB of resident memory over twenty cycles: what malloc and the page size make of it


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's accounts")
def test_peak_memory_is_flat_over_twenty_cycles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Closed, run again, dropped, failed and the traceback kept, refused, broken, side by side; with results kept."""
    done = run("memory_cycles.py", str(tmp_path / "llama"), timeout=115)
    assert done.returncode == 0, done.stderr[-3_000:]
    found = {line["scene"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert sorted(found) == ["broken", "closed", "dropped", "refused", "run_again", "side_by_side", "traceback"]
    for name, line in found.items():
        for what in ("peak", "after"):
            first, last = (statistics.median(part) for part in (line[what][:5], line[what][-5:]))
            assert last - first <= TOLERANCE, f"{name}, {what}: memory grows {line[what]}"
        assert max(line["peak"]) - line["peak"][0] <= MODEL_MIB / 2, f"{name}: a second model was there {line['peak']}"
    for name in ("closed", "traceback", "refused", "side_by_side"):
        line = found[name]
        back = min(line["peak"]) - max(line["after"])
        assert back >= MODEL_MIB, f"{name}: {back} MiB came back, the model has {MODEL_MIB}"
    two, one = found["side_by_side"]["peak"][-1], found["closed"]["peak"][-1]
    assert MODEL_MIB - TOLERANCE < two - one < 2 * MODEL_MIB
    told = ", ".join(f"{name} {line['peak'][0]:.0f} to {line['peak'][-1]:.0f}" for name, line in found.items())
    with capsys.disabled():
        print(f"\npeak MiB in the first and the last of twenty cycles: {told}")


# ---- fork -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork() -> None:
    """A child is told at once, the parent goes on, and workers that leave the LLM alone do their work."""
    done = run("forks.py", timeout=110)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "ok", "")
