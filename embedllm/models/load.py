"""From a snapshot to a model that runs: the native decoder where there is one, else transformers' own code.

Owns that choice and what the rest needs to know about the outcome. Knows no KV memory and no requests. Invariant: for
a native architecture no modelling code of transformers is imported, and nothing is loaded that would answer differently
from the published model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from embedllm.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from embedllm.models.config import ModelConfig
from embedllm.models.hub import Snapshot

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from embedllm.batch import Batch
    from embedllm.kv_cache import KVCache, KVGroup


class Forward(Protocol):
    """What the decoder and the fallback have in common."""

    @property
    def kv_group(self) -> KVGroup:
        """The KV that a cache for this model holds."""

    @property
    def num_bytes(self) -> int:
        """Bytes the weights take as they are kept."""

    def forward(self, batch: Batch, kv: KVCache, between_layers: Callable[[], None] | None = None) -> Tensor:
        """Write the batch's KV, return hidden states [tokens, hidden]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Rows of hidden states to float32 logits [rows, vocabulary]."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to run.

    native: the native decoder runs it, else transformers' modelling code. max_model_len: most tokens of one sequence.
    vocab_size: width of the logits. num_input_ids: rows of the embedding. values_per_token: most values that one token
    has in flight inside a layer, an estimate. note: why a dtype was chosen, "" where the files or the caller named it.
    """

    model: Forward
    architecture: str
    native: bool
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    num_input_ids: int
    values_per_token: int
    note: str = ""

    @property
    def kv_group(self) -> KVGroup:
        return self.model.kv_group

    @property
    def num_bytes(self) -> int:
        return self.model.num_bytes

    def forward(self, batch: Batch, kv: KVCache, between_layers: Callable[[], None] | None = None) -> Tensor:
        """As Forward.forward."""
        return self.model.forward(batch, kv, between_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """As Forward.logits."""
        return self.model.logits(hidden)


def load(
    snapshot: Snapshot,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> Loaded:
    """Load a snapshot.

    dtype: "auto" (what the weights were saved in, float32 on a CPU that cannot multiply in it) or a name.
    max_model_len: by default what the model was made for.
    trust_remote_code: run Python files that the model brings; without it they are never run.

    Raises ModelFormatError for broken files, UnsupportedModel naming what is missing, InvalidRequest for an option,
    OutOfMemory before anything is read where the weights cannot fit.
    """
    try:
        config = ModelConfig.from_dict(snapshot.config, str(snapshot.path / "config.json"))
    except UnsupportedModel as refusal:
        from embedllm.models import fallback

        return fallback.load(
            snapshot,
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            trust_remote_code=trust_remote_code,
            progress=progress,
            refusal=refusal,
        )
    return _load_native(snapshot, config, dtype, device, max_model_len, progress)


def _load_native(
    snapshot: Snapshot,
    config: ModelConfig,
    dtype: str | torch.dtype,
    device: str | torch.device,
    max_model_len: int | None,
    progress: bool | None,
) -> Loaded:
    import torch

    from embedllm.models import loader
    from embedllm.models.checkpoint import open_checkpoint
    from embedllm.models.decoder import Decoder

    device = torch.device(device)
    chosen = loader.choose_dtype(dtype, config.dtype, device)
    length = check_length(max_model_len, config.max_len, snapshot.name)
    checkpoint = open_checkpoint(snapshot.path)
    check_room(checkpoint.num_values * chosen.itemsize, device, snapshot.name)
    config = loader.untie_if_saved_apart(config, checkpoint)
    decoder = Decoder(config, dtype=chosen, device=device, max_model_len=length)
    loader.fill(decoder, config, checkpoint, chosen, device, progress)
    return Loaded(
        model=decoder,
        architecture=config.architecture,
        native=True,
        dtype=chosen,
        device=device,
        max_model_len=length,
        vocab_size=config.vocab_size,
        num_input_ids=config.vocab_size,
        values_per_token=config.values_per_token,
        note=dtype_note(dtype, config.dtype, chosen),
    )


def check_length(max_model_len: int | None, max_len: int, name: str) -> int:
    """`max_model_len` where it is within what the model was made for; all of that where it is None."""
    if max_model_len is None:
        return max_len
    if not 1 <= max_model_len <= max_len:
        raise InvalidRequest(
            f"max_model_len={max_model_len!r}: {name} was made for 1 to {max_len:,} tokens (max_position_embeddings)"
        )
    return max_model_len


def check_room(num_bytes: int, device: torch.device, name: str) -> None:
    """Raises OutOfMemory where the weights cannot fit: the system would grant the memory and later kill the process."""
    from embedllm.kv_cache import free_on

    free = free_on(device)
    if num_bytes > free:
        raise OutOfMemory(
            f"the weights of {name} take {num_bytes / 2**30:,.1f} GiB of {free / 2**30:,.1f} GiB free ({device}): "
            "close other models, or choose a smaller one or a narrower dtype"
        )


def dtype_note(asked: object, saved: str, chosen: torch.dtype) -> str:
    """Why the weights run in another dtype than they were saved in, where nobody asked for that."""
    name = str(chosen).removeprefix("torch.")
    if asked != "auto" or name == saved:
        return ""
    return f"the weights were saved as {saved} and run as {name}: this CPU has no fast {saved} products"
