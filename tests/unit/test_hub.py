"""Names to snapshots, and what a snapshot says about sampling and endings."""

import json
from pathlib import Path
from typing import Any

import pytest

from embedllm.errors import ModelFormatError, ModelNotFound
from embedllm.models import hub
from embedllm.params import SamplingParams


def model(path: Path, config: dict[str, Any] | None = None, generation: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_a_folder(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    for name in (path, str(path), str(tmp_path / "x" / ".." / "m")):
        if ".." in str(name):
            (tmp_path / "x").mkdir()
        snapshot = hub.resolve(name)
        assert snapshot.path == path
        assert snapshot.revision is None
    assert hub.resolve(str(path)).name == str(path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c", "", "bad name", "../up", "~/nowhere/x"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        hub.resolve(name)


def test_a_path_is_never_a_hub_id() -> None:
    with pytest.raises(ModelNotFound, match="there is no folder"):
        hub.resolve(Path("owner/name"))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match="is a file"):
        hub.resolve(tmp_path / "model.gguf")


def test_the_parent_of_a_model_names_it(tmp_path: Path) -> None:
    model(tmp_path / "inner")
    with pytest.raises(ModelNotFound, match=r"did you mean .*inner"):
        hub.resolve(tmp_path)


def test_offline_is_honoured_at_call_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[bool] = []

    def download(name: str, **options: Any) -> str:
        seen.append(options["local_files_only"])
        return str(model(tmp_path / "m"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub.resolve("owner/name")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    hub.resolve("owner/name")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    hub.resolve("owner/name")
    assert seen == [False, True, True]


def test_not_in_the_cache_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        hub.resolve("owner/surely-not-cached")


def test_what_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights as safetensors only, no code unless asked, one commit for everything."""
    commit = "a" * 40
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        (tmp_path / "snapshots").mkdir(exist_ok=True)
        return str(model(tmp_path / "snapshots" / commit))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    snapshot = hub.resolve("owner/name", revision="main", token="hf_secret")
    assert snapshot.revision == commit
    assert "hf_secret" not in repr(snapshot)
    hub.resolve("owner/name", weights=False)
    hub.resolve("owner/name", code=True)
    plain, light, code = (set(options["allow_patterns"]) for options in asked)
    assert "*.safetensors" in plain
    assert not plain & {"*.bin", "*.pt", "*.py", "*"}
    assert "*.safetensors" not in light
    assert "*.py" in code


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no Hub model"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_the_nearest_reason(monkeypatch: pytest.MonkeyPatch, kind: str, told: str) -> None:
    def download(name: str, **options: Any) -> str:
        raise type(kind, (Exception,), {})("a long page of text")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ModelNotFound, match=told):
        hub.resolve("owner/name", revision="v9")


def test_eos_ids_come_from_both_files(tmp_path: Path) -> None:
    path = model(tmp_path / "m", {"eos_token_id": 2}, {"eos_token_id": [7, 2, 9]})
    assert hub.resolve(path).eos_ids == (7, 2, 9)
    assert hub.resolve(model(tmp_path / "n", {"eos_token_id": [4]})).eos_ids == (4,)
    assert hub.resolve(model(tmp_path / "o", {"eos_token_id": None})).eos_ids == ()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, {}),
        ({"eos_token_id": 2}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "max_new_tokens": 9}, {"temperature": 0.0, "max_tokens": 9}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"do_sample": True, "top_k": None, "temperature": None}, {}),
    ],
)
def test_sampling_defaults(tmp_path: Path, generation: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    defaults = hub.resolve(model(tmp_path / "m", generation=generation)).defaults()
    assert defaults == expected
    SamplingParams(**defaults)


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "top_p": 7},
        {"do_sample": True, "top_k": 1.5},
        {"max_new_tokens": 0},
        {"do_sample": True, "repetition_penalty": float("inf")},
    ],
)
def test_hostile_sampling_defaults(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(ModelFormatError, match=r"generation_config\.json"):
        hub.resolve(model(tmp_path / "m", generation=generation)).defaults()
