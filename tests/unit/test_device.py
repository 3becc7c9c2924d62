"""Which device is chosen, and that one which is not here is refused with the reason."""

from types import SimpleNamespace

import pytest
import torch

import embedllm
from embedllm import kv_cache, ops
from embedllm.errors import InvalidRequest, MissingDependency


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two cards of compute capability 9.0, the second one current."""
    card = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    return card


@pytest.mark.usefixtures("cards")
def test_cuda_is_the_current_card_or_the_one_named() -> None:
    assert ops.device_named("cuda") == torch.device("cuda", 1)
    assert ops.device_named("cuda:0") == torch.device("cuda", 0)
    assert ops.device_named("cpu") == torch.device("cpu")
    with pytest.raises(InvalidRequest, match="'cuda:2' is not here: torch sees 2 CUDA devices"):
        ops.device_named("cuda:2")


def test_an_old_card_is_refused(cards: SimpleNamespace) -> None:
    cards.capability = (7, 5)
    with pytest.raises(InvalidRequest, match=r"Some Card is too old .* device='cpu'"):
        ops.device_named("cuda")


@pytest.mark.usefixtures("cards")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install triton"):
        ops.device_named("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_what_is_not_here() -> None:
    for function in (embedllm.LLM, embedllm.plan):
        with pytest.raises(InvalidRequest, match="'cuda' is not here: torch sees 0 CUDA devices"):
            function(device="cuda")
        with pytest.raises(InvalidRequest, match="'mps' is not supported"):
            function(device="mps")
        with pytest.raises(InvalidRequest, match="'tpu9' is not a device"):
            function(device="tpu9")


def test_a_float8_cache_is_for_cards() -> None:
    for function in (embedllm.LLM, embedllm.plan):
        with pytest.raises(InvalidRequest, match="kv_cache_dtype='fp8' needs a CUDA device: leave it 'auto' on a CPU"):
            function(kv_cache_dtype="fp8")
        for dtype in ("fp16", "FP8", "", None, 8, ["fp8"]):
            with pytest.raises(InvalidRequest, match='kv_cache_dtype must be "auto" or "fp8", got '):
                function(kv_cache_dtype=dtype)
    assert kv_cache.dtype_named("fp8", torch.device("cuda", 1)) == torch.float8_e4m3fn
    assert kv_cache.dtype_named("auto", torch.device("cuda", 1)) is None
