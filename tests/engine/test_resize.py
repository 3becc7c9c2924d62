"""`llm.resize_kv`: more or fewer KV blocks while requests run, and nobody's tokens change."""

import threading
import time
from typing import Any

import pytest

import embedllm
from embedllm.errors import EngineDead, InvalidRequest, OutOfMemory
from embedllm.testing import ScriptedModel
from tests.engine import tiny_models
from tests.engine.equality import judge
from tests.engine.faultlab import Lab
from tests.engine.hooked import Hooked, HookedRunner, engine_of, opened, prompt_of, right, until

DEEP = pytest.mark.parametrize("depth", [1, 2])


@DEEP
def test_requests_go_on_in_a_cache_of_another_size(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRunner, "depth", depth)
    model = Hooked(delay=0.001)
    with opened(model, num_kv_blocks=200, max_num_seqs=8) as llm:
        asked = [llm.submit(prompt_of(number, 5 + number), max_tokens=60, n=1 + number % 3) for number in range(12)]
        for num_blocks in (60, 300, 40, 300):
            until(lambda: llm.stats().num_requests_running > 2)
            llm.resize_kv(num_kv_blocks=num_blocks)
            assert llm.stats().num_kv_blocks == num_blocks
        for number, one in enumerate(asked):
            for output in one.result().outputs:
                assert output.tokens == model.expected(prompt_of(number, 5 + number), 60)
        assert llm.stats().num_step_faults == 0
        right(llm, model)


@DEEP
def test_what_does_not_fit_any_more_is_refused_and_nothing_changes(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRunner, "depth", depth)
    model = Hooked(delay=0.001)
    with opened(model, num_kv_blocks=200) as llm:
        long = llm.submit(prompt_of(1), max_tokens=200)
        with pytest.raises(
            InvalidRequest, match=r"may need 52 KV blocks, and there would be 51: wait for it, cancel it"
        ):
            llm.resize_kv(num_kv_blocks=51)
        assert llm.stats().num_kv_blocks == 200
        llm.resize_kv(num_kv_blocks=52)
        assert long.result().tokens == model.expected(prompt_of(1), 200)
        with pytest.raises(InvalidRequest, match="the cache has 52"):
            llm.generate(prompt_of(1), max_tokens=220)
        with pytest.raises(InvalidRequest, match="num_kv_blocks must be an integer of at least 1"):
            llm.resize_kv(num_kv_blocks=0)
        with llm.cache.pin(prompt_of(2, 20)), pytest.raises(InvalidRequest, match=r"unpin\(\)"):
            llm.resize_kv(num_kv_blocks=100)
        llm.resize_kv(num_kv_blocks=100)
        assert llm.stats().num_kv_blocks == 100


class Refusing(HookedRunner):
    """Gives no more than some blocks, and not even those after a while."""

    most = 100

    def resize(self, num_blocks: int) -> None:
        if num_blocks > self.most:
            raise OutOfMemory(f"{num_blocks} are too many")
        super().resize(num_blocks)


def test_where_there_is_no_memory_it_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked(delay=0.001)
    monkeypatch.setattr(model, "runner", lambda limits: Refusing(model, limits))
    with opened(model, num_kv_blocks=80) as llm:
        running = llm.submit(prompt_of(1), max_tokens=100)
        with pytest.raises(OutOfMemory, match="500 are too many"):
            llm.resize_kv(num_kv_blocks=500)
        assert llm.stats().num_kv_blocks == 80
        assert running.result().tokens == model.expected(prompt_of(1), 100)
        right(llm, model)


def test_a_cache_that_cannot_be_made_again_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked(delay=0.001)
    monkeypatch.setattr(model, "runner", lambda limits: Refusing(model, limits))
    with opened(model, num_kv_blocks=80) as llm:
        running = llm.submit(prompt_of(1), max_tokens=200)
        monkeypatch.setattr(Refusing, "most", 0)
        with pytest.raises(EngineDead, match="nor made again as it was"):
            llm.resize_kv(num_kv_blocks=70)
        with pytest.raises(EngineDead, match="nor made again as it was"):
            running.result(timeout=5)
        with pytest.raises(EngineDead):
            llm.generate(prompt_of(1), max_tokens=2)


def test_a_runner_without_resize_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRunner, "resize", None)
    with opened(Hooked(), num_kv_blocks=80) as llm, pytest.raises(InvalidRequest, match="has no resize"):
        llm.resize_kv(num_kv_blocks=70)


def test_parked_requests_stay_parked_and_watchers_are_told() -> None:
    lab = Lab()
    told = [lab.submit(prompt_of(number), 8, n=1 + number) for number in range(3)]
    lab.step()
    lab.step()
    lab.engine.park(1)
    seen: list[Any] = []
    lab.engine.attach(seen)
    lab.engine.resize(lab.engine.limits.__class__(**{**vars_of(lab.engine.limits), "num_blocks": 90}))
    start = seen.index(("resize", 90))
    assert [event[0] for event in seen[start + 1 :]].count("queue") == 6 and ("park", 1) in seen[start + 1 :]
    for _ in range(30):
        lab.step()
    assert told[0].ended is not None and told[2].ended is not None and told[1].ended is None
    lab.engine.resume(1)
    lab.run()
    lab.check()


def vars_of(limits: Any) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in limits.__dataclass_fields__}


def test_from_many_threads_at_once() -> None:
    """Whatever they ask, the engine ends with what one of them asked, and everybody knows which."""
    model = Hooked()
    with opened(model, num_kv_blocks=100) as llm:
        sizes = [60 + 10 * number for number in range(8)]
        threads = [threading.Thread(target=llm.resize_kv, kwargs={"num_kv_blocks": size}) for size in sizes]
        asked = [llm.submit(prompt_of(number), max_tokens=50) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, one in enumerate(asked):
            assert one.result().tokens == model.expected(prompt_of(number), 50)
        assert llm._core is not None
        assert llm.stats().num_kv_blocks == llm._core.limits.num_blocks == engine_of(llm).limits.num_blocks
        assert llm._core.limits.num_blocks in sizes


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_a_real_model_gives_the_same_tokens_and_memory_moves(name: str) -> None:
    prompts = [[3 + number, 5, 8, 13 + number] * 3 for number in range(6)]
    params = embedllm.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    options = {"dtype": "float32", "tokenizer": None, "max_model_len": 64, "progress": False, "block_size": 4}
    with embedllm.LLM(tiny_models.folder(name), num_kv_blocks=400, **options) as llm:
        before = llm.memory().kv_cache
        asked = [llm.submit(prompt, params) for prompt in prompts]
        after = llm.resize_kv(num_kv_blocks=100).kv_cache
        answers = [one.result().tokens for one in asked]
        assert after * 4 == before and llm.memory().kv_cache == after
        assert llm.resize_kv("1MiB").kv_cache <= 2**20
        assert llm.resize_kv().kv_cache > 0
    verdict = judge(name, prompts, answers, 24)
    assert not verdict.wrong and len(verdict.ties) <= 1


def test_the_context_follows_what_fits() -> None:
    with embedllm.LLM(num_kv_blocks=20, progress=False) as llm, embedllm.LLM(num_kv_blocks=20, progress=False) as other:
        assert llm.info.max_model_len == 320
        llm.resize_kv(num_kv_blocks=10)
        assert llm.info.max_model_len == other.info.max_model_len == 160
        with pytest.raises(InvalidRequest, match="max_model_len=160"):
            other.generate([1] * 100, max_tokens=100)
        llm.resize_kv(num_kv_blocks=1_000)
        assert other.info.max_model_len == 2_048
        assert len(other.generate([5] * 300, max_tokens=8, ignore_eos=True).tokens) == 8
    assert llm.info.max_model_len == 2_048
    with embedllm.LLM(num_kv_blocks=40, max_model_len=512, progress=False) as llm:
        with pytest.raises(OutOfMemory, match="max_model_len=512 needs"):
            llm.resize_kv(num_kv_blocks=20)
        assert llm.stats().num_kv_blocks == 40


def test_an_idle_stream_goes_on_after_it() -> None:
    """What a reader has not read yet is not lost."""
    with opened(ScriptedModel(["abcdefghij" * 4]), num_kv_blocks=64, tokenizer=embedllm.testing.ByteTokenizer()) as llm:
        stream = iter(llm.stream("x", max_tokens=40))
        text = next(stream).text
        llm.resize_kv(num_kv_blocks=32)
        time.sleep(0.01)
        text += "".join(delta.text for delta in stream)
        assert text == "abcdefghij" * 4
