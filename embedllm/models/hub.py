"""From a name to a folder on this machine.

Owns the one resolution of a model name: nothing (the model in the box), a folder, or an id on the Hugging Face Hub,
downloaded once and read from the same folder by everything after. Knows no tensor. Invariant: a Snapshot's path is a
folder that holds a config.json.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedllm.errors import MissingDependency, ModelFormatError, ModelNotFound
from embedllm.models.fields import Fields, read_json
from embedllm.models.progress import bar_wanted

BOX = "embedllm/box"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt"]
_UNWANTED = ["*/*.safetensors", "*/*.json", "*/*.model", "*/*.txt", "consolidated*.safetensors"]
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Snapshot:
    """A model's files. `name` is what messages and `llm.info` say; `revision` the commit, None for a plain folder."""

    path: Path
    name: str
    revision: str | None = None

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The object in config.json, unchecked but for its syntax."""
        return read_json(self.path / "config.json")

    @functools.cached_property
    def generation_config(self) -> dict[str, Any]:
        """The object in generation_config.json; empty where there is none."""
        path = self.path / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a sample: those of generation_config.json and config.json, in that order, each once."""
        named = [(self.generation_config, "generation_config.json"), (self.config, "config.json")]
        ids = [Fields(raw, str(self.path / file)).ids("eos_token_id", 2**31) for raw, file in named]
        return tuple(dict.fromkeys(token for group in ids for token in group))

    def defaults(self) -> dict[str, Any]:
        """Fields of SamplingParams that the model's authors chose in generation_config.json.

        Where the file does not say do_sample, as transformers does, it means greedy: temperature 0. Without the file
        nothing is said. Raises ModelFormatError for a value out of range.
        """
        raw = self.generation_config
        if not raw:
            return {}
        fields = Fields(raw, str(self.path / "generation_config.json"))
        out: dict[str, Any] = {}
        if not fields.flag("do_sample", False):
            out["temperature"] = 0.0
        elif fields.has("temperature"):
            out["temperature"] = fields.number("temperature", 0.0, 100.0)
        if fields.has("top_p"):
            out["top_p"] = fields.number("top_p", 0.0, 1.0, above=True)
        if fields.has("top_k"):
            out["top_k"] = fields.integer("top_k", 0, 2**31)
        if fields.has("min_p"):
            out["min_p"] = fields.number("min_p", 0.0, 1.0)
        if fields.has("repetition_penalty"):
            out["repetition_penalty"] = fields.number("repetition_penalty", 0.0, 100.0, above=True)
        if fields.has("max_new_tokens"):
            out["max_tokens"] = fields.integer("max_new_tokens", 1, 2**31)
        return out


def resolve(
    model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    *,
    progress: bool | None = None,
    weights: bool = True,
    code: bool = False,
) -> Snapshot:
    """The snapshot a name stands for.

    model: None for the model in the box, a folder, or a Hub id such as "Qwen/Qwen3-0.6B". A folder wins over an id.
    revision: branch, tag or commit, for a Hub id only. token: as in huggingface_hub; never shown in a message.
    weights=False leaves out the weights, code=True brings the repository's Python files (trust_remote_code).
    HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE are looked at now, not when this was imported.

    Raises ModelNotFound with the nearest reason.
    """
    if model is None:
        return _box()
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return _local(folder, name)
    if folder.is_file():
        raise ModelNotFound(f"{name!r} is a file; pass the folder that holds config.json and *.safetensors")
    if isinstance(model, os.PathLike) or not _HUB_ID.fullmatch(name):
        raise ModelNotFound(f"there is no folder {name!r}, and a Hub id looks like 'owner/name'")
    return _from_hub(name, revision, token, progress, weights, code)


def _box() -> Snapshot:
    path = Path(str(importlib.resources.files("embedllm"))) / "demo" / "model"
    if not (path / "config.json").is_file():
        raise ModelNotFound(
            f"the model in the box is not in this installation ({path}); name a folder or a Hub id: LLM('owner/name')"
        )
    return Snapshot(path, BOX)


def _local(folder: Path, name: str) -> Snapshot:
    folder = folder.resolve()
    if not (folder / "config.json").is_file():
        nested = next((path.parent.name for path in sorted(folder.glob("*/config.json"))), None)
        hint = f"; did you mean {os.path.join(name, nested)!r}?" if nested else ""
        raise ModelNotFound(f"folder {name!r} has no config.json{hint}")
    return Snapshot(folder, name)


def offline() -> bool:
    """Whether the environment forbids the network, as of now."""
    return any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def _from_hub(
    name: str, revision: str | None, token: str | bool | None, progress: bool | None, weights: bool, code: bool
) -> Snapshot:
    try:
        from huggingface_hub import snapshot_download
        from tqdm.auto import tqdm
    except ImportError as error:
        raise MissingDependency("a Hub id needs huggingface_hub: pip install huggingface_hub") from error

    class Bar(tqdm):  # type: ignore[type-arg]
        """A download bar that stays silent where nobody looks."""

        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = options.get("disable") or not bar_wanted(progress)
            super().__init__(*args, **options)

    wanted = [pattern for pattern in _WANTED if weights or pattern != "*.safetensors"]
    try:
        path = Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=offline(),
                allow_patterns=[*wanted, "*.py"] if code else wanted,
                ignore_patterns=_UNWANTED,
                tqdm_class=Bar,
                library_name="embedllm",
            )
        )
    except Exception as error:
        raise ModelNotFound(_why_not(name, revision, error)) from error
    if not (path / "config.json").is_file():
        raise ModelFormatError(
            f"{name}: the repository has no config.json; embedllm runs models in transformers' layout"
        )
    commit = path.name if path.parent.name == "snapshots" else revision
    return Snapshot(path, name, commit)


def _why_not(name: str, revision: str | None, error: Exception) -> str:
    """One line a person can act on. Looks at class names along the chain: they are stable, the tree is not."""
    kinds: set[str] = set()
    link: BaseException | None = error
    while link is not None:
        kinds |= {cls.__name__ for cls in type(link).__mro__}
        link = link.__cause__ or link.__context__
    where = f"{name!r}" + (f" at revision {revision!r}" if revision else "")
    if offline():
        return f"{where} is not in the local cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the network"
    if "GatedRepoError" in kinds:
        return f"{where} is gated: accept its terms on huggingface.co, then log in with `hf auth login` or pass token="
    if "RevisionNotFoundError" in kinds:
        return f"{name!r} has no revision {revision!r}"
    if "RepositoryNotFoundError" in kinds:
        return f"there is no folder and no Hub model {where} (or it is private: `hf auth login` or pass token=)"
    if "HFValidationError" in kinds:
        return f"{where} is not a Hub id; one looks like 'owner/name'"
    if kinds & {
        "LocalEntryNotFoundError",
        "ConnectError",
        "ConnectionError",
        "TimeoutException",
        "OfflineModeIsEnabled",
    }:
        return f"{where} is neither a folder nor in the local cache, and the Hub cannot be reached"
    return f"{where} could not be downloaded ({type(error).__name__}: {error})"
