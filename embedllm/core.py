"""One loaded model with its engine: what every handle on it shares.

Owns the steps from options to a running worker: resolve, load, size the cache, start the thread. Knows no requests.
Invariant: a Core that exists is ready; if building fails nothing stays allocated.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from embedllm.config import Limits
from embedllm.engine import Engine
from embedllm.errors import InvalidRequest, OutOfMemory
from embedllm.grammars import Grammars
from embedllm.monitor import Monitor
from embedllm.options import Options, parse_memory
from embedllm.pace import Pace
from embedllm.prompts import PromptEncoder
from embedllm.tokenizer import Tokenizer, TokenizerProtocol
from embedllm.worker import Worker

if TYPE_CHECKING:
    import torch

    from embedllm.kv_cache import KVGroup
    from embedllm.models.hub import Snapshot
    from embedllm.models.load import Loaded

OBJECT_BLOCKS = 4_096  # of a model that is an object and takes no memory
BATCH_TOKENS = 8_192  # most per step; on a CPU the pace keeps them to what fits in STEP_SECONDS
STEP_SECONDS = 0.150  # a CPU step is kept this short, so that Stop is felt and nobody waits long behind a prompt


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What runs: name and commit, context and vocabulary sizes, chat template, device, dtype."""

    model: str
    revision: str | None
    architecture: str
    max_model_len: int
    vocab_size: int
    chat_template: str | Mapping[str, str] | None = field(repr=False)
    device: str
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. weights: the model. kv_cache: all blocks. free: what the process may still take.

    workspace: what activations and logits of the largest step take for its moment, estimated from shapes.
    note: why a dtype was chosen, "" where it was asked for.
    """

    weights: int
    kv_cache: int
    kv_bytes_per_token: int
    workspace: int
    free: int
    note: str = ""


class Core:
    """A model, its tokenizer, its limits and its worker."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        limits: Limits,
        options: Options,
        limits_for: Callable[[Options], Limits],
        tokenizer: TokenizerProtocol | None,
        defaults: dict[str, Any],
        eos_ids: tuple[int, ...],
        runner: Any,
        memory: Callable[[], Memory],
        pace: Pace | None = None,
        model_type: str = "",
    ) -> None:
        self.info = info
        self.limits = limits
        self._options, self._limits_for = options, limits_for
        self.tokenizer = tokenizer
        self.defaults = defaults
        self.prompts = PromptEncoder(tokenizer, limits.num_input_ids, model_type)
        self.grammars = Grammars(partial(self.prompts.vocabulary, limits.vocab_size, eos_ids))
        self.memory = memory
        engine = Engine(
            runner,
            limits,
            tokenizer=tokenizer,
            eos_ids=eos_ids,
            pace=pace,
            debug=bool(os.environ.get("EMBEDLLM_CHECK")),
        )
        # The LLMs that share it, each with the notebook cell and the run of it that made it.
        self.handles: weakref.WeakKeyDictionary[Any, tuple[str, int] | None] = weakref.WeakKeyDictionary()
        self.worker = Worker(engine, info.model)
        about = {name: getattr(info, name) for name in ("model", "device", "dtype", "max_model_len")}
        self.monitor = Monitor(self.worker, about, None if tokenizer is None else tokenizer.decode)
        # Before the thread runs: whatever happens to whoever asked for this core, the thread ends with it.
        weakref.finalize(self, self.worker.stop).atexit = False
        self.worker.start()

    def resize_kv(self, kv_cache_memory: int | float | str, num_kv_blocks: int | None) -> None:
        """See LLM.resize_kv."""
        options = replace(self._options, kv_cache_memory=kv_cache_memory, num_kv_blocks=num_kv_blocks)
        limits = self._limits_for(options)

        def resize(engine: Engine) -> None:
            engine.resize(limits)
            self.limits, self.info = limits, replace(self.info, max_model_len=limits.max_model_len)

        self.worker.call(resize)


def build(model: Any, options: Options) -> Core:
    """Load a model and start its engine. `model` is None, a name, a folder, or an object as in `embedllm.testing`."""
    if model is not None and not isinstance(model, (str, os.PathLike)):
        if not hasattr(model, "runner"):
            raise InvalidRequest(
                f"model must be a name, a folder or an object as in embedllm.testing, not {type(model).__name__}"
            )
        return _from_object(model, options)
    return _from_files(model, options)


def _from_object(model: Any, options: Options) -> Core:
    max_num_seqs = _auto(options.max_num_seqs, max_sequences("cpu"))

    def limits_for(options: Options) -> Limits:
        return Limits(
            block_size=options.block_size,
            num_blocks=options.num_kv_blocks or OBJECT_BLOCKS,
            max_model_len=_auto(options.max_model_len, model.max_model_len),
            max_num_seqs=max_num_seqs,
            max_batch_tokens=_auto(options.max_batch_tokens, max(512, max_num_seqs)),
            vocab_size=model.vocab_size,
            num_input_ids=model.vocab_size,
            prefix_caching=options.prefix_caching,
            chunked_prefill=options.chunked_prefill,
        )

    limits = limits_for(options)
    tokenizer = None if options.tokenizer == "auto" else options.tokenizer
    return Core(
        info=ModelInfo(
            model=model.name,
            revision=None,
            architecture=type(model).__name__,
            max_model_len=limits.max_model_len,
            vocab_size=model.vocab_size,
            chat_template=getattr(tokenizer, "chat_template", None),
            device="cpu",
            dtype="float32",
        ),
        limits=limits,
        options=options,
        limits_for=limits_for,
        tokenizer=tokenizer,
        defaults={},
        eos_ids=tuple(model.eos_ids),
        runner=model.runner(limits),
        memory=lambda: Memory(weights=0, kv_cache=0, kv_bytes_per_token=0, workspace=0, free=0),
    )


def _from_files(model: Any, options: Options) -> Core:
    from embedllm.kv_cache import KVCache, dtype_named, free_on
    from embedllm.models import hub
    from embedllm.models.load import load
    from embedllm.openmp import release_pool
    from embedllm.ops import device_named
    from embedllm.runner import Runner

    device = device_named(options.device)
    kv_dtype = dtype_named(options.kv_cache_dtype, device)
    snapshot = hub.resolve(
        model, options.revision, options.token, progress=options.progress, code=options.trust_remote_code
    )
    tokenizer = _tokenizer(options, snapshot.path)
    loaded = load(
        snapshot,
        dtype=options.dtype,
        device=device,
        max_model_len=None if options.max_model_len == "auto" else int(options.max_model_len),
        progress=options.progress,
        trust_remote_code=options.trust_remote_code,
    )
    group = replace(loaded.kv_group, dtype=kv_dtype or loaded.kv_group.dtype)
    limits_for = partial(
        _limits,
        group=group,
        longest=loaded.max_model_len,
        device=device,
        vocab_size=loaded.vocab_size,
        num_input_ids=loaded.num_input_ids,
    )
    limits = limits_for(options, free=free_on(device))
    kv = KVCache(group, limits.num_blocks, limits.block_size, device)
    if device.type == "cpu":
        release_pool()  # the engine computes on its own thread from here on
    runner = Runner(loaded, kv, limits.max_num_seqs, captured=loaded.native)
    note = loaded.note  # the function below must not hold the weights
    sizes = {
        "weights": loaded.num_bytes,
        "kv_bytes_per_token": group.bytes_per_token,
        "workspace": _workspace(loaded, limits),
    }
    paced = device.type == "cpu" and options.max_batch_tokens == "auto" and options.chunked_prefill
    return Core(
        info=_info(snapshot, loaded, tokenizer, limits.max_model_len),
        limits=limits,
        options=options,
        limits_for=lambda options: limits_for(options, free=free_on(device) + kv.num_bytes),
        tokenizer=tokenizer,
        defaults=snapshot.defaults(),
        eos_ids=snapshot.eos_ids,
        model_type=str(snapshot.config.get("model_type", "")),
        runner=runner,
        pace=Pace(STEP_SECONDS, limits.max_num_seqs, limits.max_batch_tokens) if paced else None,
        memory=lambda: Memory(**sizes, kv_cache=kv.num_bytes, free=free_on(device), note=note),
    )


def _info(snapshot: Snapshot, loaded: Loaded, tokenizer: TokenizerProtocol | None, max_model_len: int) -> ModelInfo:
    return ModelInfo(
        model=snapshot.name,
        revision=snapshot.revision,
        architecture=loaded.architecture,
        max_model_len=max_model_len,
        vocab_size=loaded.vocab_size,
        chat_template=tokenizer.chat_template if tokenizer is not None else None,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def _limits(
    options: Options,
    *,
    group: KVGroup,
    longest: int,
    device: torch.device,
    vocab_size: int,
    num_input_ids: int,
    free: int,
) -> Limits:
    """The engine's sizes for a loaded model that knows up to `longest` tokens, with `free` bytes for the KV cache.

    The context shrinks to what the cache holds, unless it was asked for.
    """
    max_model_len = longest
    max_num_seqs = _auto(options.max_num_seqs, max_sequences(device.type))
    num_blocks = choose_num_blocks(group, options, max_num_seqs, max_model_len, free)
    room = num_blocks * options.block_size
    if room < max_model_len:
        if options.max_model_len != "auto" or room < 2:
            raise OutOfMemory(
                f"max_model_len={max_model_len} needs {max_model_len * group.bytes_per_token:,} bytes of KV cache and "
                f"there is room for {room} tokens: lower max_model_len or raise kv_cache_memory"
            )
        max_model_len = room
    most = max(BATCH_TOKENS, max_num_seqs, 0 if options.chunked_prefill else max_model_len)
    return Limits(
        block_size=options.block_size,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_batch_tokens=_auto(options.max_batch_tokens, most),
        vocab_size=vocab_size,
        num_input_ids=num_input_ids,
        prefix_caching=options.prefix_caching,
        chunked_prefill=options.chunked_prefill,
    )


def _workspace(loaded: Loaded, limits: Limits) -> int:
    """Bytes of the largest step: every token's values in a layer, and the logits with a sampler's copy of them."""
    tokens = limits.max_batch_tokens * loaded.values_per_token * loaded.dtype.itemsize
    return tokens + 2 * limits.max_num_seqs * loaded.vocab_size * 4


def max_sequences(device_type: str) -> int:
    """What max_num_seqs="auto" means."""
    return 64 if device_type == "cpu" else 256


def choose_num_blocks(group: KVGroup, options: Options, max_num_seqs: int, max_model_len: int, free: int) -> int:
    """Blocks of the cache: as asked, else by kv_cache_memory of what is `free` (bytes)."""
    from embedllm.kv_cache import auto_num_blocks

    if options.num_kv_blocks is not None:
        size = options.num_kv_blocks * group.bytes_per_block(options.block_size)
        if size > free:
            raise OutOfMemory(f"num_kv_blocks={options.num_kv_blocks:,} take {size:,} bytes; {free:,} are free")
        return options.num_kv_blocks
    if options.kv_cache_memory != "auto":
        size = parse_memory(options.kv_cache_memory, free)
        if size > free:
            raise OutOfMemory(f"kv_cache_memory={options.kv_cache_memory!r} is {size:,} bytes; {free:,} are free")
        return size // group.bytes_per_block(options.block_size)
    return auto_num_blocks(
        group, block_size=options.block_size, max_num_seqs=max_num_seqs, max_model_len=max_model_len, free=free
    )


def _tokenizer(options: Options, folder: Any) -> TokenizerProtocol | None:
    if options.tokenizer == "auto":
        return Tokenizer.from_folder(folder)
    if isinstance(options.tokenizer, (str, os.PathLike)):
        from embedllm.models import hub

        found = Tokenizer.from_folder(hub.resolve(options.tokenizer, token=options.token, weights=False).path)
        if found is None:
            raise InvalidRequest(f"tokenizer={options.tokenizer!r} holds no tokenizer files")
        return found
    if options.tokenizer is not None and not hasattr(options.tokenizer, "encode"):
        raise InvalidRequest(
            f"tokenizer must be 'auto', None, a folder, a Hub id or a TokenizerProtocol, not {options.tokenizer!r}"
        )
    return options.tokenizer  # type: ignore[no-any-return]  # None, or an object of the caller's


def _auto(value: int | str, chosen: int) -> int:
    return chosen if value == "auto" else int(value)
