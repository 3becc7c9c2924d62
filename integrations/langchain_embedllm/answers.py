"""What the engine says, as LangChain messages and chunks.

Owns the rules of chunks: text, reasoning and tool calls each in a chunk of their own, and one last chunk, empty of
text, that alone carries usage and metadata, since metadata of several chunks would be joined. Knows no request.
Invariant: the chunks of an answer, summed, equal the message that it would be without streaming.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from embedllm import Completion, Delta

PROVIDER = "embedllm"
Count = Callable[[str], int]  # tokens of a text


def chunks(delta: Delta, num_calls: int) -> list[ChatGenerationChunk]:
    """What is new, in pieces. num_calls: how many tool calls came before."""
    found = [AIMessageChunk(content=delta.text)] if delta.text else []
    if delta.reasoning:
        found.insert(0, AIMessageChunk(content="", additional_kwargs={"reasoning_content": delta.reasoning}))
    for index, call in enumerate(delta.tool_calls, num_calls):
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        piece = tool_call_chunk(name=call.name, args=arguments, id=call.id, index=index)
        found.append(AIMessageChunk(content="", tool_call_chunks=[piece]))
    return [ChatGenerationChunk(message=message) for message in found]


def last_chunk(completion: Completion, model_name: str, count: Count) -> ChatGenerationChunk:
    """The one with the usage, the finish reason and the times."""
    message = AIMessageChunk(content="", usage_metadata=usage(completion, count), chunk_position="last")
    return ChatGenerationChunk(message=message, generation_info=info(completion, completion, model_name))


def result(completion: Completion, model_name: str, count: Count) -> ChatResult:
    """A whole answer; all its samples where there are several, with the usage of all on the first."""
    generations = []
    for output in completion.outputs:
        message = AIMessage(
            content=output.text,
            additional_kwargs={"reasoning_content": output.reasoning} if output.reasoning else {},
            tool_calls=[tool_call(name=call.name, args=call.arguments, id=call.id) for call in output.tool_calls or ()],
            usage_metadata=usage(completion, count) if output is completion else None,
        )
        generations.append(ChatGeneration(message=message, generation_info=info(completion, output, model_name)))
    return ChatResult(generations=generations)


def usage(completion: Completion, count: Count) -> UsageMetadata:
    """Token counts, all samples together; those of reasoning as its text is tokenized."""
    used = completion.usage
    details = OutputTokenDetails(reasoning=sum(count(one.reasoning) for one in completion.outputs if one.reasoning))
    return UsageMetadata(
        input_tokens=used.prompt_tokens,
        output_tokens=used.completion_tokens,
        total_tokens=used.prompt_tokens + used.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=used.cached_tokens),
        output_token_details=details,
    )


def info(completion: Completion, output: Completion, model_name: str) -> dict[str, Any]:
    """What becomes the message's response_metadata. timing: seconds, see `embedllm.Timing`."""
    timing = completion.timing
    times = {name: getattr(timing, name) for name in ("queue", "ttft", "decode", "total")}
    found: dict[str, Any] = {"model_name": model_name, "model_provider": PROVIDER}
    found["finish_reason"] = output.finish_reason
    if output.logprobs is not None:
        found["logprobs"] = output.logprobs
    return {**found, "timing": times}
