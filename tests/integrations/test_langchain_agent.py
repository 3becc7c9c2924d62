"""LangChain agents on the real engine: tools are called, their results are read, and the answer has its shape."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from pydantic import BaseModel

import embedllm
from embedllm.errors import RequestCancelled
from langchain_embedllm import ChatEmbedLLM
from tests.integrations import oracle
from tests.integrations.engines import ended, endless

QUESTION = "Use get_temperature and get_population for 'Paris', then report. It has 21 degrees."


class Report(BaseModel):
    """What is known of a city."""

    city: str
    celsius: int


def get_temperature(city: str) -> int:
    """The temperature in a city, in degrees Celsius."""
    return 21


def get_population(city: str) -> int:
    """How many people live in a city."""
    return 2_100_000


TOOLS: list[Callable[..., Any]] = [get_temperature, get_population]


def asked(question: str) -> Any:
    return {"messages": [HumanMessage(question)]}


@pytest.fixture(scope="module")
def scripted() -> Iterator[ChatEmbedLLM]:
    model = oracle.model()
    with embedllm.LLM(model, tokenizer=model.tokenizer) as llm:
        yield ChatEmbedLLM(llm=llm)


def check(messages: list[Any]) -> None:
    """A question, two calls in one answer, two results; then the end."""
    question, calls, first, second, *_ = messages
    assert isinstance(question, HumanMessage)
    assert isinstance(calls, AIMessage)
    named = [(call["name"], call["args"]) for call in calls.tool_calls]
    assert named == [("get_temperature", {"city": "Paris"}), ("get_population", {"city": "Paris"})]
    assert isinstance(first, ToolMessage)
    assert isinstance(second, ToolMessage)
    assert [first.content, second.content] == ["21", "2100000"]
    assert [first.tool_call_id, second.tool_call_id] == [call["id"] for call in calls.tool_calls]


@pytest.mark.parametrize("strategy", [Report, ProviderStrategy(Report), ToolStrategy(Report)])
async def test_an_agent_with_tools_and_a_shape(scripted: ChatEmbedLLM, strategy: Any) -> None:
    agent: Any = create_agent(scripted, TOOLS, response_format=strategy)
    for state in (agent.invoke(asked(QUESTION)), await agent.ainvoke(asked(QUESTION))):
        check(state["messages"])
        assert state["structured_response"] == Report(**oracle.REPORT)


async def test_an_agent_streams_its_messages(scripted: ChatEmbedLLM) -> None:
    agent: Any = create_agent(scripted, TOOLS)
    pieces = [piece for piece, _ in agent.stream(asked(QUESTION), stream_mode="messages")]
    later = [piece async for piece, _ in agent.astream(asked(QUESTION), stream_mode="messages")]
    for found in (pieces, later):
        said = [piece for piece in found if isinstance(piece, AIMessage)]
        assert [call["name"] for piece in said for call in piece.tool_calls] == ["get_temperature", "get_population"]
        assert "".join(piece.text for piece in said) == '{"city": "Paris", "celsius": 21}'
        assert len(said) > 10


def test_one_call_at_most(scripted: ChatEmbedLLM) -> None:
    both = scripted.bind_tools(TOOLS).invoke(QUESTION)
    one = scripted.bind_tools(TOOLS, parallel_tool_calls=False).invoke(QUESTION)
    assert [len(message.tool_calls) for message in (both, one)] == [2, 1]


async def test_stopping_an_agent_cancels() -> None:
    """An async one by closing or cancelling it. LangGraph runs a sync one in threads and waits for them."""
    with endless() as llm:
        agent: Any = create_agent(ChatEmbedLLM(llm=llm, max_tokens=10_000), TOOLS)
        stream = agent.astream(asked("Go on"), stream_mode="messages")
        await anext(stream)
        await stream.aclose()
        assert await asyncio.to_thread(ended, llm) == {"cancelled": 1}
        task = asyncio.create_task(agent.ainvoke(asked("Go on")))
        while not llm.stats().num_requests_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(ended, llm) == {"cancelled": 2}


async def test_a_sync_agent_ends_when_its_requests_are_cancelled() -> None:
    with endless() as llm:
        agent: Any = create_agent(ChatEmbedLLM(llm=llm, max_tokens=10_000), TOOLS)
        waiting = asyncio.create_task(asyncio.to_thread(agent.invoke, asked("Go on")))
        while not llm.stats().num_requests_running:
            await asyncio.sleep(0.001)
        llm.cancel_all()
        with pytest.raises(RequestCancelled):
            await waiting


@pytest.mark.slow
async def test_an_agent_on_the_model_in_the_box() -> None:
    """The first turn must call get_temperature; what follows is the model's own choice, and must end in the shape."""

    class Weather(BaseModel):
        city: Literal["Paris", "Rome"]
        celsius: int

    @wrap_model_call
    async def first_calls(request: Any, handler: Any) -> Any:
        first = isinstance(request.messages[-1], HumanMessage)
        return await handler(request.override(tool_choice="get_temperature") if first else request)

    model = ChatEmbedLLM(temperature=0.0, seed=0)
    agent: Any = create_agent(model, TOOLS, response_format=Weather, middleware=[first_calls])
    state = await agent.ainvoke(asked("What is the temperature in Paris?"), {"recursion_limit": 8})
    calls = state["messages"][1].tool_calls
    assert [call["name"] for call in calls] == ["get_temperature"]
    assert isinstance(calls[0]["args"]["city"], str)
    assert state["messages"][2].content == "21"
    assert isinstance(state["structured_response"], Weather)
    model.close()
