"""`EmbedLLM`: a LangChain completion model that runs in this process.

Owns the verbs that LangChain asks of one: a text in, what follows it out. Knows no chat. Invariant: the prompts of one
call are all in the engine at once, and whoever stops waiting ends what was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams
from langchain_core.language_models.llms import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from langchain_embedllm import answers
from langchain_embedllm.opening import Sampling

if TYPE_CHECKING:
    from embedllm import LLM, Completion


class EmbedLLM(Sampling, BaseLLM):
    """A completion model on the engine in this process; the fields are those of ChatEmbedLLM.

    A generation's generation_info has finish_reason, model_name, timing (seconds) and usage_metadata; an LLMResult's
    llm_output has token_usage of all prompts together. Errors are embedllm's own, unchanged.

        EmbedLLM(max_tokens=32).invoke("def read(path):")
    """

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        llm, options = self._asked(stop, kwargs)
        return self._result(llm.generate(prompts, **options), kwargs)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        llm, options = await self._asked_async(stop, kwargs)
        begun = []
        try:
            for prompt in prompts:
                begun.append(llm.submit(prompt, **options))
            return self._result([await generation for generation in begun], kwargs)
        finally:
            for generation in begun:
                generation.cancel()

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        llm, options = self._asked(stop, kwargs)
        generation = llm.stream(prompt, **options)
        try:
            for delta in generation:
                if delta.text:
                    chunk = GenerationChunk(text=delta.text)
                    if run_manager is not None:  # here it is the model that tells the callbacks, unlike in a chat model
                        run_manager.on_llm_new_token(delta.text, chunk=chunk)
                    yield chunk
            yield GenerationChunk(text="", generation_info=self._info(generation.result(), kwargs))
        finally:
            generation.cancel()

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        llm, options = await self._asked_async(stop, kwargs)
        generation = llm.stream(prompt, **options)
        try:
            async for delta in generation:
                if delta.text:
                    chunk = GenerationChunk(text=delta.text)
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(delta.text, chunk=chunk)
                    yield chunk
            yield GenerationChunk(text="", generation_info=self._info(generation.result(), kwargs))
        finally:
            generation.cancel()

    def _asked(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[LLM, dict[str, Any]]:
        mine = {name: value for name, value in kwargs.items() if name not in ("model", "stream")}
        return self._open(kwargs.get("model")), self._sampling(stop, mine)

    async def _asked_async(self, stop: list[str] | None, kwargs: dict[str, Any]) -> tuple[LLM, dict[str, Any]]:
        if self._found(kwargs.get("model")) is None:
            await asyncio.to_thread(self._open, kwargs.get("model"))
        return self._asked(stop, kwargs)

    def _result(self, completions: list[Completion], kwargs: dict[str, Any]) -> LLMResult:
        generations = [
            [
                Generation(text=output.text, generation_info=self._info(completion, kwargs, output))
                for output in completion.outputs
            ]
            for completion in completions
        ]
        used = [completion.usage for completion in completions]
        prompt_tokens = sum(one.prompt_tokens for one in used)
        completion_tokens = sum(one.completion_tokens for one in used)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        output = {"token_usage": usage, "model_name": self._name(kwargs.get("model"))}
        return LLMResult(generations=generations, llm_output=output)

    def _info(self, completion: Completion, kwargs: dict[str, Any], output: Completion | None = None) -> dict[str, Any]:
        found = answers.info(completion, output or completion, self._name(kwargs.get("model")))
        return {**found, "usage_metadata": answers.usage(completion, self.get_num_tokens)}

    @property
    def _llm_type(self) -> str:
        return "embedllm"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop or None, **kwargs)
        params["ls_provider"] = answers.PROVIDER
        params["ls_model_name"] = self._name(kwargs.get("model"))
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The text's token ids, by the model's own tokenizer. Loads the model."""
        return self._open().tokenize(text)

    def get_num_tokens(self, text: str) -> int:
        """How many tokens the text has."""
        return len(self.get_token_ids(text))
