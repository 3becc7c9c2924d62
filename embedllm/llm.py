"""`LLM`: the handle users hold. Validates in the caller's thread, submits, waits.

Owns the public verbs and nothing else: sync, stream and async all go through `submit` and one Generation. Knows no
scheduling. Invariant: what is refused is refused here, before anything is queued.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, overload

from embedllm import registry
from embedllm.cache import Cache
from embedllm.channel import SLICE, Channel
from embedllm.config import Options
from embedllm.core import Memory, ModelInfo, build
from embedllm.errors import EmbedLLMError, EngineClosed, InvalidRequest, UnknownOption
from embedllm.generation import Generation
from embedllm.metrics import Stats
from embedllm.outputs import Completion
from embedllm.params import SamplingParams
from embedllm.prompts import Prompt, PromptEncoder
from embedllm.request import Request
from embedllm.trace import DEFAULT_CAPACITY, Trace

if TYPE_CHECKING:
    from embedllm.monitor import Monitor

_request_ids = itertools.count(1)


class LLM:
    """A model with its engine, in this process.

    model: None for the model in the box, a folder, a Hugging Face Hub id, or an object from `embedllm.testing`.
    dtype: "auto", "float32", "bfloat16", "float16". device: "auto" or "cpu".
    kv_cache_memory: "auto", bytes, "4GiB", or a float in (0, 1) of the memory that is free; num_kv_blocks overrides it.
    block_size: tokens per KV block. max_model_len: longest prompt plus output.
    max_num_seqs: most sequences running at once. max_batch_tokens: most tokens per step; "auto" on a CPU measures how
        many keep a step within 150 ms.
    prefix_caching, chunked_prefill: on by default; no effect on tokens, only on speed.
    quantization, speculative: not available yet.
    seed: what unseeded requests draw from. tokenizer: "auto", None (token ids only), a folder or Hub id, or an object.
    revision, token, trust_remote_code: as in transformers. progress: None shows bars on a terminal or in a notebook.

    Two LLMs opened with equal options share one engine and one copy of the weights. `close()`, leaving a `with` block,
    or dropping the last handle gives all memory back. Methods may be called from any thread, also inside a running
    event loop. Raises ModelError, OutOfMemory, InvalidRequest, UnknownOption.
    """

    def __init__(self, model: Any = None, **options: Any) -> None:
        known = [f.name for f in fields(Options)]
        for name in options:
            if name not in known:
                raise UnknownOption.named(name, known, "LLM")
        chosen = Options(**options)
        key = _key(model, chosen)
        core = registry.acquire(key, lambda: build(model, chosen))
        self._core = core
        self._progress = chosen.progress
        self._random = random.Random(chosen.seed)
        self._requests: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._release = weakref.finalize(self, registry.release, key, core)
        self._release.atexit = False
        self._prompts = PromptEncoder(core.tokenizer, core.limits.num_input_ids)
        self.cache = Cache(core.worker, self._prompts.encode, self._prefill)

    # ---- generate ---------------------------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, *, tools: Any = None, **overrides: Any
    ) -> Generation:
        """Queue a request and return its handle at once; it runs in the background whether it is read or not.

        Raises InvalidRequest here, before anything is queued, for whatever cannot run as asked.
        """
        return self._submit(prompt, params, overrides, tools=tools, foreground=False)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, tools: Any = None, **overrides: Any
    ) -> Generation:
        """The same for reading at once: leaving the loop over it, or interrupting it, ends the request."""
        return self._submit(prompt, params, overrides, tools=tools, foreground=True)

    @overload
    def generate(
        self, prompt: str | list[int] | list[dict[str, Any]], params: SamplingParams | None = None, **overrides: Any
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[list[dict[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        return_exceptions: bool = False,
        **overrides: Any,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Any,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Any = None,
        return_exceptions: bool = False,
        **overrides: Any,
    ) -> Any:
        """Complete one prompt, or a list of them in order.

        A prompt is a string, one list of token ids, or one list of chat messages; a list of those is a batch and gives
        a list. `params` may be a list with one entry per prompt; keyword arguments replace its fields. If one of a
        list fails, all are awaited and the first error is raised with `.completions`; `return_exceptions=True` gives
        the errors in their places. Interrupting the wait cancels what is left.
        """
        if not _is_batch(prompt):
            if params is not None and not isinstance(params, SamplingParams):
                raise InvalidRequest("one prompt takes one SamplingParams, not a list")
            return self._submit(prompt, params, overrides, tools=tools, foreground=True).result()
        each = _params_for_each(prompt, params)
        generations: list[Generation] = []
        try:
            for one, its in zip(prompt, each, strict=True):
                generations.append(self._submit(one, its, overrides, tools=tools, foreground=True))
            self._wait_all(generations)
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return _collect(generations, return_exceptions)

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: Any = None,
        **overrides: Any,
    ) -> Completion:
        """Answer a conversation: messages are dicts with "role" and "content", rendered by the model's template."""
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise InvalidRequest('chat() takes a non-empty list of messages such as {"role": "user", "content": "hi"}')
        return self.generate(messages, params, tools=tools, **overrides)

    def _submit(
        self,
        prompt: Any,
        params: SamplingParams | None,
        overrides: dict[str, Any],
        *,
        foreground: bool,
        tools: Any = None,
    ) -> Generation:
        self._check_open()
        core = self._core
        tokens = self._prompts.encode(prompt, tools)
        chosen = (params or SamplingParams()).replace(**overrides) if overrides else params or SamplingParams()
        resolved = chosen.resolve(core.defaults)
        resolved.check_fits(core.limits.vocab_size)
        if core.tokenizer is None and (resolved.stop or resolved.bad_words):
            raise InvalidRequest("stop and bad_words are text, and this model has no tokenizer; use stop_token_ids")
        request = Request(
            id=next(_request_ids),
            prompt=tokens,
            params=resolved,
            max_tokens=self._max_tokens(len(tokens), chosen, resolved),
            seed=resolved.seed if resolved.seed is not None else self._random.getrandbits(63),
            submitted=time.monotonic(),
            bad_words=self._prompts.bad_words(resolved),
        )
        core.limits.check_fits(len(tokens), request.max_tokens)
        channel = Channel(request.id, resolved.n, foreground=foreground)
        generation = Generation(core.worker, channel, tokens, keep_alive=self)
        core.worker.submit(request, channel)
        self._requests.add(generation)
        return generation

    def _max_tokens(self, num_prompt: int, given: SamplingParams, resolved: SamplingParams) -> int:
        """What was asked; where nothing was, the default as far as it fits."""
        limits = self._core.limits
        room = min(limits.max_model_len, limits.num_blocks * limits.block_size + 1) - num_prompt
        if resolved.max_tokens is None:
            return max(1, room)
        if "max_tokens" in given.given:
            return resolved.max_tokens
        return max(1, resolved.min_tokens, min(resolved.max_tokens, room))

    def _wait_all(self, generations: list[Generation]) -> None:
        """Wait in the caller's thread, with a bar there if somebody is looking."""
        from embedllm.models.progress import bar

        with bar(len(generations), "generating", self._progress, unit="request") as shown:
            began, left = time.monotonic(), generations
            while left:
                left[0].wait(SLICE)
                running = [generation for generation in left if not generation.done]
                for generation in running:
                    generation.touch()
                if not shown.disable:
                    speed = sum(g.num_tokens for g in generations) / max(1e-9, time.monotonic() - began)
                    shown.set_postfix_str(f"{speed:.0f} tok/s, KV {self.stats().kv_cache_usage:.0%}", refresh=False)
                shown.update(len(left) - len(running))
                left = running

    # ---- text -------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self._prompts.text.encode(text, add_special_tokens=False)

    def detokenize(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._prompts.text.decode(self._prompts.check_ids(list(ids)), skip_special_tokens=skip_special_tokens)

    def count_tokens(self, prompt: Prompt, tools: Any = None) -> int:
        """How many tokens a prompt (text, ids or messages) has, template and special tokens included."""
        return len(self._prompts.encode(prompt, tools))

    def _prefill(self, tokens: list[int], salt: str | None) -> Generation:
        params = SamplingParams(max_tokens=1, temperature=0.0, cache_salt=salt)
        return self._submit(tokens, params, {}, foreground=False)

    # ---- look -------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Model, revision, context and vocabulary sizes, template, device and dtype."""
        return self._core.info

    def stats(self) -> Stats:
        """Counters and gauges right now, with vLLM's names."""
        self._check_open()
        return self._core.worker.call(lambda engine: engine.stats())

    def memory(self) -> Memory:
        """Bytes that weights and KV cache take, and what is free."""
        self._check_open()
        return self._core.memory()

    def trace(self, capacity: int = DEFAULT_CAPACITY) -> Trace:
        """Record every block and scheduler event from now until its `stop()`; also a context manager."""
        self._check_open()
        limits, worker = self._core.limits, self._core.worker
        trace = Trace(limits.num_blocks, limits.block_size, capacity)
        worker.call(lambda engine: engine.attach(trace))
        trace.on_stop(lambda: worker.call(lambda engine: engine.detach(trace)) if worker.alive else None)
        return trace

    def monitor(self) -> Monitor:
        """A live view of the KV blocks and of who holds them: text, redrawn on a terminal."""
        from embedllm.monitor import Monitor

        self._check_open()
        return Monitor(self._core.worker)

    # ---- end --------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel this handle's requests; the last handle on a model also gives its memory back. Idempotent."""
        if self._release.alive:
            for generation in list(self._requests):
                generation.cancel()
            self._release()

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def _check_open(self) -> None:
        if self.closed:
            raise EngineClosed("this LLM was closed; make a new one")

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.info.model}{' (closed)' if self.closed else ''}>"


def _key(model: Any, options: Options) -> Hashable:
    """What makes two handles share an engine: everything but the seed of the handle and its bars."""
    by_name = model is None or isinstance(model, (str, os.PathLike))
    named = os.path.abspath(model) if by_name and model is not None and os.path.isdir(model) else model
    identity: Hashable = named if by_name else id(model)
    values = asdict(options) | {"seed": None, "progress": None, "tokenizer": None}
    tokenizer = options.tokenizer
    by_value = tokenizer is None or isinstance(tokenizer, (str, os.PathLike))
    return (identity, tokenizer if by_value else id(tokenizer), tuple(sorted(values.items(), key=str)))


def _is_batch(prompt: Any) -> bool:
    """A list of prompts, as opposed to one list of ids or one list of messages."""
    return isinstance(prompt, (list, tuple)) and (not prompt or isinstance(prompt[0], (str, list, tuple)))


def _params_for_each(prompts: Sequence[Any], params: Any) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    each = list(params)
    if len(each) != len(prompts):
        raise InvalidRequest(f"{len(prompts)} prompts and {len(each)} SamplingParams; give one, or one per prompt")
    return each


def _collect(generations: list[Generation], return_exceptions: bool) -> list[Any]:
    results: list[Any] = []
    first: EmbedLLMError | None = None
    for generation in generations:
        try:
            results.append(generation.result())
        except EmbedLLMError as error:
            results.append(error)
            first = first or error
    if first is not None and not return_exceptions:
        first.completions = results  # type: ignore[attr-defined]
        raise first
    return results
