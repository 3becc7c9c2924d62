"""Packed linears against the plain product, what keeps them from being packed, and that the plain weight goes.

Tolerances: float32 1e-5 of the result's scale (another order of summation); bfloat16 one rounding, 2^-8 of it.
"""

import gc
import weakref

import pytest
import torch

from embedllm_kernels import reference
from embedllm_kernels.cpu import linear as module
from embedllm_kernels.cpu.linear import Weight, why_not

SHAPES = [(8, 16), (17, 5), (96, 64), (300, 64), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_product(shape: tuple[int, int], dtype: torch.dtype, bias: bool, test_seed: int) -> None:
    generator = torch.Generator().manual_seed(test_seed)
    w = torch.randn(shape, generator=generator).to(dtype)
    b = torch.randn(shape[0], generator=generator).to(dtype) if bias else None
    weight = Weight(w, b)
    for tokens in (1, 2, 7, 16, 33):
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        residual = torch.randn(tokens, shape[0], generator=generator).to(dtype)
        exact = x.double() @ w.double().T + (0 if b is None else b.double())
        scale = float(x.double().norm(dim=1).max() * w.double().norm(dim=1).max()) + 4
        tolerance = scale * {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        before = residual.clone()
        assert float((weight(x) - exact).abs().max()) <= tolerance
        assert float((weight(x, residual) - exact - residual).abs().max()) <= 2 * tolerance
        scaled = weight(x, factor=residual)
        assert float((scaled - exact * residual).abs().max()) <= tolerance * float(residual.abs().max())
        for name in ("silu", "gelu_tanh"):
            expected = reference.activate(exact, name)
            assert float((weight(x, activation=name) - expected).abs().max()) <= 2 * tolerance
        assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_do_not_touch_each_other(dtype: torch.dtype, test_seed: int) -> None:
    """NaN and infinity stay in their row, and a row's result does not depend on the others' values."""
    generator = torch.Generator().manual_seed(test_seed)
    weight = Weight(torch.randn(24, 32, generator=generator).to(dtype))
    x = torch.randn(16, 32, generator=generator).to(dtype)
    clean = weight(x)
    x[3], x[9] = torch.nan, torch.inf
    spoilt = weight(x)
    keep = [row for row in range(16) if row not in (3, 9)]
    assert torch.equal(spoilt[keep], clean[keep])
    assert spoilt[3].isnan().all()


def test_the_plain_weight_is_not_kept_once_packed() -> None:
    plain = torch.randn(64, 64)
    seen = weakref.ref(plain)
    weight = Weight(plain)
    if weight.reason:
        pytest.skip(weight.reason)
    del plain
    gc.collect()
    assert seen() is None
    assert weight.plain is None
    assert weight.num_bytes == 64 * 64 * 4


def test_why_a_weight_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    off = Weight(w, None, pack=False)
    assert off.reason == "packing is switched off"
    assert torch.equal(off(x), torch.nn.functional.linear(x, w))
    assert why_not(w.double()) == "torch.float64 weights are not packed"
    assert why_not(w.to("meta")) == "weights on meta are not packed"
    monkeypatch.setattr(module.torch.backends.mkldnn, "is_available", lambda: False)
    without = Weight(w)
    assert without.reason == "this torch build has no oneDNN"
    assert torch.equal(without(x, torch.ones(3, 4)), torch.nn.functional.linear(x, w) + 1)
