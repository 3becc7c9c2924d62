"""The public contract, line by line: what design and documentation promise of LLM, Generation and Completion."""

import asyncio
import collections.abc
import dataclasses
import gc
import inspect
import io
import math
import sys
import threading
import time
from typing import Any

import pytest

import embedllm
from embedllm import Completion, Delta, SamplingParams, worker
from embedllm.config import Limits
from embedllm.errors import (
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    RequestCancelled,
    RequestFailed,
    RequestTooLong,
    UnknownOption,
)
from embedllm.testing import ByteTokenizer, HashLM, ScriptedModel
from tests.engine.hooked import LONG, Hooked, assert_idle, engine_of, opened, prompt_of, right, until

BYTES = ByteTokenizer()


def scripted(*replies: str, **options: Any) -> embedllm.LLM:
    return embedllm.LLM(ScriptedModel(list(replies)), tokenizer=BYTES, **options)


# ---- what a prompt is -------------------------------------------------------------------------------------------


def test_one_prompt_gives_a_completion_and_a_list_gives_a_list_in_order() -> None:
    def echo(prompt: list[int]) -> list[int]:
        return prompt[-2:]

    message = [{"role": "user", "content": "hi"}]
    with embedllm.LLM(ScriptedModel(echo), tokenizer=BYTES) as llm:
        assert isinstance(llm.generate("abc"), Completion) and llm.generate("abc").text == "bc"
        assert llm.generate([97, 98, 99]).text == "bc"
        assert llm.generate((97, 98, 99)).text == "bc"  # type: ignore[call-overload]
        assert isinstance(llm.generate(message), Completion)
        assert [c.text for c in llm.generate(["abc", "xyz"])] == ["bc", "yz"]
        assert [c.text for c in llm.generate([[97, 98], [99, 100]])] == ["ab", "cd"]
        assert [c.text for c in llm.generate(["abc", [99, 100]])] == ["bc", "cd"]  # type: ignore[list-item]
        assert [type(c) for c in llm.generate([message, message])] == [Completion, Completion]
        assert [c.text for c in llm.generate(["abc"])] == ["bc"]
        assert llm.generate([]) == []  # type: ignore[comparison-overlap]
        assert llm.chat(message).tokens == llm.generate(message).tokens
        assert "".join(delta.text for delta in llm.stream(message)) == llm.submit(message).result().text


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [[]],
        [""],
        ["a", ""],
        None,
        5,
        1.5,
        b"abc",
        {"role": "user"},
        [None],
        [1, None],
        [1, "a"],
        [[1], 2],
        ["a", 3],
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_and_nothing_is_queued(prompt: Any) -> None:
    with scripted("yes") as llm:
        with pytest.raises(InvalidRequest):
            llm.generate(prompt)
        assert_idle(llm)
        assert llm.generate("x").text == "yes"


@pytest.mark.parametrize("call", ["submit", "stream"])
@pytest.mark.parametrize("prompt", ["", [], [""], ["a", "b"], [[1, 2]], [[]]], ids=repr)
def test_submit_and_stream_take_one_prompt(call: str, prompt: Any) -> None:
    with scripted("yes") as llm, pytest.raises(InvalidRequest):
        getattr(llm, call)(prompt)


def test_without_a_tokenizer_ids_go_in_and_ids_come_out() -> None:
    model = HashLM(eos_every=0)
    with embedllm.LLM(model) as llm:
        completion = llm.generate([1, 2, 3], max_tokens=5)
        assert (completion.text, completion.tokens) == ("", model.expected([1, 2, 3], 5))
        assert "".join(delta.text for delta in llm.stream([1, 2, 3], max_tokens=5)) == ""
        for call in (
            lambda: llm.generate("text"),
            lambda: llm.generate([1], stop="x"),
            lambda: llm.generate([1], bad_words=["x"]),
            lambda: llm.tokenize("x"),
            lambda: llm.detokenize([1]),
            lambda: llm.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(InvalidRequest, match="tokenizer"):
                call()


def test_text_helpers() -> None:
    with scripted("yes") as llm:
        assert llm.tokenize("aé") == [97, 195, 169] and llm.detokenize([97, 195, 169]) == "aé"
        assert llm.count_tokens("abc") == llm.count_tokens([1, 2, 3]) == 3
        assert llm.count_tokens([{"role": "user", "content": "abc"}]) > 3
        with pytest.raises(InvalidRequest, match="out of range"):
            llm.detokenize([259])


# ---- parameters -------------------------------------------------------------------------------------------------


def test_keywords_beside_params_replace_its_fields() -> None:
    model = Hooked()
    with opened(model) as llm:
        params = SamplingParams(max_tokens=3, logprobs=0)
        assert len(llm.generate(prompt_of(1), params).tokens) == 3
        completion = llm.generate(prompt_of(1), params, max_tokens=5)
        assert len(completion.tokens) == 5 and completion.logprobs is not None
        assert params.max_tokens == 3
        with pytest.raises(dataclasses.FrozenInstanceError):
            params.max_tokens = 4  # type: ignore[misc]


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(UnknownOption, match="max_tokens"):
        SamplingParams(max_token=3)
    with pytest.raises(UnknownOption, match="block_size"):
        embedllm.LLM(Hooked(), blocksize=3)
    with opened() as llm, pytest.raises(UnknownOption, match="temperature"):
        llm.generate([1], temprature=3)


def test_params_may_be_one_per_prompt() -> None:
    model = Hooked()
    with opened(model) as llm:
        each = [SamplingParams(max_tokens=n) for n in (2, 4)]
        assert [len(c.tokens) for c in llm.generate([[1], [2]], each)] == [2, 4]
        with pytest.raises(InvalidRequest, match="2 prompts and 1"):
            llm.generate([[1], [2]], each[:1])
        with pytest.raises(InvalidRequest, match="one SamplingParams"):
            llm.generate([1], each)  # type: ignore[call-overload]


def test_max_tokens_is_what_was_asked_or_what_fits() -> None:
    model = Hooked()
    with opened(model, max_model_len=64) as llm:
        assert len(llm.generate(prompt_of(1, 10)).tokens) == 54  # the default of 256, as far as it fits
        assert len(llm.generate(prompt_of(1, 10), max_tokens=None).tokens) == 54
        assert len(llm.generate(prompt_of(1, 10), max_tokens=54).tokens) == 54
        for length, most in ((10, 55), (64, 1), (100, 1)):
            with pytest.raises(RequestTooLong, match="64"):
                llm.submit(prompt_of(1, length), max_tokens=most)
        with pytest.raises(RequestTooLong):
            llm.submit(prompt_of(1, 64))
    with opened(model, num_kv_blocks=8) as llm:  # 32 slots, the last token of a request needs none
        assert len(llm.generate(prompt_of(1, 10), max_tokens=23).tokens) == 23
        assert len(llm.generate(prompt_of(1, 10), max_tokens=None).tokens) == 23
        with pytest.raises(RequestTooLong, match="9 KV blocks of 4; the cache has 8"):
            llm.submit(prompt_of(1, 10), max_tokens=24)
    with embedllm.LLM(Hooked()) as llm:
        assert len(llm.generate([1]).tokens) == 256


# ---- completions and deltas -------------------------------------------------------------------------------------


def test_fields_of_a_completion() -> None:
    with scripted("hello") as llm:
        completion = llm.generate("ab", logprobs=2, prompt_logprobs=1)
        assert completion.text == "hello" == str(completion)
        assert completion.tokens == [*b"hello", 258]  # the EOS is a token, and no text
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert (completion.usage.prompt_tokens, completion.usage.cached_tokens) == (2, 0)
        assert completion.usage.completion_tokens == 6
        timing = completion.timing
        assert 0 <= timing.queue <= timing.ttft <= timing.total and timing.decode >= 0
        assert math.isclose(timing.ttft + timing.decode, timing.total)
        assert completion.logprobs is not None and len(completion.logprobs) == 6
        for token, found in zip(completion.tokens, completion.logprobs, strict=True):
            assert (found[0].id, found[0].rank) == (token, 1)
            assert [p.rank for p in found] == [1, 2] and all(p.logprob <= 0 for p in found)
        assert completion.prompt_logprobs is not None
        assert completion.prompt_logprobs[0] is None and len(completion.prompt_logprobs) == 2
        assert (completion.parsed, completion.tool_calls, completion.reasoning) == (None, None, None)
        assert completion.outputs == (completion,) and completion.index == 0
        assert llm.generate("ab").logprobs is None and llm.generate("ab").prompt_logprobs is None


def test_ways_to_stop() -> None:
    with scripted("one two three") as llm:
        by_text = llm.generate("x", stop=["w", "thr"])
        assert (by_text.text, by_text.finish_reason, by_text.stop_reason) == ("one t", "stop", "w")
        assert bytes(by_text.tokens) == b"one tw"
        assert llm.generate("x", stop="wo", include_stop_str_in_output=True).text == "one two"
        by_id = llm.generate("x", stop_token_ids=[ord("t")])
        assert (by_id.text, by_id.finish_reason, by_id.stop_reason) == ("one ", "stop", ord("t"))
        assert bytes(by_id.tokens) == b"one t"  # the token is there, its text is not
        by_length = llm.generate("x", max_tokens=4)
        assert (by_length.text, by_length.finish_reason, by_length.stop_reason) == ("one ", "length", None)
        past_eos = llm.generate("x", max_tokens=20, ignore_eos=True)
        assert len(past_eos.tokens) == 20 and past_eos.finish_reason == "length"
        late = llm.generate("x", stop="o", min_tokens=5)
        assert late.text == "one tw"


def test_n_samples() -> None:
    model = Hooked(vocab_size=259)
    with opened(model, tokenizer=BYTES) as llm:
        completion = llm.generate(prompt_of(1), n=5, temperature=100.0, seed=3, max_tokens=6)
        assert [output.index for output in completion.outputs] == [0, 1, 2, 3, 4]
        assert completion.outputs[0] is completion
        assert len({tuple(output.tokens) for output in completion.outputs}) == 5
        assert completion.usage.completion_tokens == 30
        joined: dict[int, list[int]] = {}
        endings = collections.Counter[int]()
        for delta in llm.stream(prompt_of(1), n=5, temperature=100.0, seed=3, max_tokens=6):
            assert isinstance(delta, Delta)
            joined.setdefault(delta.index, []).extend(delta.tokens)
            endings[delta.index] += delta.finish_reason is not None
        assert [joined[i] for i in range(5)] == [output.tokens for output in completion.outputs]
        assert dict(endings) == dict.fromkeys(range(5), 1)
        greedy = llm.generate(prompt_of(1), n=3, max_tokens=6)
        assert [output.tokens for output in greedy.outputs] == [model.expected(prompt_of(1), 6)] * 3


def test_deltas_join_to_the_completion() -> None:
    """Whatever is held back (a stop string's beginning, half a character) comes, is cut, or is flushed at the end."""
    texts = ["plain", "naïve – ⸘ 🤦🏽‍♂️ e\u0301", "stop at STOP here", "half STO", "\ufffd", "a\n\nb", "é" * 50]
    with scripted(*texts) as llm:
        for text in texts:
            parameters: dict[str, Any] = {"stop": "STOP", "logprobs": 0}
            generation = llm.stream("x", **parameters)
            deltas = list(generation)
            completion = generation.result()
            assert completion.text == text.split("STOP")[0] == "".join(delta.text for delta in deltas)
            assert [token for delta in deltas for token in delta.tokens] == completion.tokens
            assert [entry for delta in deltas for entry in delta.logprobs or ()] == completion.logprobs
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
            assert deltas[-1].finish_reason == "stop"


def test_deltas_join_whatever_the_bytes_are() -> None:
    """Random bytes are mostly no UTF-8 at all."""
    model = Hooked(vocab_size=259, eos_every=25)
    with opened(model, tokenizer=BYTES) as llm:
        for number in range(40):
            generation = llm.stream(prompt_of(number), max_tokens=60)
            text = "".join(delta.text for delta in generation)
            assert text == generation.result().text == generation.text == BYTES.decode(generation.tokens)


# ---- iteration --------------------------------------------------------------------------------------------------


def test_a_cursor_is_plain_and_fresh_and_replays() -> None:
    model = Hooked()
    with opened(model) as llm:
        for generation in (llm.stream(prompt_of(1), max_tokens=8), llm.submit(prompt_of(1), max_tokens=8)):
            one, two = iter(generation), iter(generation)
            assert one is not two and iter(one) is one
            assert not inspect.isgenerator(one) and not inspect.isasyncgen(generation.__aiter__())
            assert isinstance(one, collections.abc.Iterator)
            assert isinstance(generation.__aiter__(), collections.abc.AsyncIterator)
            assert isinstance(generation, collections.abc.Awaitable)
            first = [token for delta in one for token in delta.tokens]
            assert first == [token for delta in two for token in delta.tokens] == model.expected(prompt_of(1), 8)
            assert list(one) == [] and next(one, None) is None
            assert [t for d in generation for t in d.tokens] == first  # again, after the end


def test_a_background_request_outlives_its_readers() -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        generation = llm.submit(prompt_of(1), max_tokens=40)
        for _ in generation:
            break
        with iter(generation) as cursor:
            next(cursor)
        assert next(cursor, None) is None  # that cursor is closed; the request is not
        asyncio.run(_first(generation))
        assert generation.result(5).tokens == model.expected(prompt_of(1), 40)


async def _first(generation: embedllm.Generation) -> None:
    async for _ in generation:
        break


def test_an_await_that_is_cancelled_leaves_a_background_request() -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        generation = llm.submit(prompt_of(1), max_tokens=40)

        async def main() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generation._wait(), 0.01)

        asyncio.run(main())
        assert not generation.done
        assert generation.result(5).tokens == model.expected(prompt_of(1), 40)


def test_what_a_handle_tells_while_it_runs() -> None:
    model = Hooked(delay=0.002, vocab_size=259)
    with opened(model, tokenizer=BYTES) as llm:
        generation = llm.submit(prompt_of(1), max_tokens=50, n=2)
        assert not generation.done and "running" in repr(generation)
        with pytest.raises(TimeoutError):
            generation.result(timeout=0.02)
        with pytest.raises(TimeoutError):
            generation.result(timeout=0)
        assert not generation.wait(0.001)
        until(lambda: len(generation.tokens) > 3)
        expected = model.expected(prompt_of(1), 50)
        tokens = generation.tokens
        assert tokens == expected[: len(tokens)]
        assert BYTES.decode(expected).startswith(generation.text.rstrip("\ufffd"))
        assert generation.prompt_tokens == prompt_of(1)
        assert generation.result(5).tokens == expected and generation.done
        assert generation.num_tokens == 100 and "length" in repr(generation)
        assert "length" in generation._repr_html_() and generation._repr_markdown_().startswith("```")


# ---- endings ----------------------------------------------------------------------------------------------------


def bad(prompt: list[int], output: list[int], logits: Any) -> Any:
    if len(output) == 3:
        raise ValueError("enough")
    return logits


@pytest.mark.parametrize("how", ["cancelled", "failed", "deadline"])
def test_every_way_to_read_raises_the_end_with_the_partial(how: str) -> None:
    kind: type[Exception] = {"cancelled": RequestCancelled, "failed": RequestFailed, "deadline": DeadlineExceeded}[how]
    model = Hooked(delay=0.003)
    with opened(model) as llm:
        options = {"failed": {"logits_processor": bad}, "deadline": {"deadline": 0.1}}.get(how, {})
        generation = llm.submit(prompt_of(1), max_tokens=LONG, **options)  # type: ignore[arg-type]
        if how == "cancelled":
            until(lambda: generation.tokens)
            generation.cancel()
        heard: list[BaseException] = []
        for read in (
            generation.result,
            lambda: list(generation),
            lambda: asyncio.run(generation._wait()),
            lambda: asyncio.run(_all(generation)),
        ):
            with pytest.raises(kind) as caught:
                read()
            heard.append(caught.value)
        assert len({id(error) for error in heard}) == 4  # nobody shares a traceback
        for error in heard:
            completion = error.completion  # type: ignore[attr-defined]
            assert completion.tokens and completion.tokens == model.expected(prompt_of(1), len(completion.tokens))
            assert completion.finish_reason == ("cancelled" if how == "cancelled" else "error")
            assert completion.usage.completion_tokens == len(completion.tokens)
            if how == "failed":
                assert isinstance(error.__cause__, ValueError)
        seen: list[int] = []
        with pytest.raises(kind):
            for delta in generation:
                seen += delta.tokens
        assert seen == generation.tokens  # all there is comes before the error


async def _all(generation: embedllm.Generation) -> None:
    async for _ in generation:
        pass


def test_a_list_waits_for_all_and_raises_the_first_error() -> None:
    model = Hooked()
    prompts = [prompt_of(number) for number in range(5)]
    with opened(model) as llm:
        each = [SamplingParams(max_tokens=6, logits_processor=bad if n in (1, 3) else None) for n in range(5)]
        with pytest.raises(RequestFailed) as caught:
            llm.generate(prompts, each)
        both = [caught.value.completions, llm.generate(prompts, each, return_exceptions=True)]
        for found in both:
            assert [type(one) for one in found] == [Completion, RequestFailed, Completion, RequestFailed, Completion]
            for number in (0, 2, 4):
                assert found[number].tokens == model.expected(prompts[number], 6)
            assert found[1].completion.tokens == model.expected(prompts[1], 3)
        assert caught.value is both[0][1]


def test_an_invalid_member_of_a_list() -> None:
    """It is refused at once, and what was queued is cancelled; with return_exceptions it stands in its place."""
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        with pytest.raises(InvalidRequest, match="out of range"):
            llm.generate([[1, 2], [10**6], [3]], max_tokens=LONG)
        assert_idle(llm)
        found: list[Any] = llm.generate([[1, 2], [10**6], [3]], max_tokens=4, return_exceptions=True)
        assert found[0].tokens == model.expected([1, 2], 4) and found[2].tokens == model.expected([3], 4)
        assert isinstance(found[1], InvalidRequest)


# ---- seeds ------------------------------------------------------------------------------------------------------

HOT: dict[str, Any] = {"temperature": 100.0, "max_tokens": 12}


def test_seeds() -> None:
    model = Hooked()
    with opened(model) as llm:
        unseeded = [llm.generate(prompt_of(1), **HOT).tokens for _ in range(4)]
        assert len(set(map(tuple, unseeded))) == 4
        seeded = llm.generate(prompt_of(1), seed=5, **HOT).tokens
        assert llm.generate(prompt_of(1), seed=5, **HOT).tokens == seeded
        assert llm.generate(prompt_of(1), seed=6, **HOT).tokens != seeded
        crowd = llm.generate([prompt_of(n % 3) for n in range(30)], seed=5, **HOT)
        assert [c.tokens for c in crowd[1::3]] == [seeded] * 10  # whatever else runs
        # An LLM of the same seed repeats the unseeded ones, by the number of their submission.
        again = embedllm.LLM(model, num_kv_blocks=512, block_size=4, max_batch_tokens=64)
        assert again._core is llm._core
        assert [again.generate(prompt_of(1), **HOT).tokens for _ in range(4)] == unseeded
        other = embedllm.LLM(model, num_kv_blocks=512, block_size=4, max_batch_tokens=64, seed=1)
        assert other.generate(prompt_of(1), **HOT).tokens not in unseeded
        again.close()
        other.close()


def test_a_refused_request_is_no_submission() -> None:
    model = Hooked()
    with opened(model) as one:
        first, second = (one.generate(prompt_of(1), **HOT).tokens for _ in range(2))
    with opened(model) as two:
        assert two.generate(prompt_of(1), **HOT).tokens == first
        for wrong in ({"max_tokens": 10**9}, {"stop": "x"}, {"allowed_token_ids": [10**6]}):
            with pytest.raises(InvalidRequest):
                two.generate(prompt_of(1), **(HOT | wrong))
        assert two.generate(prompt_of(1), **HOT).tokens == second


# ---- time -------------------------------------------------------------------------------------------------------


def test_a_deadline_counts_from_submit_also_in_the_queue() -> None:
    model = Hooked(delay=0.002)
    with opened(model, max_num_seqs=1) as llm:
        running = llm.submit(prompt_of(1), max_tokens=LONG)
        waiting = llm.submit(prompt_of(2), max_tokens=5, deadline=0.05)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s") as caught:
            waiting.result(5)
        assert time.monotonic() - began < 1
        assert caught.value.completion is not None and caught.value.completion.tokens == []
        assert isinstance(caught.value, RequestFailed)
        running.cancel()
        assert llm.generate(prompt_of(3), max_tokens=5, deadline=60.0).tokens == model.expected(prompt_of(3), 5)


def test_deadlines_that_were_met_are_forgotten() -> None:
    with opened() as llm:
        for _ in range(10):
            llm.generate([[n] for n in range(1, 60)], max_tokens=1, deadline=1e8)
        assert len(engine_of(llm)._deadlines) <= 2 * 60 + 64


def test_an_unread_stream_is_set_aside_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "READER_PATIENCE", 0.1)
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.02)
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        background = llm.submit(prompt_of(1), max_tokens=400)
        unread, read = llm.stream(prompt_of(2), max_tokens=300), llm.stream(prompt_of(3), max_tokens=400)
        following = threading.Thread(target=list, args=(read,))
        following.start()
        cursor = iter(unread)
        first = next(cursor)
        until(lambda: llm.stats().num_requests_parked == 1)
        stats = llm.stats()
        assert (stats.num_requests_running, stats.num_requests_waiting) == (2, 0)
        record = unread._channel.samples[0]  # looking at the handle would count as reading
        parked = record.num_tokens
        assert 0 < parked < 300
        time.sleep(0.05)
        assert record.num_tokens == parked, "it runs although nobody reads it"
        rest = [token for delta in cursor for token in delta.tokens]
        assert first.tokens + rest == model.expected(prompt_of(2), 300)
        following.join()
        assert read.result().tokens == model.expected(prompt_of(3), 400)  # was read all the time
        assert background.result().tokens == model.expected(prompt_of(1), 400)  # need not be read


def test_a_stream_that_is_polled_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "READER_PATIENCE", 0.05)
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.01)
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        polled = llm.stream(prompt_of(1), max_tokens=200)
        until(lambda: polled.done)
        assert polled.tokens == model.expected(prompt_of(1), 200)


def test_a_stream_left_before_the_engine_took_it_has_ended() -> None:
    model = Hooked(delay=0.05)
    with opened(model) as llm:
        llm.submit(prompt_of(1), max_tokens=20)
        generation = llm.stream(prompt_of(2), max_tokens=20)
        cursor = iter(generation)
        cursor._start()
        cursor.close()
        with pytest.raises(RequestCancelled):
            generation.result(timeout=10)


def test_pins_and_traces_end_with_their_handle_or_when_dropped() -> None:
    model = HashLM()
    prompt = prompt_of(1) * 8
    with embedllm.LLM(model, block_size=4) as other:  # keeps the engine alive
        engine = engine_of(other)
        llm = embedllm.LLM(model, block_size=4)
        pin, trace = llm.cache.pin(prompt), llm.trace()
        assert engine.scheduler.num_pinned and engine._recorders
        del pin, trace
        gc.collect()
        until(lambda: not engine.scheduler.num_pinned and not engine._recorders)
        pin, trace = llm.cache.pin(prompt), llm.trace()
        llm.close()
        until(lambda: not engine.scheduler.num_pinned and not engine._recorders)
        pin.unpin()
        trace.stop()
        assert other.generate(prompt, max_tokens=4).tokens == model.expected(prompt, 4)


def test_who_waits_long_is_not_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting in the queue, far longer than the patience: every kind of reader counts as one."""
    monkeypatch.setattr(worker, "READER_PATIENCE", 0.1)
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.02)
    monkeypatch.setattr("embedllm.generation.SLICE", 0.02)
    model = Hooked(delay=0.002)
    found: dict[str, list[int]] = {}
    with opened(model, max_num_seqs=1) as llm:
        ahead = llm.submit(prompt_of(1), max_tokens=200)

        async def read() -> list[int]:
            return [t async for d in llm.stream(prompt_of(2), max_tokens=5) for t in d.tokens]

        ways = {
            "generate": lambda: llm.generate(prompt_of(2), max_tokens=5).tokens,
            "list": lambda: llm.generate([prompt_of(2), prompt_of(2)], max_tokens=5)[1].tokens,
            "stream": lambda: [t for d in llm.stream(prompt_of(2), max_tokens=5) for t in d.tokens],
            "result": lambda: llm.stream(prompt_of(2), max_tokens=5).result().tokens,
            "async": lambda: asyncio.run(read()),
        }
        threads = [
            threading.Thread(target=lambda name=name, way=way: found.update({name: way()}))  # type: ignore[misc]
            for name, way in ways.items()
        ]
        for thread in threads:
            thread.start()
        most = 0
        while not ahead.done:
            most = max(most, llm.stats().num_requests_parked)
            time.sleep(0.01)
        for thread in threads:
            thread.join(5)
        assert most == 0 and found == dict.fromkeys(ways, model.expected(prompt_of(2), 5))


def test_a_request_that_is_set_aside_can_be_cancelled_and_can_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "READER_PATIENCE", 0.03)
    monkeypatch.setattr(worker, "SWEEP_SECONDS", 0.01)
    model = Hooked(delay=0.002)
    with opened(model) as llm:
        cancelled = llm.stream(prompt_of(1), max_tokens=LONG)
        expired = llm.stream(prompt_of(2), max_tokens=LONG, n=2, deadline=0.4)
        until(lambda: llm.stats().num_requests_parked == 3)
        steps = model.num_steps
        cancelled.cancel()
        until(lambda: cancelled.done)
        time.sleep(0.5)
        assert expired.done and model.num_steps == steps  # the engine slept, and woke for the deadline
        with pytest.raises(DeadlineExceeded):
            expired.result()


# ---- the queue --------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits.__init__, "__kwdefaults__", {**Limits.__init__.__kwdefaults__, "max_queued": 6})
    model = Hooked(delay=0.002)
    with opened(model, max_num_seqs=2) as llm:
        admitted = [llm.submit(prompt_of(number), max_tokens=20) for number in range(8)]
        began = time.monotonic()
        with pytest.raises(QueueFull, match="6"):
            llm.submit(prompt_of(9))
        with pytest.raises(QueueFull):
            llm.generate([prompt_of(9)])
        assert time.monotonic() - began < 0.1
        for number, generation in enumerate(admitted):
            assert generation.result(5).tokens == model.expected(prompt_of(number), 20)
        # A list longer than the queue goes in as there is room.
        found = llm.generate([prompt_of(number) for number in range(40)], max_tokens=3)
        assert [c.tokens for c in found] == [model.expected(prompt_of(number), 3) for number in range(40)]


def test_priority_goes_first() -> None:
    model = Hooked(delay=0.001)
    with opened(model, max_num_seqs=1) as llm:
        ahead = llm.submit(prompt_of(1), max_tokens=60)
        until(lambda: ahead.tokens)
        waiting = {priority: llm.submit(prompt_of(2), max_tokens=4, priority=priority) for priority in (5, 0, -3, 7)}
        last = llm.submit(prompt_of(2), max_tokens=4, priority=7)
        results = {priority: generation.result(5) for priority, generation in waiting.items()}
        queued = {priority: result.timing.queue for priority, result in results.items()}
        assert queued[-3] < queued[0] < queued[5] < queued[7] < last.result(5).timing.queue + 1e-3


# ---- the cache --------------------------------------------------------------------------------------------------


def test_explain_pin_and_reset() -> None:
    model = Hooked()
    with opened(model, num_kv_blocks=64) as llm:
        prompt = prompt_of(1, 22)  # five full blocks of four, and two tokens
        report = llm.cache.explain(prompt)
        assert (report.num_tokens, report.cached_tokens, len(report.blocks)) == (22, 0, 6)
        pin = llm.cache.pin(prompt)
        assert (pin.num_blocks, pin.num_tokens) == (5, 20)
        report = llm.cache.explain(prompt)
        assert report.cached_tokens == 20 and [block.hit for block in report.blocks] == [True] * 5 + [False]
        assert "20 of 22" in str(report) and llm.cache.explain(prompt, cache_salt="other").cached_tokens == 0
        llm.generate([prompt_of(number, 40) for number in range(2, 40)], max_tokens=20)  # more than the cache holds
        assert llm.cache.explain(prompt).cached_tokens == 20
        completion = llm.generate(prompt, max_tokens=5)
        assert completion.usage.cached_tokens == 20 and completion.tokens == model.expected(prompt, 5)
        pin.unpin()
        pin.unpin()
        assert llm.stats().kv_cache_usage == 0
        llm.cache.reset()
        assert llm.cache.explain(prompt).cached_tokens == 0 and llm.stats().num_kv_blocks_cached == 0
        with llm.cache.pin(prompt, cache_salt="a"):
            assert llm.cache.explain(prompt, cache_salt="a").cached_tokens == 20
            assert llm.stats().kv_cache_usage > 0


def test_pins_take_half_the_pool_at_most() -> None:
    model = Hooked()
    with opened(model, num_kv_blocks=32) as llm:
        with llm.cache.pin(prompt_of(1, 40)), llm.cache.pin(prompt_of(2, 24)):
            with pytest.raises(InvalidRequest, match="at most half"):
                llm.cache.pin(prompt_of(3, 4))
            with llm.cache.pin(prompt_of(1, 40)):  # what is pinned already costs nothing more
                pass
            # Who cannot run beside the pins is told so when it asks, not when it waits.
            with pytest.raises(RequestTooLong, match="16 of them pinned"):
                llm.submit(prompt_of(4, 40), max_tokens=40)
            right(llm, model)
        with pytest.raises(InvalidRequest, match="full blocks"):
            llm.cache.pin(prompt_of(1, 3))
    with opened(model, prefix_caching=False) as llm, pytest.raises(InvalidRequest, match="prefix_caching"):
        llm.cache.pin(prompt_of(1, 40))


def test_a_pin_that_would_starve_an_admitted_request_is_refused() -> None:
    model = Hooked(delay=0.002)
    with opened(model, num_kv_blocks=32) as llm:
        large = llm.submit(prompt_of(1, 60), max_tokens=60)
        with pytest.raises(InvalidRequest, match="admitted request"):
            llm.cache.pin(prompt_of(2, 20))
        large.cancel()
        llm.cache.pin(prompt_of(2, 20)).unpin()


# ---- look -------------------------------------------------------------------------------------------------------


def test_stats_have_vllms_names() -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        assert dataclasses.is_dataclass(llm.stats())
        running = llm.submit(prompt_of(1, 10), max_tokens=60)
        until(lambda: running.tokens)
        stats = llm.stats()
        assert stats.num_requests_running == 1 and stats.kv_cache_usage > 0
        assert 0 <= stats.kv_cache_waste < 1 and stats.num_kv_blocks == 512
        running.result()
        llm.generate(prompt_of(1, 10), max_tokens=3)
        stats = llm.stats()
        assert (stats.prompt_tokens, stats.generation_tokens) == (20, 63)
        assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 8)
        assert stats.request_finished == {"length": 2}
        assert stats.time_to_first_token.count == stats.e2e_request_latency.count == stats.queue_time.count == 2
        assert 0 < stats.time_to_first_token.p50 <= stats.e2e_request_latency.p99


def test_info_and_memory() -> None:
    with scripted("x") as llm:
        info = llm.info
        assert (info.model, info.vocab_size, info.max_model_len, info.device) == ("scripted", 259, 2_048, "cpu")
        assert info.chat_template is not None and info.dtype == "float32"
        memory = llm.memory()
        names = {field.name for field in dataclasses.fields(memory)}
        assert names >= {"weights", "kv_cache", "workspace", "free", "note"}
        assert "scripted" in repr(llm)


def test_trace_records_and_stops() -> None:
    model = Hooked()
    with opened(model) as llm:
        with llm.trace() as trace:
            llm.generate(prompt_of(1, 9), max_tokens=4)
        counts = trace.counts()
        assert counts["admit"] == counts["finish"] == counts["queue"] == 1 and counts["step"] >= 4
        recorded = len(trace)
        llm.generate(prompt_of(2), max_tokens=4)
        trace.stop()
        assert len(trace) == recorded == len(list(trace)) and trace.num_lost == 0
        small = llm.trace(capacity=5)
        llm.generate(prompt_of(2), max_tokens=4)
        small.stop()
        assert len(small) == 5 and small.num_lost > 0


def test_a_trace_can_be_read_while_it_grows() -> None:
    model = Hooked()
    with opened(model) as llm, llm.trace() as trace:
        running = llm.submit(prompt_of(1), max_tokens=100)
        while not running.done:
            events = list(trace)
            assert len(events) <= trace.num_recorded
        assert trace.counts()["finish"] == 1


# ---- quiet ------------------------------------------------------------------------------------------------------


def test_a_bar_appears_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Hooked(delay=0.001)
    prompts = [prompt_of(number) for number in range(6)]
    for progress, shown in ((None, False), (False, False), (True, True)):
        with opened(model, progress=progress) as llm:
            llm.generate(prompts, max_tokens=5)
            llm.generate(prompts[0], max_tokens=5)
        out, err = capsys.readouterr()
        assert out == "" and bool(err) is shown, err
    assert "generating" in err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with opened(model) as llm:
        llm.generate(prompts, max_tokens=300)
        assert "tok/s" in sys.stderr.getvalue() and "KV" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_left_of_a_bar_whose_list_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Hooked(delay=0.001)
    with opened(model) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(embedllm.LLM, "_wait_all", lambda self, generations: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                llm.generate([prompt_of(number) for number in range(5)], max_tokens=LONG)
        assert_idle(llm)


@pytest.mark.serial
def test_an_idle_engine_uses_no_cpu() -> None:
    """Over two seconds, with a handle, a parked request and a pin around."""
    model = Hooked()
    with opened(model) as llm:
        right(llm, model)
        pin = llm.cache.pin(prompt_of(1, 20))
        engine_of(llm).stats()
        kept = llm.submit(prompt_of(3), max_tokens=4)
        kept.result()
        time.sleep(0.1)
        began, steps = time.process_time(), model.num_steps
        time.sleep(2.0)
        used = time.process_time() - began
        assert used < 0.02, f"{used:.3f} s of CPU in 2 s of nothing"
        assert model.num_steps == steps
        pin.unpin()


@pytest.mark.serial
def test_readers_that_wait_use_next_to_no_cpu() -> None:
    """32 threads and 32 tasks that wait for a request which says nothing: a few wakes per second each."""
    model = Hooked()
    with opened(model, max_num_seqs=1) as llm:
        go_on = threading.Event()
        model.before = lambda plan: go_on.wait(20)
        try:
            blocked = llm.submit(prompt_of(1), max_tokens=3)
            threads = [threading.Thread(target=blocked.wait) for _ in range(32)]

            async def wait() -> None:
                await asyncio.gather(*(blocked._wait() for _ in range(32)))

            threads.append(threading.Thread(target=lambda: asyncio.run(wait())))
            for thread in threads:
                thread.start()
            time.sleep(0.2)
            began = time.process_time()
            time.sleep(2.0)
            used = (time.process_time() - began) / 2
        finally:
            go_on.set()
        for thread in threads:
            thread.join(5)
        assert used < 0.1, f"{used:.0%} of a core"


def test_a_paused_engine_runs_as_many_steps_as_it_is_told() -> None:
    """Cancelling works meanwhile, and whoever goes on says the same tokens."""
    model = Hooked()
    with opened(model) as llm:
        engine = engine_of(llm)
        worker = llm._core.worker  # type: ignore[union-attr]
        worker.call(lambda engine: setattr(engine, "steps_left", 0))
        first, second = (llm.submit(prompt_of(number), max_tokens=9) for number in (1, 2))
        for steps in (1, 3):
            done = model.num_steps
            worker.call(lambda engine, steps=steps: setattr(engine, "steps_left", steps))
            until(lambda: engine.steps_left == 0)
            worker.call(lambda engine: None)
            assert model.num_steps == done + steps
        assert not first.done and first.num_tokens == 4
        second.cancel()
        until(lambda: second.done)
        assert model.num_steps == 4
        worker.call(lambda engine: setattr(engine, "steps_left", None))
        assert first.result().tokens == model.expected(prompt_of(1), 9)
