"""The forms in which LangChain asks for tools and for answers of a shape, in those of the engine.

Owns tool_choice, response_format and the runnable behind `with_structured_output`. Knows no request. Invariant: a shape
is enforced while the answer is generated, so the parsers here only turn what is already right into the caller's type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from embedllm.errors import InvalidRequest

Method = Literal["json_schema", "function_calling", "json_mode"]


def choice(asked: Any, names: Sequence[str]) -> str | dict[str, Any] | None:
    """tool_choice as the engine takes it: None (the model decides), "none", "required" or one tool.

    asked: None, "auto", "none", "any", "required", a bool, a tool's name, or a dict as OpenAI or Anthropic has it.
    Raises InvalidRequest for a tool that is not among `names`.
    """
    if isinstance(asked, Mapping):
        function = asked.get("function")
        named = function.get("name") if isinstance(function, Mapping) else asked.get("name")
        asked = named if named is not None else asked.get("type")
    if asked is None or asked is False or asked == "auto":
        return None
    if asked is True or asked in ("any", "required"):
        return "required"
    if asked == "none":
        return "none"
    if asked not in names:
        raise InvalidRequest(f"tool_choice={asked!r} is none of the tools: {', '.join(names) or 'there are none'}")
    return {"type": "function", "function": {"name": asked}}


def structured(response_format: Any) -> dict[str, Any] | None:
    """A response_format as the engine's `structured`; None for plain text.

    response_format: {"type": "json_schema", "json_schema": {"schema": ...}}, {"type": "json_object"}, {"type": "text"},
    or a schema itself: a pydantic model, a TypedDict, a JSON schema.
    """
    if not isinstance(response_format, Mapping):
        return {"json_schema": convert_to_json_schema(response_format)}
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        return {"json_schema": dict(response_format)}
    inner = response_format.get("json_schema")
    if not isinstance(inner, Mapping) or "schema" not in inner:
        raise InvalidRequest(f'a response_format of type json_schema needs {{"schema": ...}}, got {inner!r}')
    return {"json_schema": inner["schema"]}


def structured_runnable(
    model: BaseChatModel,
    schema: Any,
    method: Method,
    include_raw: bool,
    strict: bool | None,
    options: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """The model, bound to a shape, and a parser of it; see ChatEmbedLLM.with_structured_output."""
    told = {"kwargs": {"method": method, "strict": strict}, "schema": schema}
    if schema is None and method != "json_mode":
        raise InvalidRequest(f"with_structured_output(method={method!r}) needs a schema")
    bound: Runnable[LanguageModelInput, Any]
    parser: BaseOutputParser[Any]
    is_model = isinstance(schema, type) and is_basemodel_subclass(schema)
    if method == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        bound = model.bind_tools(
            [schema],
            tool_choice=name,
            strict=strict,
            parallel_tool_calls=False,
            ls_structured_output_format=told,
            **options,
        )
        parser = (
            PydanticToolsParser(tools=[schema], first_tool_only=True)
            if is_model
            else JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
        )
    elif method in ("json_schema", "json_mode"):
        shape: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            its_schema = convert_to_json_schema(schema)
            shape = {"type": "json_schema", "json_schema": {"name": its_schema["title"], "schema": its_schema}}
        if schema is not None:
            options = {"ls_structured_output_format": told, **options}
        bound = model.bind(response_format=shape, **options)
        parser = PydanticOutputParser(pydantic_object=schema) if is_model else JsonOutputParser()
    else:
        raise InvalidRequest(f"method must be json_schema, function_calling or json_mode, got {method!r}")
    if not include_raw:
        return bound | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")
