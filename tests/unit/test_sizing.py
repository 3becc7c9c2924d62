"""`embedllm.plan`: what it says beforehand is what loading shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import embedllm
from embedllm import kv_cache, ops
from embedllm.errors import InvalidRequest, UnknownOption
from embedllm.models.shapes import SHAPES
from embedllm.sizing import PlanReport
from tests.engine import tiny_models


def folder(tmp_path: Path, shape: str, **changes: Any) -> Path:
    """A config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES[shape], **changes}))
    return tmp_path


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(kv_cache, "free_on", lambda device: free)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "qwen3_moe", "gpt2"])
def test_says_what_loading_shows(name: str) -> None:
    options: dict[str, Any] = {"num_kv_blocks": 40, "block_size": 8, "max_model_len": 128, "dtype": "float32"}
    report = embedllm.plan(tiny_models.folder(name), **options)
    with embedllm.LLM(tiny_models.folder(name), tokenizer=None, **options) as llm:
        memory, info = llm.memory(), llm.info
    assert report.kv_bytes_per_token == memory.kv_bytes_per_token
    assert report.kv_cache == memory.kv_cache
    assert report.weights == pytest.approx(memory.weights, rel=0.05)  # norms are kept in float32, causal masks in gpt2
    assert (report.max_model_len, report.dtype, report.architecture) == (128, info.dtype, info.architecture)
    assert report.native == (name != "gpt2")


def test_a_known_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3.1 8B: 16 GB of bfloat16, 128 KiB of KV per token, both as published."""
    with_free(monkeypatch, 48 * 2**30)
    report = embedllm.plan(folder(tmp_path, "llama-3.1-8b"), dtype="bfloat16")
    assert report.num_parameters == 8_030_261_248
    assert report.weights == 2 * report.num_parameters
    assert report.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert report.fits
    assert report.num_blocks == (48 * 2**30 - report.weights) // 2 // (16 * 131_072)
    assert report.max_context == 131_072
    assert report.num_full_sequences == pytest.approx(report.num_blocks * 16 / 131_072)


def test_what_does_not_fit_is_said_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 4 * 2**30)
    report = embedllm.plan(folder(tmp_path, "llama-3.1-8b"))
    assert not report.fits
    assert (report.num_blocks, report.max_context) == (0, 0)
    assert "does not fit" in str(report)


@pytest.mark.parametrize(
    ("options", "num_blocks"),
    [({"kv_cache_memory": "1GiB"}, 512), ({"kv_cache_memory": 0.5}, 1536), ({"num_kv_blocks": 7}, 7),
     ({"kv_cache_memory": "9GiB"}, 0), ({"num_kv_blocks": 10**6}, 0), ({"max_num_seqs": 2, "max_model_len": 320}, 40)],
)  # fmt: skip
def test_the_cache_is_sized_by_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], num_blocks: int
) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    with_free(monkeypatch, 2 * 8_030_261_248 + 6 * 2**30)
    assert embedllm.plan(path, dtype="bfloat16", **options).num_blocks == num_blocks


def test_float8_halves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path, "llama-3.1-8b")
    with_free(monkeypatch, 80 * 2**30)
    monkeypatch.setattr(ops, "device_named", torch.device)
    options = {"dtype": "bfloat16", "device": "cuda", "kv_cache_memory": "1GiB"}
    wide, narrow = (embedllm.plan(path, kv_cache_dtype=dtype, **options) for dtype in ("auto", "fp8"))
    assert (wide.kv_bytes_per_token, narrow.kv_bytes_per_token) == (131_072, 65_536)
    assert narrow.num_blocks == 2 * wide.num_blocks and narrow.weights == wide.weights


def test_window_waste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 64 * 2**30)
    path = folder(tmp_path, "mistral-7b", sliding_window=4_096)
    assert embedllm.plan(path, max_model_len=8_192).window_waste == 0.5
    assert embedllm.plan(path, max_model_len=4_096).window_waste == 0.0


def test_shown_in_a_notebook_escaped(tmp_path: Path) -> None:
    (tmp_path / "<b>").mkdir()
    report: PlanReport = embedllm.plan(folder(tmp_path / "<b>", "smollm2-135m"))
    assert "<b>" not in report._repr_html_()
    assert "134.5 M" in str(report)


def test_refuses_what_llm_refuses(tmp_path: Path) -> None:
    path = folder(tmp_path, "smollm2-135m")
    with pytest.raises(UnknownOption, match="did you mean 'block_size'"):
        embedllm.plan(path, blocksize=4)
    with pytest.raises(InvalidRequest, match="8,192"):
        embedllm.plan(path, max_model_len=8_193)
    with pytest.raises(InvalidRequest, match="memory size"):
        embedllm.plan(path, kv_cache_memory="lots")
