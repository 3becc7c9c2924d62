"""What `LLM(...)` may be told, as it was told.

Owns the options, their defaults, how memory sizes are spelled, and which options make engines differ. Knows no model
and no device. Invariant: an Options that exists holds nothing that could be refused without looking at the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

from embedllm.config import check_positive
from embedllm.errors import InvalidRequest

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `LLM(...)`, as given; see there."""

    dtype: str = "auto"
    device: str = "auto"
    kv_cache_memory: int | float | str = "auto"
    kv_cache_dtype: str = "auto"
    num_kv_blocks: int | None = None
    block_size: int = 16
    max_model_len: int | str = "auto"
    max_num_seqs: int | str = "auto"
    max_batch_tokens: int | str = "auto"
    prefix_caching: bool = True
    chunked_prefill: bool = True
    quantization: str | None = None
    speculative: Any = None
    seed: int = 0
    tokenizer: Any = "auto"
    revision: str | None = None
    token: str | bool | None = None
    trust_remote_code: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_batch_tokens"):
            if getattr(self, name) != "auto":
                check_positive(name, getattr(self, name), ' or "auto"')
        check_positive("block_size", self.block_size)
        if self.num_kv_blocks is not None:
            check_positive("num_kv_blocks", self.num_kv_blocks)
        for name in ("prefix_caching", "chunked_prefill", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.progress is not None and not isinstance(self.progress, bool):
            raise InvalidRequest(f"progress must be True, False or None, got {self.progress!r}")
        if self.revision is not None and not isinstance(self.revision, str):
            raise InvalidRequest(f"revision must be a branch, tag or commit, got {self.revision!r}")
        for name in ("quantization", "speculative"):
            if getattr(self, name) is not None:
                raise InvalidRequest(f"{name}={getattr(self, name)!r} is not available yet; leave it None")
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise InvalidRequest(f"seed must be an integer from 0 to 2**63-1, got {self.seed!r}")
        if self.kv_cache_memory != "auto":
            parse_memory(self.kv_cache_memory, 1 << 40)  # refused here rather than after the weights are loaded


def key_of(model: Any, options: Options) -> Hashable:
    """What makes two handles share an engine: everything but the seed of the handle and its bars."""
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    values = {name: value if isinstance(value, Hashable) else _Same(value) for name, value in given.items()}
    values |= {"seed": None, "progress": None, "tokenizer": _identity(options.tokenizer)}
    return (_identity(model), *sorted(values.items(), key=lambda item: item[0]))


def parse_memory(value: int | float | str, free: int) -> int:
    """Bytes from an int (bytes), a float in (0, 1) (share of `free`), or a string like "4GiB", "512MB", "50%"."""
    share: float = 0
    size: float = 0
    if isinstance(value, float):
        share = value
    elif type(value) is int:
        size = value
    elif isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*|%)\s*", value)):
        if match[2] == "%":
            share = float(match[1]) / 100
        elif match[2] in _UNITS:
            size = float(match[1]) * _UNITS[match[2]]
    if 0 < share < 1:
        return int(share * free)
    if 1 <= size < float("inf"):
        return int(size)
    raise InvalidRequest(
        f"memory size {value!r} is not understood: use bytes (int), a share of free memory (float between 0 and 1), "
        'or a string such as "4GiB" or "50%"'
    )


@dataclass(frozen=True, eq=False)
class _Same:
    """An object as part of a key: equal to itself only, and alive as long as the key is."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _identity(source: Any) -> Hashable:
    """A name as it is; a folder with what tells that its files were replaced; an object as itself."""
    if source is None or not isinstance(source, (str, os.PathLike)):
        return source if source is None else _Same(source)
    name = os.fspath(source)
    if not os.path.isdir(name):
        return name
    with os.scandir(name) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return (os.path.abspath(name), *sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in files))
