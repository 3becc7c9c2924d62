"""What a model would take here, worked out before any of it is loaded.

Owns the arithmetic behind `embedllm.plan`. Reads config.json and the headers of the weights, never a weight.
Invariant: its numbers are those that an LLM opened with the same options shows in `llm.memory()`, or it says that they
are estimates.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedllm.core import choose_num_blocks, max_sequences
from embedllm.errors import ModelFormatError, OutOfMemory, UnknownOption, UnsupportedModel
from embedllm.options import Options

if TYPE_CHECKING:
    import torch

    from embedllm.kv_cache import KVGroup
    from embedllm.models.config import ModelConfig
    from embedllm.models.hub import Snapshot

_OPTIONS = ("dtype", "device", "kv_cache_memory", "kv_cache_dtype", "num_kv_blocks", "block_size", "max_model_len",
            "max_num_seqs", "revision", "token", "trust_remote_code", "progress")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Sizes in bytes, lengths in tokens.

    weights: the model as it is kept in memory. kv_bytes_per_token: keys and values of one token in all layers.
    num_blocks: blocks of block_size tokens in the cache. kv_cache: what they take.
    max_model_len: longest sequence the options and the model allow. max_context: longest that the free memory allows a
    single request if the whole cache is its own. num_full_sequences: how many of max_model_len fit at once.
    window_waste: share of the cache that a sequence of max_model_len keeps although its layers' sliding windows are
    past it. free: what this process may take now, before loading. notes: what is estimated, and why a dtype was chosen.
    """

    model: str
    architecture: str
    native: bool
    dtype: str
    device: str
    num_parameters: int
    weights: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    kv_cache: int
    max_model_len: int
    max_context: int
    num_full_sequences: float
    window_waste: float
    free: int
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether weights and at least one block fit in what is free now."""
        return self.num_blocks > 0

    def rows(self) -> list[tuple[str, str]]:
        """Label and value, for display."""
        kind = "native decoder" if self.native else "transformers' own code"
        context = f"{self.max_context:,} of {self.max_model_len:,} tokens" if self.fits else "does not fit"
        rows = [
            ("architecture", f"{self.architecture} ({kind})"),
            ("parameters", f"{self.num_parameters / 1e6:,.1f} M in {self.dtype} on {self.device}"),
            ("weights", _bytes(self.weights)),
            ("KV per token", _bytes(self.kv_bytes_per_token)),
            ("KV cache", f"{_bytes(self.kv_cache)}: {self.num_blocks:,} blocks of {self.block_size} tokens"),
            ("longest context", context),
            ("at full length", f"{self.num_full_sequences:,.1f} sequences at once"),
            ("free now", _bytes(self.free)),
        ]
        if self.window_waste:
            rows.append(
                ("past windows", f"{self.window_waste:.0%} of a full sequence's KV lies behind its layers' windows")
            )
        return rows + [("note", note) for note in self.notes]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join([self.model, *(f"  {label:<{width}}  {value}" for label, value in rows)])

    def _repr_html_(self) -> str:
        cells = "".join(
            f'<tr><td style="text-align:left;opacity:.65">{html.escape(label)}</td>'
            f'<td style="text-align:left">{html.escape(value)}</td></tr>'
            for label, value in self.rows()
        )
        return f"<table><caption>{html.escape(self.model)}</caption>{cells}</table>"


def plan(model: Any = None, **options: Any) -> PlanReport:
    """What `LLM(model, **options)` would take here: weights, KV bytes per token, longest context. Loads nothing.

    model: None for the model in the box, a folder, or a Hub id (only its JSON files are fetched). Of LLM's options it
    takes those that decide sizes: dtype, device, kv_cache_memory, kv_cache_dtype, num_kv_blocks, block_size,
    max_model_len and max_num_seqs, beside revision, token, trust_remote_code and progress.

    Raises UnknownOption, InvalidRequest, ModelNotFound, ModelFormatError, UnsupportedModel. What does not fit is no
    error: the report says so.
    """
    from embedllm.models import hub, loader
    from embedllm.models.fields import Fields
    from embedllm.ops import device_named

    for name in options:
        if name not in _OPTIONS:
            raise UnknownOption.named(name, _OPTIONS, "plan")
    asked = Options(**options)
    snapshot = hub.resolve(model, asked.revision, asked.token, progress=asked.progress, weights=False)
    device = device_named(asked.device)
    where = str(snapshot.path / "config.json")
    size = _measure(snapshot, where, asked.trust_remote_code)
    dtype = loader.choose_dtype(asked.dtype, size.saved_dtype(Fields(snapshot.config, where)), device)
    return _report(snapshot, size, asked, dtype, device)


@dataclass(frozen=True)
class _Size:
    """What is known of a model without its weights."""

    architecture: str
    config: ModelConfig | None  # None where transformers' own code would run it
    num_parameters: int
    max_len: int
    layers: int
    kv_heads: int
    k_dim: int
    v_dim: int
    windows: tuple[int | None, ...]
    tied_head: int  # values of a tied head, which a CPU keeps a packed copy of
    notes: tuple[str, ...] = ()

    def saved_dtype(self, raw: Any) -> str:
        from embedllm.models.config import saved_dtype

        return self.config.dtype if self.config is not None else saved_dtype(raw)

    def kv_group(self, dtype: torch.dtype) -> KVGroup:
        from embedllm.kv_cache import KVGroup

        return KVGroup(layers=self.layers, kv_heads=self.kv_heads, k_dim=self.k_dim, v_dim=self.v_dim, dtype=dtype)


def _measure(snapshot: Snapshot, where: str, trusted: bool) -> _Size:
    from embedllm.models.config import ModelConfig
    from embedllm.models.weights import num_bytes

    try:
        config = ModelConfig.from_dict(snapshot.config, where)
    except UnsupportedModel as refusal:
        return _measure_foreign(snapshot, trusted, refusal)
    return _Size(
        architecture=config.architecture,
        config=config,
        num_parameters=num_bytes(config, 1),
        max_len=config.max_len,
        layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        k_dim=config.head_dim,
        v_dim=config.head_dim,
        windows=tuple(layer.window for layer in config.layers),
        tied_head=config.vocab_size * config.hidden_size if config.tied else 0,
    )


def _measure_foreign(snapshot: Snapshot, trusted: bool, refusal: UnsupportedModel) -> _Size:
    """An estimate from the names that configs of transformers share; the headers give the parameters where they are."""
    from embedllm.models import fallback
    from embedllm.models.checkpoint import open_checkpoint

    config = fallback.read_config(snapshot, trusted, refusal)
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = int(config.num_hidden_layers)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    notes = ["KV sizes are estimated from config.json; loading measures them"]
    try:
        num_parameters = open_checkpoint(snapshot.path).num_values
    except ModelFormatError:
        num_parameters = _listed_bytes(snapshot.path) // 2
        notes.append("weights are estimated; their headers are not on this machine")
    architectures = snapshot.config.get("architectures") or [type(config).__name__]
    return _Size(
        architecture=str(architectures[0]),
        config=None,
        num_parameters=num_parameters,
        max_len=int(config.max_position_embeddings),
        layers=layers,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        k_dim=head_dim,
        v_dim=head_dim,
        windows=tuple(
            getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds
        ),
        tied_head=0,
        notes=tuple(notes),
    )


def _listed_bytes(folder: Path) -> int:
    """The total size that an index of weights names, 0 where there is none."""
    from embedllm.models.checkpoint import INDEX
    from embedllm.models.fields import Fields, read_json

    path = folder / INDEX
    if not path.is_file():
        return 0
    return int(Fields(read_json(path), str(path)).child("metadata").number("total_size", 0, 2**60, 0))


def _report(snapshot: Snapshot, size: _Size, asked: Options, dtype: torch.dtype, device: torch.device) -> PlanReport:
    from embedllm.kv_cache import dtype_named, free_on
    from embedllm.models.load import check_length, dtype_note

    group = size.kv_group(dtype_named(asked.kv_cache_dtype, device) or dtype)
    free = free_on(device)
    weights = size.num_parameters * dtype.itemsize
    if device.type == "cpu" and _packs(dtype):
        weights += size.tied_head * dtype.itemsize
    left = max(0, free - weights)
    length = check_length(
        None if asked.max_model_len == "auto" else int(asked.max_model_len), size.max_len, snapshot.name
    )
    per_block = group.bytes_per_block(asked.block_size)
    num_seqs = max_sequences(device.type) if asked.max_num_seqs == "auto" else int(asked.max_num_seqs)
    try:
        num_blocks = choose_num_blocks(group, asked, num_seqs, length, left)
    except OutOfMemory:
        num_blocks = 0
    if num_blocks * per_block > left:
        num_blocks = 0
    room = num_blocks * asked.block_size
    note = dtype_note(asked.dtype, size.config.dtype, dtype) if size.config is not None else ""
    return PlanReport(
        model=snapshot.name,
        architecture=size.architecture,
        native=size.config is not None,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        num_parameters=size.num_parameters,
        weights=weights,
        kv_bytes_per_token=group.bytes_per_token,
        block_size=asked.block_size,
        num_blocks=num_blocks,
        kv_cache=num_blocks * per_block,
        max_model_len=length,
        max_context=min(length, room),
        num_full_sequences=room / length,
        window_waste=_window_waste(size.windows, min(length, room)),
        free=free,
        notes=size.notes + ((note,) if note else ()),
    )


def _window_waste(windows: tuple[int | None, ...], length: int) -> float:
    """Share of a sequence's KV that lies before its layers' windows."""
    if not length:
        return 0.0
    past = sum(max(0, length - window) for window in windows if window is not None)
    return past / (len(windows) * length)


def _packs(dtype: torch.dtype) -> bool:
    """Whether linear weights of this dtype are packed on this CPU, a tied head then being a copy."""
    import torch

    from embedllm_kernels.cpu.linear import why_not

    return not why_not(torch.empty((1, 1), dtype=dtype))


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
