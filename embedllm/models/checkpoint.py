"""The safetensors files of a folder, seen through their headers.

Owns which files make up a model and what tensors they hold. Reads no weights and imports no torch. Invariant: every
path it hands out lies directly in the folder, and every tensor is in exactly one file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from embedllm.errors import ModelFormatError
from embedllm.models.fields import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header names it: its dtype in safetensors' spelling ("BF16") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return DTYPE_BYTES.get(self.dtype, 1) * math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """`shards`: path → {tensor name: what it is}, in the order in which the tensors lie in the file."""

    shards: dict[Path, dict[str, TensorInfo]]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: info for shard in self.shards.values() for name, info in shard.items()}

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def num_values(self) -> int:
        return sum(math.prod(info.shape) for info in self.tensors.values())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers. Raises ModelFormatError for missing, truncated, inconsistent or foreign files."""
    index = folder / INDEX
    if index.is_file():
        listed = _read_index(index)
    elif (folder / SINGLE).is_file():
        listed = {SINGLE: set[str]()}
    else:
        raise ModelFormatError(_nothing_to_load(folder))
    shards: dict[Path, dict[str, TensorInfo]] = {}
    seen: dict[str, str] = {}
    for name in sorted(listed):
        header = read_header(folder / name)
        missing = listed[name] - header.keys()
        if missing:
            raise ModelFormatError(f"{index}: says that {min(missing)!r} is in {name}, which does not hold it")
        for tensor in header:
            if tensor in seen:
                raise ModelFormatError(f"{folder}: tensor {tensor!r} is in both {seen[tensor]} and {name}")
            seen[tensor] = name
        shards[folder / name] = header
    return Checkpoint(shards)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in one file, in the order of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelFormatError(f"{path}: not a readable safetensors file ({error})") from error


def _read_index(path: Path) -> dict[str, set[str]]:
    """File name → the tensors that the index says are in it."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{path}: field 'weight_map' must be a non-empty object")
    listed: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        # A plain name only: an index must not reach for files elsewhere on the machine.
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise ModelFormatError(
                f"{path}: {tensor!r} is said to be in {file!r}; expected a .safetensors file beside it"
            )
        listed.setdefault(file, set()).add(tensor)
    return listed


def _nothing_to_load(folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if found:
        return (
            f"{folder}: has {', '.join(found[:4])} but neither {SINGLE} nor {INDEX}; rename the file or write an index"
        )
    pickled = [name for name in _PICKLES if (folder / name).exists()] or sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        return (
            f"{folder}: has {pickled[0]} but no safetensors. Pickled weights can run code, so they are never loaded; "
            "convert them once where you trust them: transformers.AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder)"
        )
    return f"{folder}: has no {SINGLE} and no {INDEX}"
