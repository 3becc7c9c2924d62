"""From what a caller asks for to a request that can run: every refusal happens here, in the caller's thread.

Owns the keywords of the verbs and the order in which they count. Knows no engine state beyond how much is pinned.
Invariant: a request that it makes fits the model, the context and the cache.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from embedllm.config import Limits
from embedllm.errors import InvalidRequest, UnknownOption
from embedllm.params import SamplingParams
from embedllm.prompts import is_chat
from embedllm.request import Request
from embedllm.structured_output import StructuredOutput

if TYPE_CHECKING:
    from embedllm.core import Core

CHAT = ("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs")  # what only a conversation takes
SHAPES = tuple(f.name for f in fields(StructuredOutput))  # json_schema=Model for structured=StructuredOutput(...)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what makes the value of an answer's text, if that is asked for."""

    request: Request
    parse: Callable[[str], Any] | None


class Asking:
    """Makes requests for one handle: unseeded ones draw from its seed."""

    def __init__(self, core: Core, seed: int) -> None:
        self.prompts = core.prompts
        self._random = random.Random(seed)

    def check(self, overrides: Mapping[str, Any]) -> None:
        """Raises UnknownOption and what else can be seen wrong in keywords without a prompt."""
        SamplingParams(**_split(overrides)[0])

    def ask(self, core: Core, prompt: Any, params: Any, overrides: Mapping[str, Any], pooling: Any = None) -> Asked:
        """What was asked, checked. Raises InvalidRequest and what says that there is no engine."""
        limits, worker = core.limits, core.worker
        worker.check_alive()
        if params is not None and not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be one SamplingParams for one prompt, got {type(params).__name__}")
        replaced, chat = _split(overrides)
        chosen = (params or SamplingParams()).replace(**replaced) if replaced else params or SamplingParams()
        resolved = chosen.resolve(core.defaults)
        resolved.check_fits(limits.vocab_size)
        if self.prompts.has_no_text and (resolved.stop or resolved.bad_words or resolved.structured):
            raise InvalidRequest(
                "stop, bad_words and structured are about text, and this model has no tokenizer; use stop_token_ids"
            )
        asked, parse = _settled(resolved.structured)
        prepared = self.prompts.prepare(prompt, asked, chat)
        if prepared.structured is not asked or (not prepared.skip_special_tokens and resolved.skip_special_tokens):
            skip = resolved.skip_special_tokens and prepared.skip_special_tokens
            resolved = resolved.replace(structured=prepared.structured, skip_special_tokens=skip)
        shape = core.grammars.shape(prepared.structured) if prepared.structured is not None else None
        max_tokens = _max_tokens(limits, worker.num_pinned, len(prepared.tokens), chosen, resolved)
        limits.check_fits(len(prepared.tokens), max_tokens, worker.num_pinned)
        request = Request(
            id=worker.new_id(),
            prompt=prepared.tokens,
            params=resolved,
            max_tokens=max_tokens,
            seed=resolved.seed if resolved.seed is not None else self._random.getrandbits(63),
            submitted=time.monotonic(),
            bad_words=self.prompts.bad_words(resolved),
            is_chat=is_chat(prompt),
            shape=shape,
            parser=prepared.parser,
            pooling=pooling,
        )
        return Asked(request, parse)


def _split(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of SamplingParams, and keywords of a conversation. Raises UnknownOption."""
    replaced: dict[str, Any] = {}
    chat: dict[str, Any] = {}
    shape: dict[str, Any] = {}
    known = SamplingParams.__dataclass_fields__
    for name, value in overrides.items():
        if name in CHAT:
            chat[name] = value
        elif name in SHAPES:
            shape |= {} if value is None or value is False else {name: value}
        elif name in known:
            replaced[name] = value
        else:
            raise UnknownOption.named(name, [*known, *CHAT, *SHAPES], "SamplingParams")
    if shape:
        if "structured" in replaced:
            raise InvalidRequest(f"structured and {next(iter(shape))} say the same thing; give one of them")
        replaced["structured"] = StructuredOutput(**shape)
    return replaced, {name: value for name, value in chat.items() if value is not None}


def _settled(asked: Any) -> tuple[StructuredOutput | None, Callable[[str], Any] | None]:
    """The shape with its schema as plain data, and what makes the value of a text of that shape."""
    if asked is None or asked.kind != "json_schema":
        return asked, json.loads if asked is not None and asked.json_object else None
    from embedllm.structured.lower import schema_of

    schema, parse = schema_of(asked.json_schema)
    return StructuredOutput(json_schema=schema), parse


def _max_tokens(
    limits: Limits, num_pinned: int, num_prompt: int, given: SamplingParams, resolved: SamplingParams
) -> int:
    """What was asked; where nothing was, the default as far as it fits."""
    room = min(limits.max_model_len, (limits.num_blocks - num_pinned) * limits.block_size + 1) - num_prompt
    if resolved.max_tokens is None:
        return max(1, room)
    if "max_tokens" in given.given:
        return resolved.max_tokens
    return max(1, resolved.min_tokens, min(resolved.max_tokens, room))


def is_batch(prompt: Any) -> bool:
    """A list of prompts, as opposed to one list of ids or one list of messages."""
    return isinstance(prompt, (list, tuple)) and (not prompt or isinstance(prompt[0], (str, list, tuple)))


def params_for_each(prompts: Sequence[Any], params: Any) -> list[SamplingParams | None]:
    """One for each of a list of prompts. Raises InvalidRequest."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise InvalidRequest(f"params must be a SamplingParams, or a list of them, got {type(params).__name__}")
    each = list(params)
    if len(each) != len(prompts):
        raise InvalidRequest(f"{len(prompts)} prompts and {len(each)} SamplingParams; give one, or one per prompt")
    return each
