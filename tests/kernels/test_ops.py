"""What a step calls (ops, layers) against the reference, in float32 and bfloat16.

Tolerances: float32 1e-5; bfloat16 two roundings, 2^-7 of the value (rotary_ rounds after each of its two products).
"""

import pytest
import torch
from torch import Tensor

from embedllm import ops
from embedllm.layers import MLP, Experts, Head, Linear, Norm
from embedllm_kernels import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float = 1.0) -> None:
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * roundings
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=step, rtol=step)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
def test_rms_norm(dtype: torch.dtype, test_seed: int) -> None:
    weight = noise(1, 12)
    x = noise(test_seed, 7, 12, dtype=dtype)
    near(Norm(weight, 1e-5)(x), reference.rms_norm(x, weight, 1e-5), dtype)
    near(Norm(weight, 1e-5)(x * 1e-4), reference.rms_norm(x * 1e-4, weight, 1e-5), dtype)  # eps outweighs x²
    near(Norm(weight, 1e-5)(x * 1e4 + 3e4), reference.rms_norm(x * 1e4 + 3e4, weight, 1e-5), dtype)
    heads = noise(test_seed, 7, 5, 12, dtype=dtype)[:, :3]  # a view of a wider buffer, one weight per head
    per_head = noise(2, 3, 12)
    near(Norm(per_head, 1e-5)(heads), reference.rms_norm(heads, per_head, 1e-5), dtype)
    assert Norm(weight, 1e-5)(torch.zeros(2, 12, dtype=dtype)).eq(0).all()
    x[3] = torch.nan
    assert Norm(weight, 1e-5)(x).isnan().any(1).tolist() == [row == 3 for row in range(7)]


@DTYPES
@pytest.mark.parametrize("amplitude", [1.0, 1.3])
@pytest.mark.parametrize("turned", [4, 8])
def test_rotary(turned: int, amplitude: float, dtype: torch.dtype, test_seed: int) -> None:
    """Also at positions in the hundred thousands, where angles in bfloat16 would mean nothing."""
    positions = torch.tensor([0, 1, 2, 77, 131_071], dtype=torch.int32)
    frequencies = 10_000.0 ** -(torch.arange(turned // 2) / (turned // 2))
    angle = positions[:, None].double() * frequencies.double()
    buffer = noise(test_seed, 5, 6, 8, dtype=dtype)
    x, before = buffer[:, :4], buffer.clone()
    expected = reference.rotary(x.float(), (angle.cos() * amplitude).float(), (angle.sin() * amplitude).float())
    ops.rotary_(x, *ops.angles(positions, frequencies, amplitude, dtype))
    step = {torch.float32: 2e-2, torch.bfloat16: 4e-2}[dtype]  # float32 angles near 131,071 are steps of 2^-7 apart
    torch.testing.assert_close(x[4].float(), expected[4], atol=step, rtol=step)
    near(x[:4], expected[:4].to(dtype), dtype, 4)
    assert torch.equal(x[..., turned:], before[:, :4, turned:])
    assert torch.equal(buffer[:, 4:], before[:, 4:])


@DTYPES
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_mlp(activation: str, pack: bool, dtype: torch.dtype, test_seed: int) -> None:
    gate_up, down = noise(1, 24, 16, dtype=dtype), noise(2, 16, 12, dtype=dtype)
    x, residual = noise(test_seed, 5, 16, dtype=dtype), noise(3, 5, 16, dtype=dtype)
    wide, narrow = noise(4, 24, dtype=dtype), noise(5, 16, dtype=dtype)
    for biases in ((None, None), (wide, narrow)):
        part = MLP(gate_up, down, activation, biases, pack)
        inner = reference.gated(reference.linear(x, gate_up, biases[0]), activation)
        near(part(x), reference.linear(inner, down, biases[1]), dtype, 24)  # sums of values of size 16
        near(part(x, residual), reference.linear(inner, down, biases[1], residual), dtype, 24)


@DTYPES
@pytest.mark.parametrize("renormalise", [False, True])
def test_experts(renormalise: bool, dtype: torch.dtype, test_seed: int) -> None:
    """Including experts nobody chose, and a token of NaN that must not reach another's."""
    router = noise(1, 8, 16)
    router[5] = router[6] = -1e3 * router.sum(0).sign()
    router = router.to(dtype)
    gate_up, down = noise(2, 8, 24, 16, dtype=dtype) / 4, noise(3, 8, 16, 12, dtype=dtype) / 4
    x = noise(test_seed, 19, 16, dtype=dtype)
    part = Experts(Linear(router), gate_up, down, "silu", 3, renormalise, True)
    weights, ids = reference.route(reference.linear(x, router), 3, renormalise)
    expected = reference.moe(x, weights, ids, gate_up, down)
    near(part(x), expected, dtype, 8)
    near(part(x, x), expected + x, dtype, 8)
    x[4] = torch.nan
    spoilt = part(x)
    assert spoilt[4].isnan().all()
    assert not spoilt[torch.arange(19) != 4].isnan().any()


def test_head_divides_then_caps(test_seed: int) -> None:
    weight, hidden = noise(1, 40, 16), noise(test_seed, 3, 16)
    plain = hidden @ weight.T
    near(Head(Linear(weight), 1.0, None)(hidden), plain, torch.float32, 10)
    near(Head(Linear(weight), 4.0, 2.0)(hidden), reference.soft_cap(plain / 4, 2.0), torch.float32, 10)
    assert Head(Linear(weight.bfloat16()), 1.0, None)(hidden.bfloat16()).dtype == torch.float32
