"""`ChatEmbedLLM`: a LangChain chat model that runs in this process.

Owns the verbs that LangChain asks of a chat model, sync and async, whole and streamed. Conversion of messages, answers
and shapes is in the files beside it; what runs is the engine's. Invariant: whoever stops waiting for an answer, however
(a closed stream, a cancelled task, an error, an interrupt), ends its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from embedllm.errors import InvalidRequest
from langchain_embedllm import answers, shapes
from langchain_embedllm.batching import Batching
from langchain_embedllm.messages import to_chat
from langchain_embedllm.opening import Sampling

if TYPE_CHECKING:
    from embedllm import LLM, Completion, Generation

_PROFILE_KEYS = frozenset(ModelProfile.__annotations__)
_NOT_FOR_THE_ENGINE = ("model", "stream", "response_format", "ls_structured_output_format", "structured_output_format")


class ChatEmbedLLM(Sampling, Batching):
    """A chat model on the engine in this process.

    model, llm, engine_kwargs: which model; nothing is loaded before the first use. temperature, top_p, top_k,
    max_tokens, stop, seed, timeout: how it answers, see `embedllm.SamplingParams`. chat_template_kwargs: variables of
    the chat template, such as {"enable_thinking": False}. streaming: True makes `invoke` stream to the callbacks.

    Each of them but llm and engine_kwargs can be replaced in a call (`invoke(..., temperature=0)`), and every other
    field of SamplingParams given there; `model=` in a call opens that model beside the first. Errors are embedllm's
    own, unchanged.

        model = ChatEmbedLLM(max_tokens=64)
        model.invoke("Hello!").content
        model.batch(["one", "two"])                     # both at once, however many there are
        model.bind_tools([search]).invoke("Find ...").tool_calls
        model.with_structured_output(Person).invoke("Ann is 42.")
    """

    chat_template_kwargs: dict[str, Any] | None = None

    # ---- answers ----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        generation = self._begun(messages, stop, kwargs)
        try:
            return self._result(generation.result(), kwargs)
        finally:
            generation.cancel()

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        await self._load(kwargs)
        generation = self._begun(messages, stop, kwargs)
        try:
            return self._result(await generation, kwargs)
        finally:
            generation.cancel()

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        generation = self._streamed(messages, stop, kwargs)
        num_calls = 0
        try:
            for delta in generation:
                yield from answers.chunks(delta, num_calls)
                num_calls += len(delta.tool_calls)
            yield self._last_chunk(generation.result(), kwargs)
        finally:
            generation.cancel()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        await self._load(kwargs)
        generation = self._streamed(messages, stop, kwargs)
        num_calls = 0
        try:
            async for delta in generation:
                for chunk in answers.chunks(delta, num_calls):
                    yield chunk
                num_calls += len(delta.tool_calls)
            yield self._last_chunk(generation.result(), kwargs)
        finally:
            generation.cancel()

    def _submit(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        return self._opened(kwargs).submit(to_chat(messages), **self._options(stop, kwargs))

    def _watch(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        # A foreground request, whole answers too: Stop in a notebook ends it in whatever thread an agent waits for it.
        return self._opened(kwargs).stream(to_chat(messages), **self._options(stop, kwargs))

    def _streamed(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: dict[str, Any]) -> Generation:
        if kwargs.get("n") not in (None, 1):
            raise InvalidRequest(f"a stream has one answer, not n={kwargs['n']}; use generate()")
        return self._begun(messages, stop, kwargs)

    def _options(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the engine's verbs. Raises InvalidRequest."""
        mine = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_THE_ENGINE}
        if "chat_template_kwargs" not in mine:
            mine["chat_template_kwargs"] = self.chat_template_kwargs
        options = self._sampling(stop, mine)
        shape = kwargs.get("response_format")
        structured = None if shape is None else shapes.structured(shape)
        return options if structured is None else {**options, "structured": structured}

    def _result(self, completion: Completion, kwargs: dict[str, Any]) -> ChatResult:
        return answers.result(completion, self._name(kwargs.get("model")), self._count(kwargs))

    def _last_chunk(self, completion: Completion, kwargs: dict[str, Any]) -> ChatGenerationChunk:
        return answers.last_chunk(completion, self._name(kwargs.get("model")), self._count(kwargs))

    def _count(self, kwargs: dict[str, Any]) -> Callable[[str], int]:
        return lambda text: len(self._opened(kwargs).tokenize(text))

    # ---- the model --------------------------------------------------------------------------------------------

    def _opened(self, kwargs: dict[str, Any]) -> LLM:
        """The LLM of a call. The first time it loads the model."""
        llm = self._open(kwargs.get("model"))
        if self.profile is not None and "model" not in kwargs and "max_input_tokens" not in self.profile:
            self.profile["max_input_tokens"] = llm.info.max_model_len
        return llm

    async def _load(self, kwargs: dict[str, Any]) -> None:
        """The same, in a thread if it has to be loaded: no event loop stands still for that."""
        if self._found(kwargs.get("model")) is None:
            await asyncio.to_thread(partial(self._opened, kwargs))

    @property
    def _llm_type(self) -> str:
        return "embedllm-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        given = {} if self.chat_template_kwargs is None else {"chat_template_kwargs": self.chat_template_kwargs}
        return {**super()._identifying_params, **given}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop or None, **kwargs)
        params["ls_provider"] = answers.PROVIDER
        params["ls_model_name"] = self._name(kwargs.get("model"))
        return params

    def _resolve_model_profile(self) -> ModelProfile | None:
        """What any model can do here. max_input_tokens is there once the model is open."""
        profile = {
            "text_inputs": True,
            "text_outputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "tool_calling": True,
            "tool_choice": True,
            "tool_call_streaming": True,
            "structured_output": True,
            "reasoning_output": True,
            "temperature": True,
            "open_weights": True,
        }
        if self.llm is not None:
            profile["max_input_tokens"] = self.llm.info.max_model_len
        # An older langchain-core warns of keys that it does not know.
        return cast("ModelProfile", {key: value for key, value in profile.items() if key in _PROFILE_KEYS})

    # ---- tools and shapes -------------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: Any = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        response_format: Any = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools that it may call.

        tools: tools, functions, pydantic models, TypedDicts, or dicts in the formats of OpenAI and Anthropic.
        tool_choice: None or "auto" (the model decides), "any", "required" or True (some call), "none", a tool's name,
        or a dict as OpenAI or Anthropic has it. It is enforced, and so are the arguments' schemas, strict or not.
        parallel_tool_calls: False for one call at most. response_format: the shape of an answer that is no call.
        Raises InvalidRequest for a choice that is none of the tools.
        """
        functions = [convert_to_openai_tool(tool, strict=strict) for tool in tools]
        names = [tool["function"]["name"] for tool in functions if "function" in tool]
        given = {
            "tools": functions,
            "tool_choice": shapes.choice(tool_choice, names),
            "parallel_tool_calls": parallel_tool_calls,
            "response_format": response_format,
        }
        return self.bind(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        method: shapes.Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model, answering with data of a shape.

        schema: a pydantic model (v2 or v1: gives instances), a TypedDict or a JSON schema (gives dicts).
        method: "json_schema" has the answer itself be JSON of the schema; "function_calling" has it be a call of a tool
        with that schema; "json_mode" has it be any JSON object. All are enforced while the answer is generated.
        include_raw: give {"raw": message, "parsed": data or None, "parsing_error": error or None} instead.
        strict: accepted; the first two are always strict. kwargs: as in a call.
        """
        return shapes.structured_runnable(self, schema, method, include_raw, strict, kwargs)

    # ---- counting ---------------------------------------------------------------------------------------------

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids, by the model's own tokenizer. Loads the model."""
        return self._open().tokenize(text)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens the text has."""
        return len(self.get_token_ids(text))

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """How many tokens the prompt has that these messages and tools make, template included."""
        functions = [convert_to_openai_tool(tool) for tool in tools or ()]
        return self._open().count_tokens(to_chat(messages), tools=functions or None)
