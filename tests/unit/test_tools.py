"""Tools in every form that callers hand in, and what is asked of them."""

import dataclasses
import gc
import weakref
from typing import Annotated, Any, TypedDict

import pydantic
import pytest
from langchain_core.tools import tool as langchain_tool

from embedllm.chat.tools import Choice, choose, normalise_tools
from embedllm.errors import InvalidRequest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def weather(city: str, days: int = 1) -> str:
    """Get the weather.

    Args:
        city: A city's name.
        days: How many days.
    """
    return f"{city} {days}"


class Weather(pydantic.BaseModel):
    """Get the weather."""

    city: str = pydantic.Field(description="A city's name.")


class OldWeather(pydantic.v1.BaseModel):
    """Get the weather."""

    city: str


class TypedWeather(TypedDict):
    """Get the weather."""

    city: Annotated[str, ..., "A city's name."]


@langchain_tool
def decorated(city: str) -> str:
    """Get the weather."""
    return city


def openai(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": SCHEMA, **fields}}


FORMS = {
    "weather": openai(description="Get the weather."),
    "bare": {"name": "bare", "description": "Get the weather.", "parameters": SCHEMA},
    "claude": {"name": "claude", "description": "Get the weather.", "input_schema": SCHEMA},
    "titled": {"title": "titled", "description": "Get the weather.", **SCHEMA},
    "Weather": Weather,
    "OldWeather": OldWeather,
    "TypedWeather": TypedWeather,
    "decorated": decorated,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_an_openai_function(name: str) -> None:
    [found] = normalise_tools([FORMS[name]])
    assert found["type"] == "function"
    function = found["function"]
    assert (function["name"], function["description"]) == (name, "Get the weather.")
    assert function["parameters"]["type"] == "object"
    assert function["parameters"]["properties"]["city"]["type"] == "string"
    assert function["parameters"]["required"] == ["city"]


def test_a_function_is_read_with_its_docstring() -> None:
    [found] = normalise_tools([weather])
    parameters = found["function"]["parameters"]
    assert found["function"]["description"] == "Get the weather."
    assert parameters["properties"]["city"] == {"type": "string", "description": "A city's name."}
    assert parameters["properties"]["days"]["type"] == "integer"
    assert parameters["required"] == ["city"]


def test_missing_parameters_are_none_and_copies_are_made() -> None:
    [found] = normalise_tools([{"type": "function", "function": {"name": "now"}}])
    assert found["function"] == {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}
    [found] = normalise_tools([openai()])
    found["function"]["parameters"]["properties"]["city"]["type"] = "integer"
    assert SCHEMA["properties"]["city"]["type"] == "string"  # type: ignore[index]
    assert normalise_tools(None) == normalise_tools([]) == []


@dataclasses.dataclass
class NoTool:
    city: str


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("weather", "must be a list"),
        ({"name": "x"}, "must be a list"),
        ([openai("")], "1 to 64"),
        ([openai("a b")], "1 to 64"),
        ([openai('a"}')], "1 to 64"),
        ([openai("x\n")], "1 to 64"),
        ([openai("x" * 65)], "1 to 64"),
        ([openai(), openai()], "second one named 'weather'"),
        ([openai(parameters="x")], "JSON schema"),
        ([openai(parameters={"type": "string"})], "schema of an object"),
        ([openai(parameters={"type": "object", "properties": []})], "schema of an object"),
        ([openai(parameters={"default": {1, 2}})], "not JSON"),
        ([openai(parameters={"default": float("nan")})], "not JSON"),
        ([openai(description=7)], "description"),
        ([{"type": "object"}], "is no tool"),
        ([7], "is no tool"),
        ([{"type": "function", "function": {}}], "1 to 64"),
        ([openai(f"t{i}") for i in range(513)], "at most 512"),
    ],
)
def test_what_is_no_tool_is_refused(tools: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        normalise_tools(tools)


TOOLS = [openai("get_weather"), openai("search")]
BOTH = ("get_weather", "search")


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (None, Choice("auto", BOTH)),
        ("auto", Choice("auto", BOTH)),
        ("none", Choice("none")),
        ("required", Choice("required", BOTH)),
        ("any", Choice("required", BOTH)),
        (True, Choice("required", BOTH)),
        ("search", Choice("required", ("search",), True)),
        ({"type": "function", "function": {"name": "search"}}, Choice("required", ("search",), True)),
    ],
)
def test_choices(given: Any, choice: Choice) -> None:
    assert choose(given, TOOLS) == choice
    assert choose(given, TOOLS, False).single is (choice.mode != "none")


def test_a_choice_without_tools() -> None:
    assert choose(None, []) == choose("none", []) == Choice("none")
    for given in ("auto", "required", True, "search"):
        with pytest.raises(InvalidRequest, match="without tools"):
            choose(given, [])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("get_wether", "get_weather, search; did you mean 'get_weather'"),
        ({"type": "function", "function": {"name": "zzz"}}, "the tools are get_weather, search"),
        ({"type": "function"}, "must be"),
        ({"name": "search"}, "must be"),
        (False, "must be"),
        (7, "must be"),
    ],
)
def test_what_is_no_choice_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        choose(given, TOOLS)


def test_parallel_tool_calls_is_a_bool() -> None:
    with pytest.raises(InvalidRequest, match="parallel_tool_calls"):
        choose(None, TOOLS, 1)  # type: ignore[arg-type]


def test_functions_are_read_once_and_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    known: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()

    def now(zone: str) -> str:
        """The time in a zone."""
        return zone

    first = normalise_tools([now], known)
    monkeypatch.setattr("langchain_core.utils.function_calling.convert_to_openai_tool", None)
    again = normalise_tools([now], known)
    assert again == first and len(known) == 1
    again[0]["function"]["parameters"]["properties"].clear()  # what a caller does with the result changes nothing
    assert normalise_tools([now], known) == first
    del now
    gc.collect()
    assert not known
