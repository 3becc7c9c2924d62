"""`LLM`: the handle users hold. Validates in the caller's thread, submits, waits.

Owns the public verbs and nothing else: sync, stream and async all go through `submit` and one Generation. Knows no
scheduling. Invariant: what is refused is refused here, before anything is queued.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from embedllm import cells, registry
from embedllm.asking import Asked, Asking, is_batch, params_for_each
from embedllm.cache import Cache, Pin
from embedllm.channel import SLICE, Channel
from embedllm.core import Core, Memory, ModelInfo, build
from embedllm.errors import (
    EmbedLLMError,
    EngineClosed,
    EngineError,
    InvalidRequest,
    QueueFull,
    UnknownOption,
)
from embedllm.generation import Generation
from embedllm.metrics import Stats
from embedllm.options import Options, key_of
from embedllm.outputs import Completion
from embedllm.params import SamplingParams
from embedllm.prompts import Prompt
from embedllm.trace import DEFAULT_CAPACITY, Trace

if TYPE_CHECKING:
    from embedllm.monitor import Monitor


class LLM:
    """A model with its engine, in this process.

    model: None for the model in the box, a folder, a Hugging Face Hub id, or an object from `embedllm.testing`.
    dtype: "auto", "float32", "bfloat16", "float16". device: "auto" (the CPU), "cpu", "cuda", "cuda:1".
    kv_cache_memory: "auto", bytes, "4GiB", or a float in (0, 1) of the memory that is free; num_kv_blocks overrides it.
    kv_cache_dtype: "auto" (the model's), or "fp8", which halves the cache's bytes; on CUDA only, not yet run on a card.
    block_size: tokens per KV block. max_model_len: longest prompt plus output.
    max_num_seqs: most sequences running at once. max_batch_tokens: most tokens per step; "auto" on a CPU learns,
        while running, how many keep a step within 150 ms.
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
        cells.follow()
        self._progress = chosen.progress
        self._core: Core | None = registry.acquire(key_of(model, chosen), lambda: build(model, chosen), self)
        self._info = self._core.info
        self._held: weakref.WeakSet[Pin | Trace] = weakref.WeakSet()  # what ends with this handle
        self._asking = Asking(self._core, chosen.seed)

    # ---- generate ---------------------------------------------------------------------------------------------

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any) -> Generation:
        """Queue a request and return its handle at once; it runs in the background whether it is read or not.

        Raises InvalidRequest here, before anything is queued, for whatever cannot run as asked.
        """
        return self._enqueue(self._ask(prompt, params, overrides), ends_with_cell=False)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **overrides: Any) -> Generation:
        """The same for reading at once: leaving the loop over it, or interrupting it, ends the request."""
        return self._enqueue(self._ask(prompt, params, overrides), foreground=True)

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
        return_exceptions: bool = False,
        **overrides: Any,
    ) -> Any:
        """Complete one prompt, or a list of them in order.

        A prompt is a string, one list of token ids, or one list of chat messages; a list of those is a batch and gives
        a list. `params` may be a list with one entry per prompt; keyword arguments replace its fields, and the fields
        of StructuredOutput may be given as they are: json_schema=Model gives `completion.parsed`, a Model. If one of a
        list fails, all are awaited and the first error is raised with `.completions`; `return_exceptions=True` gives
        the errors in their places; for one prompt it has no effect. Interrupting the wait cancels what is left.
        """
        self._open().worker.check_caller("generate()")
        if not is_batch(prompt):
            return self._enqueue(self._ask(prompt, params, overrides), foreground=True).result()
        asked: list[Generation | InvalidRequest] = []
        each = params_for_each(prompt, params)
        self._asking.check(overrides)  # refused before anything is queued, also for an empty list
        try:
            for one, its in zip(prompt, each, strict=True):
                try:
                    asked.append(self._enqueue_when_room(self._ask(one, its, overrides), asked))
                except InvalidRequest as error:
                    if not return_exceptions:
                        raise
                    asked.append(error)
            self._wait_all([one for one in asked if isinstance(one, Generation)])
        except BaseException:
            _cancel(asked)
            raise
        return _collect(asked, return_exceptions)

    def chat(
        self, messages: list[dict[str, Any]], params: SamplingParams | None = None, **overrides: Any
    ) -> Completion:
        """Answer a conversation: messages are dicts with "role" and "content", rendered by the model's template.

        tools: functions, pydantic models or JSON schemas that the model may call; `completion.tool_calls` says which.
        tool_choice: "auto" (the default), "none", "required" or a tool's name. parallel_tool_calls: False for one call
        at most. chat_template_kwargs: what the template reads beside, as {"enable_thinking": False}. `generate`,
        `stream` and `submit` take the same for messages.
        """
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise InvalidRequest('chat() takes a non-empty list of messages such as {"role": "user", "content": "hi"}')
        return self.generate(messages, params, **overrides)

    def embed(self, texts: Any, *, pooling: Literal["mean", "last"] = "mean", normalize: bool = True) -> Any:
        """Embeddings of one text or token ids, float32 [hidden], or of a list of them, [n, hidden]: numpy arrays.

        They are the model's last hidden states, after its final norm, of all tokens (pooling="mean") or the last one,
        scaled to length 1 if `normalize`. Special tokens are added as `generate` does. A model that was not trained for
        it gives embeddings of modest use. Raises InvalidRequest, and as `generate` for a list.
        """
        import numpy as np

        if pooling not in ("mean", "last"):
            raise InvalidRequest(f"pooling must be 'mean' or 'last', got {pooling!r}")
        self._open().worker.check_caller("embed()")
        if not is_batch(texts):
            return self.embed([texts], pooling=pooling, normalize=normalize)[0]
        once = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
        asked: list[Generation | InvalidRequest] = []
        try:
            for text in texts:
                one = self._asking.ask(self._open(), text, once, {}, pooling)
                asked.append(self._enqueue_when_room(one, asked))
            self._wait_all([one for one in asked if isinstance(one, Generation)])
        except BaseException:
            _cancel(asked)
            raise
        _collect(asked, False)
        found = [one.embedding.cpu().numpy() for one in asked if isinstance(one, Generation)]
        vectors = np.stack(found) if found else np.zeros((0, 0), np.float32)
        if normalize:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _ask(self, prompt: Any, params: Any, overrides: dict[str, Any]) -> Asked:
        return self._asking.ask(self._open(), prompt, params, overrides)

    def _enqueue(self, asked: Asked, *, foreground: bool = False, ends_with_cell: bool = True) -> Generation:
        """Hand it to the engine's thread. Raises QueueFull and what says that there is no engine."""
        cells.follow()
        worker, request = self._open().worker, asked.request
        channel = Channel(
            request.id,
            request.params.n,
            foreground=foreground,
            owner=self,
            ends_with_cell=ends_with_cell,
            is_chat=request.is_chat,
            parse=asked.parse,
        )
        generation = Generation(worker, channel, request.prompt)
        worker.submit(request, channel)
        return generation

    def _enqueue_when_room(self, asked: Asked, before: Sequence[Generation | InvalidRequest]) -> Generation:
        """The same for one of a list: where the queue is full of those `before` it, once some of them have ended."""
        while True:
            try:
                return self._enqueue(asked)
            except QueueFull:
                pending = [one for one in before if isinstance(one, Generation) and not one.done]
                if not pending:
                    raise
                pending[0].wait(SLICE)
                new = self._open().worker.new_id()  # the last handle took its id with it
                asked = replace(asked, request=replace(asked.request, id=new))

    def _wait_all(self, generations: list[Generation]) -> None:
        """Wait in the caller's thread, with a bar there if somebody is looking."""
        from embedllm.models.progress import bar

        with bar(len(generations), "generating", self._progress, unit="request") as shown:
            began = looked = time.monotonic()
            for generation in generations:
                while not generation.wait(SLICE) or time.monotonic() - looked > SLICE:
                    looked = time.monotonic()
                    if not shown.disable:
                        self._show(shown, generations, looked - began)
            shown.update(len(generations) - shown.n)

    def _show(self, shown: Any, generations: list[Generation], seconds: float) -> None:
        speed = sum(generation.num_tokens for generation in generations) / seconds
        with contextlib.suppress(EngineError):  # closed meanwhile: the results will tell
            shown.set_postfix_str(f"{speed:.0f} tok/s, KV {self.stats().kv_cache_usage:.0%}", refresh=False)
        shown.update(sum(generation.done for generation in generations) - shown.n)

    # ---- text -------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens added."""
        return self._asking.prompts.text.encode(text, add_special_tokens=False)

    def detokenize(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._asking.prompts.text.decode(
            self._asking.prompts.check_ids(list(ids)), skip_special_tokens=skip_special_tokens
        )

    def count_tokens(self, prompt: Prompt, tools: Any = None) -> int:
        """How many tokens a prompt (text, ids or messages) has, template and special tokens included."""
        return len(self._asking.prompts.encode(prompt, tools))

    def _prefill(self, tokens: list[int], salt: str | None) -> Generation:
        params = SamplingParams(max_tokens=1, temperature=0.0, seed=0, cache_salt=salt)
        return self.submit(tokens, params)

    # ---- look -------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Model, revision, context and vocabulary sizes, template, device and dtype."""
        return self._info if self._core is None else self._core.info

    @property
    def cache(self) -> Cache:
        """The prefix cache: `explain(prompt)`, `pin(prompt)`, `reset()`."""
        return Cache(self._open().worker, self._asking.prompts.encode, self._prefill, self._held)

    def stats(self) -> Stats:
        """Counters and gauges right now, with vLLM's names."""
        return self._open().worker.call(lambda engine: engine.stats())

    def memory(self) -> Memory:
        """Bytes that weights and KV cache take, and what is free."""
        return self._open().memory()

    def resize_kv(self, kv_cache_memory: int | float | str = "auto", *, num_kv_blocks: int | None = None) -> Memory:
        """Give the KV cache more or less memory while requests run; the arguments are those of `LLM`.

        Waits for the step that runs. The old cache is given back before the new one is made, so the prefix cache is
        empty afterwards and running requests compute their KV again; their tokens stay the same. With
        max_model_len="auto" the context follows what fits. All handles on this engine see the change.
        Raises InvalidRequest, with nothing changed, while something is pinned or an unfinished request would not fit;
        OutOfMemory for more than is free.
        """
        core = self._open()
        core.resize_kv(kv_cache_memory, num_kv_blocks)
        return core.memory()

    def trace(self, capacity: int = DEFAULT_CAPACITY) -> Trace:
        """Record every block and scheduler event from now until its `stop()`; also a context manager."""
        limits, worker = self._open().limits, self._open().worker
        trace = Trace(limits.num_blocks, limits.block_size, capacity)
        ring = trace.ring
        worker.call(trace.begin)
        trace.on_stop(lambda: worker.tell(lambda engine: engine.detach(ring)))
        self._held.add(trace)
        return trace

    def monitor(self) -> Monitor:
        """A view of the KV blocks and of who holds them: live in a notebook, text elsewhere. One of each engine."""
        return self._open().monitor

    @staticmethod
    def opened() -> list[LLM]:
        """Every open LLM of this process, in no order."""
        return registry.handles()

    # ---- end --------------------------------------------------------------------------------------------------

    def cancel_all(self) -> None:
        """End every request of this handle, as their `cancel()` would. Returns at once."""
        self._open().worker.cancel_all(lambda channel: channel.owner is self)

    def close(self) -> None:
        """Cancel this handle's requests; the last handle on a model also gives its memory back. Idempotent.

        Waits for the step that runs, 2 seconds at most.
        """
        self._info = self.info
        core, self._core = self._core, None
        if core is not None:
            for held in list(self._held):
                held.unpin() if isinstance(held, Pin) else held.stop()
            core.worker.cancel_all(lambda channel: channel.owner is self)
            registry.release(core, self)

    @property
    def closed(self) -> bool:
        return self._core is None

    def _open(self) -> Core:
        core = self._core
        if core is None:
            raise EngineClosed("this LLM was closed; make a new one")
        return core

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.info.model}{' (closed)' if self.closed else ''}>"


def _cancel(asked: Sequence[Generation | InvalidRequest]) -> None:
    for one in asked:
        if isinstance(one, Generation):
            one.cancel()


def _collect(asked: list[Generation | InvalidRequest], return_exceptions: bool) -> list[Any]:
    results: list[Any] = []
    for one in asked:
        try:
            results.append(one.result() if isinstance(one, Generation) else one)
        except EmbedLLMError as error:
            results.append(error)
    first = next((result for result in results if isinstance(result, EmbedLLMError)), None)
    if first is not None and not return_exceptions:
        first.completions = results  # type: ignore[attr-defined]
        raise first
    return results
