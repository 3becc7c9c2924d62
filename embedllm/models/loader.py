"""From files to a model that can run: streams weights shard by shard, fused on the way.

Owns the order of loading and the balance of names: every weight the model expects is put exactly once, nothing is left
over. Knows no architecture beyond what `weights.locate` says. Invariant: at any time there is one copy of the model
plus the one tensor being read; what is put is owned memory, never a view of a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from embedllm.errors import InvalidRequest, ModelFormatError, UnsupportedModel
from embedllm.models.checkpoint import Checkpoint, TensorInfo
from embedllm.models.config import ModelConfig
from embedllm.models.progress import bar
from embedllm.models.weights import Part, Shape, locate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBED, _HEAD = ("model.embed_tokens.weight", "embed_tokens.weight"), "lm_head.weight"


class Sink(Protocol):
    """What weights are put into: the decoder."""

    def expected(self) -> dict[str, Shape]:
        """Every weight with its shape."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Take one weight over, in the model's dtype and on its device."""

    def finish(self) -> None:
        """All weights are there."""


def choose_dtype(dtype: str | torch.dtype, saved: str, device: torch.device) -> torch.dtype:
    """The dtype to run in. "auto" is the one the weights were saved in, except on a CPU that cannot multiply in it.

    There bfloat16 needs avx512_bf16 or AMX, and float16 is always run as float32.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        if device.type != "cpu":
            return DTYPES[saved]
        return torch.bfloat16 if saved == "bfloat16" and cpu_multiplies_bfloat16() else torch.float32
    if dtype not in DTYPES:
        raise InvalidRequest(f"dtype {dtype!r} is not known: use 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them bfloat16 is slower than float32."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check is not None)


def untie_if_saved_apart(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """A config that says tied over a file that holds a different head: the file is right, as in transformers."""
    tensors = checkpoint.tensors
    embed = next((name for name in _EMBED if name in tensors), None)
    if not config.tied or embed is None or _HEAD not in tensors:
        return config
    same = torch.equal(read_tensor(checkpoint, embed), read_tensor(checkpoint, _HEAD))
    return config if same else replace(config, tied=False)


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """One tensor by name, in the dtype it was saved in."""
    from safetensors import safe_open

    path = next(path for path, header in checkpoint.shards.items() if name in header)
    with safe_open(path, framework="pt", backend="pread") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor


def stream(checkpoint: Checkpoint, progress: bool | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint once, in the order of the files, as owned CPU memory."""
    from safetensors import safe_open

    with bar(checkpoint.num_bytes, "loading weights", progress, unit="B", unit_scale=True) as shown:
        for path, header in checkpoint.shards.items():
            # Plain reads: pages of a mapped file would count as ours and change under us with the file.
            with safe_open(path, framework="pt", backend="pread") as file:
                for name, info in header.items():
                    yield name, file.get_tensor(name)
                    shown.update(info.num_bytes)


def fill(
    sink: Sink,
    config: ModelConfig,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool | None = None,
) -> None:
    """Put every weight of the checkpoint into the sink, fused, converted and moved.

    Raises ModelFormatError for a name nobody expects, a wrong shape, a weight given twice or not at all; all of them
    before the first byte is read. UnsupportedModel for a quantized dtype.
    """
    expected = sink.expected()
    parts = match_parts(config, checkpoint, expected)
    waiting: dict[str, tuple[torch.Tensor, int]] = {}  # weight → (memory, values still to come)
    for name, tensor in stream(checkpoint, progress):
        part = parts.get(name)
        if part is None:
            continue
        shape = expected[part.target]
        if part.target in waiting:
            whole, missing = waiting.pop(part.target)
        else:
            whole, missing = torch.empty(shape, dtype=dtype, device=device), math.prod(shape)
        _piece(whole, part).copy_(tensor)
        missing -= tensor.numel()
        if missing:
            waiting[part.target] = whole, missing
        else:
            sink.put(part.target, whole)
    sink.finish()


def match_parts(config: ModelConfig, checkpoint: Checkpoint, expected: dict[str, Shape]) -> dict[str, Part]:
    """Checkpoint tensor → where it goes; ModelFormatError naming the first that does not balance."""
    parts: dict[str, Part] = {}
    values = dict.fromkeys(expected, 0)
    pieces: dict[Part, str] = {}
    tensors = checkpoint.tensors
    where = next(iter(checkpoint.shards)).parent
    swapped = config.tied and not any(name in tensors for name in _EMBED)  # saved under the head's name only
    for name, info in tensors.items():
        try:
            part = locate(config, name)
        except KeyError:
            raise ModelFormatError(f"{where}: tensor {name!r} has no place in {config.architecture}") from None
        if part is not None and config.tied and part.target == "head.weight":
            part = Part("embed.weight") if swapped else None
        if part is None:
            continue
        if part.target not in expected:
            raise ModelFormatError(f"{where}: tensor {name!r} has no place: config.json asks for no {part.target}")
        _check_piece(f"{where}: tensor {name!r}", info, part, expected[part.target])
        if part in pieces:
            raise ModelFormatError(f"{where}: tensors {pieces[part]!r} and {name!r} are the same weight")
        pieces[part] = name
        parts[name] = part
        values[part.target] += math.prod(info.shape)
    for target, shape in expected.items():
        if values[target] != math.prod(shape):
            state = "incomplete" if values[target] else "missing"
            raise ModelFormatError(
                f"{where}: weight {target} {list(shape)} of {config.architecture} is {state} in the files"
            )
    return parts


def _check_piece(what: str, info: TensorInfo, part: Part, shape: Shape) -> None:
    wanted = list(shape)
    if part.expert is not None:
        if part.expert >= wanted[0]:
            raise ModelFormatError(f"{what} is for expert {part.expert} of {wanted[0]}")
        wanted = wanted[1:]
    if part.stop is not None:
        wanted[0] = part.stop - part.start
    if list(info.shape) != wanted:
        raise ModelFormatError(f"{what} has shape {list(info.shape)}, config.json asks for {wanted}")
    if info.dtype not in _STORED:
        raise UnsupportedModel(f"{what} is stored as {info.dtype}; {', '.join(_STORED)} can be loaded")


def _piece(whole: torch.Tensor, part: Part) -> torch.Tensor:
    view = whole if part.expert is None else whole[part.expert]
    return view if part.stop is None else view[part.start : part.stop]
