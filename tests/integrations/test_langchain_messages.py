"""LangChain messages as the engine's: every form of content, and what is refused. Forms of tool_choice and shapes."""

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from pydantic import BaseModel

from embedllm.errors import InvalidRequest
from langchain_embedllm.messages import to_chat
from langchain_embedllm.shapes import choice, structured

CALL = {"name": "add", "args": {"left": 1}, "id": "call_1", "type": "tool_call"}
THOUGHT = {"type": "reasoning", "reasoning": "Well."}
AS_CALL = {"type": "function", "id": "call_1", "function": {"name": "add", "arguments": {"left": 1}}}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (SystemMessage("Be brief."), {"role": "system", "content": "Be brief."}),
        (HumanMessage("Hi", name="Ann"), {"role": "user", "content": "Hi", "name": "Ann"}),
        (AIMessageChunk(content="Hi"), {"role": "assistant", "content": "Hi"}),
        (ChatMessage("Hi", role="observation"), {"role": "observation", "content": "Hi"}),
        (FunctionMessage("3", name="add"), {"role": "function", "content": "3", "name": "add"}),
        (
            ToolMessage("3", tool_call_id="call_1", name="add", status="error"),
            {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"},
        ),
        (
            SystemMessage("Be brief.", additional_kwargs={"__openai_role__": "developer"}),
            {"role": "developer", "content": "Be brief."},
        ),
        (
            HumanMessage(["a ", {"type": "text", "text": "b ", "cache_control": {"type": "ephemeral"}}, {"text": "c"}]),
            {"role": "user", "content": "a b c"},
        ),
        (
            HumanMessage([{"type": "text-plain", "text": "file", "mime_type": "text/plain"}]),
            {"role": "user", "content": "file"},
        ),
        (
            ToolMessage([{"type": "json", "json": {"é": 1}}], tool_call_id="1"),
            {"role": "tool", "content": '{"é": 1}', "tool_call_id": "1"},
        ),
        (AIMessage("", tool_calls=[CALL]), {"role": "assistant", "content": "", "tool_calls": [AS_CALL]}),
        (
            AIMessage(
                [
                    {"type": "thinking", "thinking": "Well.", "signature": "x"},
                    {"type": "text", "text": "I add."},
                    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"left": 1}},
                ],
                tool_calls=[CALL],
            ),
            {"role": "assistant", "content": "I add.", "reasoning_content": "Well.", "tool_calls": [AS_CALL]},
        ),
        (
            AIMessage(
                content_blocks=[{"type": "reasoning", "reasoning": "Well."}, {"type": "text", "text": "Hi"}, CALL]
            ),
            {"role": "assistant", "content": "Hi", "reasoning_content": "Well.", "tool_calls": [AS_CALL]},
        ),
        (
            AIMessage("Hi", additional_kwargs={"reasoning_content": "Well."}),
            {"role": "assistant", "content": "Hi", "reasoning_content": "Well."},
        ),
        (
            AIMessage("Hi ", invalid_tool_calls=[{"name": "add", "args": "{oops", "id": "1", "error": None}]),
            {"role": "assistant", "content": "Hi {oops"},
        ),
    ],
)
def test_messages(message: BaseMessage, expected: dict[str, Any]) -> None:
    assert to_chat([message]) == [expected]


def test_tool_results_in_a_human_message_are_turns_of_their_own() -> None:
    message = HumanMessage(
        [
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "3"}]},
            {"type": "tool_result", "tool_use_id": "b", "content": "4"},
            {"type": "text", "text": "So?"},
        ]
    )
    assert to_chat([message]) == [
        {"role": "tool", "content": "3", "tool_call_id": "a"},
        {"role": "tool", "content": "4", "tool_call_id": "b"},
        {"role": "user", "content": "So?"},
    ]


@pytest.mark.parametrize(
    "message",
    [
        HumanMessage([{"type": "image_url", "image_url": {"url": "https://x.example/a.png"}}]),
        HumanMessage([{"type": "image", "base64": "aGk=", "mime_type": "image/png"}]),
        HumanMessage([{"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}]),
        HumanMessage([{"type": "file", "base64": "aGk=", "mime_type": "application/pdf"}]),
        HumanMessage([{"type": "text", "text": None}]),
        AIMessage([{"type": "tool_use", "id": "1", "name": "add", "input": {}}]),
        RemoveMessage(id="1"),
    ],
)
def test_what_cannot_be_read_is_refused(message: BaseMessage) -> None:
    with pytest.raises(InvalidRequest):
        to_chat([message])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        (False, None),
        ("auto", None),
        ({"type": "auto"}, None),
        ("any", "required"),
        ("required", "required"),
        (True, "required"),
        ({"type": "any"}, "required"),
        ("none", "none"),
        ("add", {"type": "function", "function": {"name": "add"}}),
        ({"type": "function", "function": {"name": "add"}}, {"type": "function", "function": {"name": "add"}}),
        ({"type": "tool", "name": "add"}, {"type": "function", "function": {"name": "add"}}),
    ],
)
def test_tool_choice(asked: Any, expected: Any) -> None:
    assert choice(asked, ["add", "search"]) == expected


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'sub' is none of the tools: add, search"):
        choice("sub", ["add", "search"])


class Person(BaseModel):
    """Somebody."""

    name: str


def test_response_formats() -> None:
    schema = Person.model_json_schema()
    assert structured({"type": "json_schema", "json_schema": {"name": "Person", "schema": schema}}) == {
        "json_schema": schema
    }
    assert structured({"type": "json_object"}) == {"json_object": True}
    assert structured({"type": "text"}) is None
    assert structured(schema) == {"json_schema": schema}
    given = structured(Person)
    assert given is not None
    assert given["json_schema"]["properties"] == {"name": {"type": "string"}}
    with pytest.raises(InvalidRequest, match="json_schema needs"):
        structured({"type": "json_schema"})
