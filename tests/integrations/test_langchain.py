"""The LangChain models on the real engine: what is in flight, what ends a request, what a chunk holds, what is told."""

import asyncio
import copy
import gc
import operator
import pickle
import time
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.rate_limiters import InMemoryRateLimiter
from pydantic import BaseModel

import embedllm
from embedllm import errors
from embedllm.testing import ByteTokenizer, ScriptedModel
from langchain_embedllm import ChatEmbedLLM, EmbedLLM
from tests.integrations import oracle
from tests.integrations.engines import CountingLLM, ended, endless, peak

NUM = 40
ENOUGH = 32  # of NUM that must be in flight together
BOX = str(Path(embedllm.__file__).parent / "demo" / "model")


@pytest.fixture(scope="module")
def llm() -> Iterator[embedllm.LLM]:
    model = oracle.model()
    with embedllm.LLM(model, tokenizer=model.tokenizer) as opened:
        yield opened


@pytest.fixture
def chat(llm: embedllm.LLM) -> ChatEmbedLLM:
    return ChatEmbedLLM(llm=llm)


class Recorder(BaseCallbackHandler):
    """What one run told its callbacks, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.about: dict[UUID, dict[str, Any]] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **about: Any) -> None:
        self.about[run_id] = about
        self.told.append(("start", messages[0][-1].content))

    def on_llm_start(self, serialized: Any, prompts: list[str], **about: Any) -> None:
        self.told.append(("start", prompts[0]))

    def on_llm_new_token(self, token: Any, **about: Any) -> None:
        self.told.append(("token", token))

    def on_llm_end(self, response: Any, **about: Any) -> None:
        self.told.append(("end", response.generations[0][0].text))

    def on_llm_error(self, error: BaseException, **about: Any) -> None:
        self.told.append(("error", type(error).__name__))


# ---- in flight ------------------------------------------------------------------------------------------------


def bound(model: ChatEmbedLLM) -> Any:
    return model.bind(temperature=0.0)


def chain(model: ChatEmbedLLM) -> Any:
    return ChatPromptTemplate.from_messages([("user", "{input}")]) | model | StrOutputParser()


MANY: dict[str, Callable[[ChatEmbedLLM, list[str]], Any]] = {
    "batch": lambda model, asked: model.batch(asked),
    "batch_as_completed": lambda model, asked: list(model.batch_as_completed(asked)),
    "bound": lambda model, asked: bound(model).batch(asked),
    "bound_as_completed": lambda model, asked: list(bound(model).batch_as_completed(asked)),
    "chain": lambda model, asked: chain(model).batch([{"input": one} for one in asked]),
    "generate": lambda model, asked: model.generate([[HumanMessage(one)] for one in asked]),
    "abatch": lambda model, asked: asyncio.run(model.abatch(asked)),
    "achain": lambda model, asked: asyncio.run(chain(model).abatch([{"input": one} for one in asked])),
    "agenerate": lambda model, asked: asyncio.run(model.agenerate([[HumanMessage(one)] for one in asked])),
}


@pytest.mark.parametrize("verb", MANY)
def test_a_batch_is_in_flight_at_once(verb: str) -> None:
    with CountingLLM(open_after=NUM) as llm, peak(llm) as most:
        MANY[verb](ChatEmbedLLM(llm=llm), [f"Question {i}" for i in range(NUM)])
        assert most() >= ENOUGH


@pytest.mark.parametrize("verb", ["batch", "abatch"])
def test_completions_are_in_flight_at_once(verb: str) -> None:
    with CountingLLM(open_after=NUM) as llm, peak(llm) as most:
        texts = MANY[verb](EmbedLLM(llm=llm), [f"Question {i}" for i in range(NUM)])
        assert texts == ["Yes."] * NUM
        assert most() >= ENOUGH


@pytest.mark.parametrize("verb", ["batch", "batch_as_completed", "abatch"])
def test_max_concurrency_is_honoured(verb: str) -> None:
    asked: Any = [f"Question {i}" for i in range(12)]
    config: Any = {"max_concurrency": 3}
    with CountingLLM(open_after=3) as llm, peak(llm) as most:
        model = ChatEmbedLLM(llm=llm)
        if verb == "abatch":
            answers = asyncio.run(model.abatch(asked, config))
        elif verb == "batch":
            answers = model.batch(asked, config)
        else:
            answers = [answer for _, answer in model.batch_as_completed(asked, config)]
        assert [answer.content for answer in answers] == ["Yes."] * 12
        assert most() == 3


def test_answers_come_in_the_order_of_the_inputs(chat: ChatEmbedLLM) -> None:
    asked: Any = ["Tell a joke." if i % 3 == 0 else f"Hello {i}" for i in range(10)]
    answers = [message.content for message in chat.batch(asked)]
    assert [answer != oracle.GREETING for answer in answers] == [i % 3 == 0 for i in range(10)]
    completed = dict(chat.batch_as_completed(asked))
    assert [completed[i].content for i in range(10)] == answers
    assert [found[0].text for found in chat.generate([[HumanMessage(one)] for one in asked]).generations] == answers


def test_each_run_of_a_batch_tells_its_own_callbacks(chat: ChatEmbedLLM) -> None:
    recorders = [Recorder() for _ in range(5)]
    ids = [uuid4() for _ in recorders]
    configs: Any = [
        {"callbacks": [one], "run_name": f"run {i}", "tags": [f"tag {i}"], "metadata": {"number": i}, "run_id": ids[i]}
        for i, one in enumerate(recorders)
    ]
    asked: Any = [f"Hello {i}" for i in range(5)]
    chat.batch(asked, configs)
    for i, one in enumerate(recorders):
        assert one.told == [("start", f"Hello {i}"), ("end", oracle.GREETING)]
        ((run_id, about),) = one.about.items()
        assert run_id == ids[i]
        assert (about["name"], about["tags"], about["metadata"]["number"]) == (f"run {i}", [f"tag {i}"], i)


def test_a_failed_input_takes_its_place_or_is_raised(llm: embedllm.LLM, chat: ChatEmbedLLM) -> None:
    recorders = [Recorder() for _ in range(3)]
    configs: Any = [{"callbacks": [one]} for one in recorders]
    asked: Any = ["Hello", "x" * 20_000, "Hello again"]
    first, second, third = chat.batch(asked, configs, return_exceptions=True)
    assert (first.content, third.content) == (oracle.GREETING, oracle.GREETING)
    assert type(second) is errors.RequestTooLong
    assert [one.told[-1][0] for one in recorders] == ["end", "error", "end"]
    with pytest.raises(errors.RequestTooLong):
        chat.batch(asked)
    with pytest.raises(errors.RequestTooLong):
        chat.generate([[HumanMessage(one)] for one in asked])
    with pytest.raises(ValueError, match="Invalid input type"):
        chat.batch(["Hello", object()])  # type: ignore[list-item]
    assert llm.stats().num_requests_running == 0


def test_an_empty_batch_is_empty(chat: ChatEmbedLLM) -> None:
    assert chat.batch([]) == []
    assert list(chat.batch_as_completed([])) == []
    assert chat.generate([]).generations == []


def test_leaving_a_batch_cancels_the_rest() -> None:
    with endless() as llm:
        model = ChatEmbedLLM(llm=llm, max_tokens=10_000)
        asked: Any = ["long", "long", "x" * 20_000]
        with pytest.raises(errors.RequestTooLong) as caught:
            model.batch(asked)
        assert ended(llm) == {"cancelled": 2}  # though the error is kept, and its traceback with it
        assert caught.value
        answers: Any = model.batch_as_completed(["long", "short", "long"])
        index, answer = next(answers)
        answers.close()
        assert (index, answer.content) == (1, "Yes.")
        assert ended(llm) == {"cancelled": 4, "stop": 1}


def test_a_cache_and_a_rate_limiter_keep_their_say(llm: embedllm.LLM) -> None:
    cached = ChatEmbedLLM(llm=llm, cache=InMemoryCache())
    cached.invoke("Hello")
    before = llm.stats().request_finished["stop"]
    assert [one.content for one in cached.batch(["Hello"] * 4)] == [oracle.GREETING] * 4
    assert cached.generate([[HumanMessage("Hello")]] * 3).generations[2][0].text == oracle.GREETING
    assert llm.stats().request_finished["stop"] == before
    limiter = CountingLimiter(requests_per_second=1_000, max_bucket_size=1_000)
    ChatEmbedLLM(llm=llm, rate_limiter=limiter).batch(["Hello"] * 4)
    assert limiter.num_acquired == 4


class CountingLimiter(InMemoryRateLimiter):
    num_acquired = 0

    def acquire(self, *, blocking: bool = True) -> bool:
        self.num_acquired += 1
        return True


# ---- endings --------------------------------------------------------------------------------------------------


def test_closing_a_stream_cancels() -> None:
    with endless() as llm:
        for model in (ChatEmbedLLM(llm=llm, max_tokens=10_000), EmbedLLM(llm=llm, max_tokens=10_000)):
            stream: Any = model.stream("Go on")
            next(stream)
            stream.close()
            for _ in model.stream("Go on"):
                break
        assert ended(llm) == {"cancelled": 4}


async def test_closing_an_async_stream_cancels() -> None:
    with endless() as llm:
        for model in (ChatEmbedLLM(llm=llm, max_tokens=10_000), EmbedLLM(llm=llm, max_tokens=10_000)):
            stream: Any = model.astream("Go on")
            await anext(stream)
            await stream.aclose()
        assert ended(llm) == {"cancelled": 2}


async def test_leaving_an_async_stream_cancels() -> None:
    with endless() as llm:
        async for _ in ChatEmbedLLM(llm=llm, max_tokens=10_000).astream("Go on"):
            break
        gc.collect()
        await asyncio.sleep(0)  # the loop closes what was dropped
        await asyncio.sleep(0)
        assert await asyncio.to_thread(ended, llm) == {"cancelled": 1}


@pytest.mark.parametrize("verb", ["ainvoke", "abatch", "astream", "achain"])
async def test_cancelling_a_task_cancels(verb: str) -> None:
    with endless() as llm:
        model = ChatEmbedLLM(llm=llm, max_tokens=10_000)
        started = asyncio.Event()

        class Started(AsyncCallbackHandler):
            async def on_chat_model_start(self, *args: Any, **about: Any) -> None:
                asyncio.get_running_loop().call_soon(started.set)

        async def run() -> None:
            config: Any = {"callbacks": [Started()]}
            if verb == "ainvoke":
                await model.ainvoke("Go on", config)
            elif verb == "abatch":
                await model.abatch(["Go on", "And on"], config)
            elif verb == "achain":
                await chain(model).ainvoke({"input": "Go on"}, config)
            else:
                async for _ in model.astream("Go on", config):
                    pass

        task = asyncio.create_task(run())
        await started.wait()
        while not llm.stats().num_requests_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        found = await asyncio.to_thread(ended, llm)
        assert set(found) == {"cancelled"}


# ---- what an answer holds -------------------------------------------------------------------------------------


def test_usage_and_metadata(llm: embedllm.LLM, chat: ChatEmbedLLM) -> None:
    question = "How many tokens are this?"
    message = chat.invoke(question)
    num_prompt = llm.count_tokens([{"role": "user", "content": question}])
    num_output = len(oracle.GREETING) + 1  # EOS
    usage = message.usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == num_prompt == chat.get_num_tokens_from_messages([HumanMessage(question)])
    assert usage["output_tokens"] == num_output
    assert usage["total_tokens"] == num_prompt + num_output
    assert usage["output_token_details"] == {"reasoning": 0}
    again = chat.invoke(question).usage_metadata
    assert again is not None
    assert again["input_token_details"]["cache_read"] == (num_prompt - 1) // 16 * 16
    about = message.response_metadata
    assert (about["model_name"], about["model_provider"], about["finish_reason"]) == ("scripted", "embedllm", "stop")
    times = about["timing"]
    assert set(times) == {"queue", "ttft", "decode", "total"}
    assert 0 < times["ttft"] <= times["total"]
    assert chat.invoke("Hello", max_tokens=3).response_metadata["finish_reason"] == "length"


def chunks_are_in_order(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    """One kind of content per chunk; usage and metadata once, on the last."""
    for chunk in chunks[:-1]:
        kinds = [bool(chunk.content), bool(chunk.tool_call_chunks), "reasoning_content" in chunk.additional_kwargs]
        assert sum(kinds) == 1
        assert chunk.usage_metadata is None
        assert not chunk.response_metadata
        assert chunk.chunk_position is None
    last = chunks[-1]
    assert last.chunk_position == "last"
    assert not last.content
    assert not last.tool_call_chunks
    assert last.usage_metadata is not None
    assert len({chunk.id for chunk in chunks}) == 1
    return reduce(operator.add, chunks)


async def test_chunks_sum_to_the_message(chat: ChatEmbedLLM) -> None:
    whole = chat.invoke("Hello")
    streamed = chunks_are_in_order(list(chat.stream("Hello")))
    streamed_async = chunks_are_in_order([chunk async for chunk in chat.astream("Hello")])
    for found in (streamed, streamed_async):
        assert found.content == whole.content == oracle.GREETING
        assert found.usage_metadata is not None
        assert whole.usage_metadata is not None
        assert found.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
        assert found.response_metadata.keys() == whole.response_metadata.keys()


def test_reasoning_stands_beside_the_answer(chat: ChatEmbedLLM) -> None:
    thinking = ChatEmbedLLM(llm=chat.llm, chat_template_kwargs={"enable_thinking": True})
    whole = thinking.invoke("Hello")
    full = chunks_are_in_order(list(thinking.stream("Hello")))
    for message in (whole, full):
        assert message.additional_kwargs["reasoning_content"].strip() == "The user wants an answer."
        assert message.text.strip() == oracle.GREETING
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
        assert message.usage_metadata is not None
        num = len(message.additional_kwargs["reasoning_content"])
        assert message.usage_metadata["output_token_details"] == {"reasoning": num}
    assert "reasoning_content" not in chat.invoke("Hello").additional_kwargs


def test_a_tool_call_is_a_chunk_of_its_own(chat: ChatEmbedLLM) -> None:
    bound = chat.bind_tools([add], tool_choice="any", strict=True)
    full = chunks_are_in_order(list(bound.stream("What is 'é' and 3?")))  # type: ignore[arg-type]
    whole = bound.invoke("What is 'é' and 3?")
    for message in (full, whole):
        (call,) = message.tool_calls
        assert (call["name"], call["args"], call["type"]) == ("add", {"left": 3, "name": "é"}, "tool_call")
        assert call["id"]
        assert message.response_metadata["finish_reason"] == "tool_calls"
        assert not message.text


async def test_calls_of_one_answer_stay_apart() -> None:
    def subtract(left: int) -> int:
        return -left

    question: Any = "Call add and subtract with 'x' and 5."
    scripted = oracle.model(delay=0.002)  # slow enough for a reader to get one call before the other is written
    with embedllm.LLM(scripted, tokenizer=scripted.tokenizer) as llm:
        bound: Any = ChatEmbedLLM(llm=llm).bind_tools([add, subtract])
        streamed = chunks_are_in_order(list(bound.stream(question)))
        later = chunks_are_in_order([chunk async for chunk in bound.astream(question)])
    for message in (streamed, later):
        named = [(call["name"], call["args"]) for call in message.tool_calls]
        assert named == [("add", {"left": 5, "name": "x"}), ("subtract", {"left": 5})]
        assert [chunk["index"] for chunk in message.tool_call_chunks] == [0, 1]


def add(left: int, name: str) -> str:
    """Add things.

    Args:
        left: a number
        name: what it is called
    """
    return f"{name}: {left}"


def test_callbacks_hear_each_token_once(chat: ChatEmbedLLM) -> None:
    for model in (chat, EmbedLLM(llm=chat.llm)):
        recorder = Recorder()
        said = [str(getattr(one, "content", one)) for one in model.stream("Hello", {"callbacks": [recorder]})]
        tokens = [token for name, token in recorder.told if name == "token"]
        assert "".join(tokens) == "".join(said) == oracle.GREETING
        assert [name for name, _ in recorder.told if name != "token"] == ["start", "end"]


def test_streaming_makes_invoke_tell_tokens(llm: embedllm.LLM) -> None:
    recorder = Recorder()
    answer = ChatEmbedLLM(llm=llm, streaming=True).invoke("Hello", {"callbacks": [recorder]})
    assert answer.content == oracle.GREETING
    assert "".join(token for name, token in recorder.told if name == "token") == oracle.GREETING


def test_several_samples(chat: ChatEmbedLLM) -> None:
    found = chat.generate([[HumanMessage("Hello")]], n=3).generations[0]
    assert [one.text for one in found] == [oracle.GREETING] * 3
    first, *rest = [one.message for one in found]  # type: ignore[union-attr]
    assert isinstance(first, AIMessage)
    assert first.usage_metadata is not None
    assert first.usage_metadata["output_tokens"] == 3 * (len(oracle.GREETING) + 1)
    assert [one.usage_metadata for one in rest] == [None, None]  # type: ignore[attr-defined]
    with pytest.raises(errors.InvalidRequest, match="n=3"):
        next(chat.stream("Hello", n=3))


# ---- shapes ---------------------------------------------------------------------------------------------------


class Joke(BaseModel):
    """A joke."""

    setup: str
    punchline: str


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
async def test_answers_of_a_shape(chat: ChatEmbedLLM, method: Any) -> None:
    shaped: Any = chat.with_structured_output(Joke, method=method, include_raw=True)
    for found in (shaped.invoke("Tell a joke."), await shaped.ainvoke("Tell a joke."), shaped.batch(["A joke!"])[0]):
        assert isinstance(found["parsed"], Joke)
        assert found["parsing_error"] is None
        assert found["raw"].response_metadata["finish_reason"] == ("tool_calls" if method[0] == "f" else "stop")


def test_an_answer_that_is_cut_short_is_told(chat: ChatEmbedLLM) -> None:
    shaped: Any = chat.with_structured_output(Joke, include_raw=True, max_tokens=5)
    found = shaped.invoke("Tell a joke.")
    assert found["parsed"] is None
    assert isinstance(found["parsing_error"], OutputParserException)
    assert found["raw"].response_metadata["finish_reason"] == "length"


def test_a_shape_is_enforced_and_not_only_asked_for(chat: ChatEmbedLLM) -> None:
    class Choice(BaseModel):
        colour: Literal["red", "blue"]
        number: Literal[7]

    scripted = oracle.model(ByteTokenizer())  # it would say hello
    with embedllm.LLM(scripted, tokenizer=scripted.tokenizer) as llm:
        model = ChatEmbedLLM(llm=llm)
        shaped: Any = model.with_structured_output(Choice)
        found = shaped.invoke("Say hello.")
        assert (found.colour in ("red", "blue"), found.number) == (True, 7)
        plain = model.invoke("Say hello.", response_format=Choice)
        assert Choice.model_validate_json(plain.text).number == 7
    with pytest.raises(errors.InvalidRequest, match="needs a schema"):
        chat.with_structured_output()
    with pytest.raises(errors.InvalidRequest, match="method must be"):
        chat.with_structured_output(Choice, method="guess")  # type: ignore[arg-type]


def test_tools_that_may_not_be_called(chat: ChatEmbedLLM) -> None:
    assert chat.bind_tools([add]).invoke("Call add.").tool_calls
    refused = chat.bind_tools([add], tool_choice="none").invoke("Call add.")
    assert (refused.tool_calls, refused.content) == ([], oracle.GREETING)


# ---- completions ----------------------------------------------------------------------------------------------


async def test_completions(llm: embedllm.LLM) -> None:
    model = EmbedLLM(llm=llm, stop=["how"])
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = llm.tokenize(prompt)
    assert model.get_token_ids(prompt) == ids
    expected = llm.generate(prompt, stop=["how"])
    assert model.invoke(prompt) == await model.ainvoke(prompt) == expected.text
    assert "".join(model.stream(prompt)) == expected.text
    assert "".join([text async for text in model.astream(prompt)]) == expected.text
    for result in (model.generate([prompt, prompt]), await model.agenerate([prompt, prompt])):
        used = [2 * expected.usage.prompt_tokens, 2 * expected.usage.completion_tokens]
        assert result.llm_output is not None
        assert list(result.llm_output["token_usage"].values()) == [*used, sum(used)]
        assert result.llm_output["model_name"] == "scripted"
        info = result.generations[1][0].generation_info
        assert info is not None
        assert info["finish_reason"] == expected.finish_reason
        assert info["usage_metadata"]["output_tokens"] == expected.usage.completion_tokens


# ---- errors ---------------------------------------------------------------------------------------------------


def test_errors_pass_unchanged(chat: ChatEmbedLLM) -> None:
    with pytest.raises(errors.UnknownOption, match="did you mean 'temperature'"):
        chat.invoke("Hello", temperatur=0.5)
    with pytest.raises(errors.InvalidRequest, match="temperature"):
        chat.invoke("Hello", temperature=-1.0)
    with pytest.raises(errors.RequestTooLong):
        next(chat.stream("x" * 20_000))
    with pytest.raises(errors.ModelNotFound):
        chat.invoke("Hello", model="/no/such/folder")
    with endless() as llm:
        model = ChatEmbedLLM(llm=llm, timeout=0.05, max_tokens=10_000)
        with pytest.raises(errors.DeadlineExceeded) as caught:
            model.invoke("Go on")
        assert caught.value.completion is not None
        with pytest.raises(errors.DeadlineExceeded):
            list(model.stream("Go on"))
    with pytest.raises(errors.EngineClosed):
        model.invoke("Go on")


# ---- opening --------------------------------------------------------------------------------------------------


def test_making_one_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    class Never(embedllm.LLM):
        def __init__(self, model: Any = None, **options: Any) -> None:
            opened.append((model, options))
            raise errors.ModelNotFound("nothing is loaded here")

    monkeypatch.setattr(embedllm, "LLM", Never)
    monkeypatch.setenv("EMBEDLLM_MODEL", "from/environment")
    assert min(timeit.repeat(ChatEmbedLLM, number=1, repeat=20)) < 1e-3
    model = ChatEmbedLLM(engine_kwargs={"device": "cpu"}, api_key="ignored", max_retries=3)
    model.bind_tools([add])
    model.with_structured_output({"title": "T", "type": "object", "properties": {}})
    assert model.profile is not None
    assert model.profile["structured_output"] and model.profile["tool_calling"]
    assert model._get_ls_params()["ls_model_name"] == "from/environment"
    assert not opened
    with pytest.raises(errors.ModelNotFound):
        model.invoke("Hello")
    assert opened == [("from/environment", {"device": "cpu"})]


def test_threads_open_it_once(monkeypatch: pytest.MonkeyPatch, llm: embedllm.LLM) -> None:
    opened: list[Any] = []

    class Slow:
        def __new__(cls, model: Any, **options: Any) -> Any:
            time.sleep(0.05)
            opened.append(model)
            return llm

    monkeypatch.setattr(embedllm, "LLM", Slow)
    model = ChatEmbedLLM(model="some/model")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(model.invoke, ["Hello"] * 8))
    assert [answer.content for answer in answers] == [oracle.GREETING] * 8
    assert opened == ["some/model"]


def test_copies_and_pickles_open_their_own(llm: embedllm.LLM) -> None:
    model = ChatEmbedLLM(model=BOX, max_tokens=1)
    model.invoke("Hello")
    before = len(embedllm.LLM.opened())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.invoke("Hello").content == model.invoke("Hello").content
        copied.close()
    assert len(embedllm.LLM.opened()) == before


def test_the_open_llm_is_used_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch, llm: embedllm.LLM) -> None:
    monkeypatch.setenv("EMBEDLLM_MODEL", "no/model")
    answer = ChatEmbedLLM(llm=llm).invoke("Hello")
    assert (answer.content, answer.response_metadata["model_name"]) == (oracle.GREETING, "scripted")
    assert ChatEmbedLLM(llm=llm).invoke("Hello", model="scripted").content == oracle.GREETING


def test_as_many_tokens_as_fit() -> None:
    scripted = ScriptedModel(["x" * 400])
    with embedllm.LLM(scripted, tokenizer=scripted.tokenizer) as llm:
        assert len(ChatEmbedLLM(llm=llm).invoke("Go").content) == 256
        assert len(ChatEmbedLLM(llm=llm, max_tokens=-1).invoke("Go").content) == 400
        assert len(ChatEmbedLLM(llm=llm, max_tokens=10).invoke("Go", max_tokens=20).content) == 20


def test_it_opens_once_and_closes() -> None:
    scripted = oracle.model()
    options = {"tokenizer": scripted.tokenizer}
    before = len(embedllm.LLM.opened())
    model = ChatEmbedLLM(model=scripted, engine_kwargs=options)
    other = EmbedLLM(model=scripted, engine_kwargs=options)
    model.batch(["one", "two"])
    other.invoke("one")
    assert len(embedllm.LLM.opened()) == before + 2
    assert model.profile is not None
    assert model.profile["max_input_tokens"] == scripted.max_model_len
    found = model.invoke("Hello", model=BOX, max_tokens=1)
    assert found.response_metadata["model_name"] == BOX
    assert len(embedllm.LLM.opened()) == before + 3
    model.close()
    other.close()
    assert len(embedllm.LLM.opened()) == before
    assert model.invoke("Hello").content == oracle.GREETING
    del model
    gc.collect()
    assert len(embedllm.LLM.opened()) == before


def test_an_open_llm_stays_open(llm: embedllm.LLM, chat: ChatEmbedLLM) -> None:
    chat.close()
    assert not llm.closed
    assert chat.invoke("Hello").content == oracle.GREETING
