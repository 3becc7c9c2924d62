"""RMS norm in Triton against its reference and against float64, interpreted; and what it takes when compiled.

Tolerances: float32 2e-6 of the value (a sum in another order, a reciprocal square root); float16 half a step, 2^-11 of
the value, and one more half where the reference itself has rounded.
"""

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.norm import add_rms_norm, rms_norm

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
STEP = {torch.float32: 2e-6, torch.float16: 2**-10}


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=STEP[found.dtype])


@DTYPES
@pytest.mark.parametrize("size", [5, 64, 1_000, 4_096])
@pytest.mark.parametrize(("amplitude", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1e2, 3e4)])  # eps outweighs 1e-3²
def test_equals_float64(dtype: torch.dtype, size: int, amplitude: float, offset: float, test_seed: int) -> None:
    x = (noise(test_seed, 3, size) * amplitude + offset).to(dtype)
    weight = noise(1, size) + 1
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    found = rms_norm(x, weight, 1e-5).double()
    half = {torch.float32: 1e-6, torch.float16: 2**-11 * 1.001}[dtype]
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=half)


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 7), (33, 100), (2, 3, 24), (2, 2, 3, 5), (12,), (1, 16_384)])
def test_equals_the_reference(
    dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...], test_seed: int
) -> None:
    x, weight = noise(test_seed, *shape, dtype=dtype), noise(1, shape[-1], dtype=weight_dtype)
    near(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    near(rms_norm(x, weight[None], 1e-6), reference.rms_norm(x, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_heads_in_a_wider_buffer(dtype: torch.dtype, per_head: bool, head_dim: int, test_seed: int) -> None:
    """Queries and keys of a product with values behind them, normed where they are; the values stay."""
    buffer = noise(test_seed, 3, 5, head_dim, dtype=dtype)
    weight = noise(2, 4, head_dim) if per_head else noise(2, head_dim)
    heads, before = buffer[:, :4], buffer.clone()
    expected = reference.rms_norm(heads, weight, 1e-5)
    near(rms_norm(heads, weight, 1e-5), expected)
    assert torch.equal(buffer, before)
    assert rms_norm(heads, weight, 1e-5, out=heads) is heads
    near(heads, expected)
    assert torch.equal(buffer[:, 4], before[:, 4])


def test_per_head_weights_of_one_token_and_of_flat_tokens(test_seed: int) -> None:
    weight = noise(1, 3, 10)
    for shape in ((3, 10), (4, 3, 10), (2, 2, 3, 10)):
        x = noise(test_seed, *shape)
        near(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@DTYPES
@pytest.mark.parametrize("shape", [(0, 9), (1, 4_096), (7, 9), (3, 1_000), (2, 3, 17)])
def test_add_equals_the_reference(dtype: torch.dtype, shape: tuple[int, ...], test_seed: int) -> None:
    x, residual, weight = noise(test_seed, *shape, dtype=dtype), noise(3, *shape, dtype=dtype), noise(4, shape[-1])
    expected, expected_total = reference.add_rms_norm(x, residual, weight, 1e-5)
    found, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    near(found, expected)
    found, total = add_rms_norm(x, residual, weight, 1e-5, out=x, total=residual)  # in place
    assert found is x and total is residual
    assert torch.equal(residual, expected_total)
    near(x, expected)


def test_the_sum_is_rounded_before_it_is_normed(test_seed: int) -> None:
    """Seen where the result is finer than the sum."""
    x, residual, weight = noise(test_seed, 3, 50).half(), noise(2, 3, 50).half(), noise(3, 50)
    found, total = add_rms_norm(x, residual, weight, 1e-5, out=torch.empty(3, 50))
    near(found, reference.rms_norm(total.float(), weight, 1e-5))


def test_rows_with_gaps(test_seed: int) -> None:
    x, residual = noise(test_seed, 4, 30)[:, :11], noise(2, 4, 20)[:, 3:14]
    expected = reference.add_rms_norm(x, residual, torch.ones(11), 1e-5)
    for found, wanted in zip(add_rms_norm(x, residual, torch.ones(11), 1e-5), expected, strict=True):
        near(found, wanted)


def test_heads_with_gaps(test_seed: int) -> None:
    heads, weight = noise(test_seed, 4, 5, 30)[:, 1:4, 2:13], noise(2, 3, 11)
    near(rms_norm(heads, weight, 1e-5), reference.rms_norm(heads, weight, 1e-5))
    near(rms_norm(heads, weight[0], 1e-5), reference.rms_norm(heads, weight[0], 1e-5))


def test_a_row_of_nan_stays_alone(test_seed: int) -> None:
    x = noise(test_seed, 6, 13)
    x[2, 5] = torch.nan
    assert rms_norm(x, torch.ones(13), 1e-5).isnan().any(1).tolist() == [row == 2 for row in range(6)]
    gaps = torch.full((3, 40), torch.nan)
    gaps[:, :13] = x[3:]
    assert not rms_norm(gaps[:, :13], torch.ones(13), 1e-5).isnan().any()
    assert rms_norm(torch.zeros(2, 13), torch.ones(13), 1e-5).eq(0).all()


@pytest.mark.parametrize(
    ("shape", "weight", "message"),
    [((2, 3), (4,), "weight"), ((2, 5, 3), (4, 3), "weight"), ((1, 16_385), (16_385,), "at most")],
)
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(torch.zeros(shape), torch.zeros(weight), 1e-5)
    with pytest.raises(ValueError, match="side by side"):
        rms_norm(torch.zeros(4, 4).t(), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="do not match"):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), 1e-5)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    pointers = {"x": "*bf16", "weight": "*fp32", "out": "*bf16", "size": "i32", "eps": "fp32"}
    strides = ("x_stride", "x_head_stride", "out_stride", "out_head_stride", "weight_stride")
    alone = {**pointers, **dict.fromkeys(strides, "i32")}
    added_strides = ("x_stride", "residual_stride", "out_stride", "total_stride")
    added = {**pointers, "residual": "*bf16", "total": "*bf16", **dict.fromkeys(added_strides, "i32")}
    builds = [
        Build(
            f"embedllm_kernels.triton.norm:{kernel}",
            signature,
            {"BLOCK": block},
            divisible=tuple(name for name in signature if name != "eps"),
            num_warps=num_warps,
        )
        for block, num_warps in ((128, 1), (4_096, 8), (16_384, 16))
        for kernel, signature in (("_rms_norm", alone), ("_add_rms_norm", added))
    ]
    for build, found in zip(builds, compile_for(capability, builds), strict=True):
        assert found.registers <= 128 and found.local == 0 and found.shared <= 128, build
        assert build.constants["BLOCK"] < 4_096 or "ld.global.v4" in found.ptx, "loads are not vectorised"
