"""Rotation and storing of keys and values in Triton against the reference, interpreted; what they take when compiled.

Tolerances: none without a norm, since every product and sum is rounded where the reference rounds it. With a norm the
reference sums in another order: float32 1e-5, float16 2^-9 of values of size 4 (the norm may round to the next value,
which two products then carry on). A float8 cache holds exactly what torch's cast makes of the values.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.rotary_store import kv_store, rotary_store

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
FP8 = torch.float8_e4m3fn
# heads, kv_heads, k_dim, v_dim, d
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 64, 64, 32),
        (7, 1, 80, 80, 40),
        (3, 3, 96, 96, 16),
        (5, 1, 128, 80, 64),
        (2, 1, 256, 256, 32),
        (9, 3, 5, 3, 1),
    ],
    ids=str,
)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case:
    """A step of five tokens, the third of them padding, over one layer of a cache of NaN."""

    def __init__(self, seed: int, shape: tuple[int, ...], dtype: torch.dtype, tokens: int = 5) -> None:
        self.heads, self.kv_heads, self.k_dim, v_dim, d = shape
        self.q_size, self.k_size = self.heads * self.k_dim, self.kv_heads * self.k_dim
        width = self.k_size + self.kv_heads * v_dim
        self.wide = noise(seed, tokens, self.q_size + width + 3, dtype=dtype)
        self.qkv = self.wide[:, : self.q_size + width]  # rows with a gap
        angle = noise(seed + 1, tokens, d + 2)[:, :d] * 9
        self.cos, self.sin = angle.cos(), angle.sin()
        self.cache = torch.full((6, 3, 4, width), torch.nan, dtype=dtype)[:, 1]
        self.slots = torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:tokens].int()
        self.slots[2:3] = -1
        self.real = self.slots >= 0

    def expected(self, q_weight: Tensor | None = None, k_weight: Tensor | None = None, **options: Any) -> Tensor:
        """qkv afterwards."""
        q, k, v = self.qkv.split([self.q_size, self.k_size, self.qkv.shape[1] - self.q_size - self.k_size], 1)
        parts = []
        for part, weight in ((q, q_weight), (k, k_weight)):
            heads = part.unflatten(1, (-1, self.k_dim))
            if weight is not None:
                heads = reference.rms_norm(heads, weight, 1e-5)
            parts.append(reference.rotary(heads, self.cos, self.sin, **options).flatten(1))
        return torch.where(self.real[:, None], torch.cat((*parts, v), 1), self.qkv)

    def run(self, **options: Any) -> None:
        cos, sin, sizes = self.cos, self.sin, {"num_heads": self.heads, "num_kv_heads": self.kv_heads}
        rotary_store(self.qkv, cos, sin, self.cache, self.slots, **sizes, **options)

    def stored(self, qkv: Tensor) -> Tensor:
        """The cache after reference.kv_store of the rows that are not padding."""
        cache = self.cache.clone()
        cache.copy_(torch.full(cache.shape, torch.nan))
        reference.kv_store(cache, qkv[self.real, self.q_size :], self.slots[self.real])
        return cache


def exactly(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


@DTYPES
@SHAPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_the_reference(shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype, test_seed: int) -> None:
    case = Case(test_seed, shape, dtype)
    expected, behind = case.expected(interleaved=interleaved), case.wide[:, -3:].clone()
    case.run(interleaved=interleaved)
    exactly(case.qkv, expected)
    exactly(case.cache, case.stored(expected))
    assert torch.equal(case.wide[:, -3:], behind)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-5), (torch.float16, 2**-9)], ids=str)
@SHAPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_before_the_rotation(
    shape: tuple[int, ...], interleaved: bool, dtype: torch.dtype, step: float, test_seed: int
) -> None:
    case = Case(test_seed, shape, dtype)
    weights = noise(8, case.k_dim) + 1, noise(9, case.k_dim) + 1
    expected = case.expected(*weights, interleaved=interleaved)
    case.run(interleaved=interleaved, q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    torch.testing.assert_close(case.qkv, expected, atol=step, rtol=step)
    exactly(case.cache, case.stored(case.qkv))


def test_norm_with_weights_of_each_head(test_seed: int) -> None:
    case = Case(test_seed, (5, 2, 24, 24, 8), torch.float32)
    both = noise(8, 7, 24) + 1
    weights = both[:5], both[5:]
    expected = case.expected(*weights)
    case.run(q_weight=weights[0], k_weight=weights[1], eps=1e-5)
    torch.testing.assert_close(case.qkv, expected, atol=1e-5, rtol=1e-5)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 11])
def test_many_heads_and_many_tokens(tokens: int, dtype: torch.dtype, test_seed: int) -> None:
    """More heads and values than one program takes."""
    case = Case(test_seed, (17, 9, 128, 128, 64), dtype, tokens)
    expected = case.expected()
    case.run()
    exactly(case.qkv, expected)
    exactly(case.cache, case.stored(expected))


@pytest.mark.parametrize("slot_dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_slots_of_any_integer_type(slot_dtype: torch.dtype, test_seed: int) -> None:
    case = Case(test_seed, (2, 1, 8, 8, 4), torch.float32)
    expected = case.stored(case.expected())
    case.slots = case.slots.to(slot_dtype)
    case.run()
    exactly(case.cache, expected)


def test_padding_reads_and_writes_nothing(test_seed: int) -> None:
    case = Case(test_seed, (2, 1, 8, 8, 4), torch.float32)
    case.slots[:] = -1
    before = case.wide.clone()
    case.run()
    assert torch.equal(case.wide, before) and case.cache.isnan().all()


def bits(x: Tensor) -> list[int]:
    return x.view(torch.uint8).flatten().tolist()


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 0.37, 1.7])
def test_a_float8_cache_is_torchs_cast(dtype: torch.dtype, scale: float, test_seed: int) -> None:
    """Every magnitude there is, with ties, subnormals and both zeros, through kv_store."""
    every = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    halves = (every[1:] + every[:-1]) / 2
    around = torch.cat((every, halves, halves * (1 + 2**-10), halves * (1 - 2**-10), every[:-1] * 1.01))
    spread = noise(test_seed, 2_000) * torch.exp(noise(test_seed + 1, 2_000) * 4)
    values = (torch.cat((around, -around, spread.clamp(-448, 448))) * scale).to(dtype)
    values = values[(values.float() / scale).abs() <= 448][None]
    cache = torch.zeros(2, 3, values.shape[1], dtype=FP8)
    kv_store(cache, values, torch.tensor([4]), scale=scale)
    assert bits(cache[1, 1]) == bits((values[0].float() / scale).to(FP8))
    assert not cache[0].float().any() and not cache[1, 0].float().any()


def test_a_float8_cache_is_bound_and_keeps_nan() -> None:
    cache = torch.zeros(1, 1, 6, dtype=FP8)
    kv_store(cache, torch.tensor([[500.0, -1e30, torch.inf, -torch.inf, torch.nan, 449.0]]), torch.tensor([0]))
    torch.testing.assert_close(
        cache[0, 0].float(), torch.tensor([448.0, -448.0, 448.0, -448.0, torch.nan, 448.0]), equal_nan=True
    )


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_into_a_float8_cache(interleaved: bool, dtype: torch.dtype, test_seed: int) -> None:
    """Keys and values with scales of their own; head dimensions that are kept are scaled as well."""
    case = Case(test_seed, (5, 2, 24, 16, 8), dtype)
    expected = case.expected(interleaved=interleaved)
    case.cache = case.cache.to(FP8)
    case.run(interleaved=interleaved, k_scale=0.013, v_scale=0.21)
    exactly(case.qkv, expected)
    rows = expected[case.real, case.q_size :].float()
    rows = torch.cat((rows[:, : case.k_size] / 0.013, rows[:, case.k_size :] / 0.21), 1)
    assert rows.abs().max() < 448
    slots = case.slots[case.real].long()
    assert bits(case.cache[slots // 4, slots % 4]) == bits(rows.to(FP8))
    assert case.cache.float().isnan().all(2).sum() == 24 - len(slots)


@DTYPES
@pytest.mark.parametrize("width", [1, 33, 1_024, 2_500])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_kv_store_equals_the_reference(tokens: int, width: int, dtype: torch.dtype, test_seed: int) -> None:
    cache = torch.full((5, 2, 3, width), torch.nan, dtype=dtype)[:, 1]
    rows = noise(test_seed, tokens, width + 5, dtype=dtype)[:, 5:]
    slots = torch.randperm(15, generator=torch.Generator().manual_seed(test_seed))[:tokens]
    expected = cache.clone()
    reference.kv_store(expected, rows[1:], slots[1:])
    slots[:1] = -1
    kv_store(cache, rows, slots)
    exactly(cache, expected)


def test_the_last_block_past_two_to_the_31_values() -> None:
    """One layer of a cache of 4 GiB; only pages that are touched take memory."""
    num_blocks, layers, block_size, width = 2**17 + 2, 2, 16, 512
    try:
        cache = torch.empty((num_blocks, layers, block_size, width), dtype=torch.float16)[:, 1]
    except RuntimeError:
        pytest.skip("the system does not give that much address space")
    assert (num_blocks - 1) * cache.stride(0) > 2**31
    last = num_blocks * block_size - 1
    rows = noise(1, 2, width, dtype=torch.float16)
    kv_store(cache, rows, torch.tensor([last - 1, 3], dtype=torch.int32))
    assert torch.equal(cache[-1, -2], rows[0]) and torch.equal(cache[0, 3], rows[1])
    qkv = noise(2, 1, 2 * 128 + width, dtype=torch.float16)
    still = torch.ones(1, 64), torch.zeros(1, 64)  # turns nothing
    slots = torch.tensor([last], dtype=torch.int32)
    rotary_store(qkv, *still, cache, slots, num_heads=2, num_kv_heads=2)
    assert torch.equal(cache[-1, -1], qkv[0, 256:])
    assert torch.equal(cache[-1, -2], rows[0])


def test_what_does_not_fit_is_refused() -> None:
    cache, angles, slots = (
        torch.zeros(2, 4, 16),
        (torch.ones(1, 4), torch.zeros(1, 4)),
        torch.zeros(1, dtype=torch.int32),
    )
    heads = {"num_heads": 2, "num_kv_heads": 1}
    with pytest.raises(ValueError, match="heads"):
        rotary_store(torch.zeros(1, 31), *angles, cache, slots, **heads)
    with pytest.raises(ValueError, match="turn heads of 8"):
        rotary_store(torch.zeros(1, 32), torch.ones(1, 5), torch.ones(1, 5), cache, slots, **heads)
    with pytest.raises(ValueError, match="two weights or none"):
        rotary_store(torch.zeros(1, 32), *angles, cache, slots, **heads, q_weight=torch.ones(8))
    with pytest.raises(ValueError, match="weight"):
        weights = {"q_weight": torch.ones(1, 8), "k_weight": torch.ones(1, 8)}
        rotary_store(torch.zeros(1, 32), *angles, cache, slots, **heads, **weights)
    with pytest.raises(ValueError, match="side by side"):
        rotary_store(torch.zeros(32, 2).t()[:1], *angles, cache, slots, **heads)
    with pytest.raises(ValueError, match="do not fit"):
        kv_store(cache, torch.zeros(1, 15), slots)


INTS = ("num_heads", "num_turned", "v_width", "block_size", "qkv_stride", "cos_stride", "sin_stride")
STRIDES = ("block_stride", "slot_stride", "q_weight_stride", "k_weight_stride")


def build(head_dim: int, pairs: int, *, norm: bool = False, fp8: bool = False, interleaved: bool = False) -> Build:
    kept, padded = head_dim - 2 * pairs, 1 << (head_dim - 1).bit_length()
    constants: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "PAIRS": pairs,
        "INTERLEAVED": interleaved,
        "FP8": fp8,
        "HEADS": 1_024 // padded,
        "BLOCK_PAIRS": 1 << (pairs - 1).bit_length(),
        "BLOCK_KEPT": 1 << (kept - 1).bit_length() if kept else 0,
        "BLOCK": 1_024,
    }
    signature = {
        **{"qkv": "*bf16", "cos": "*fp32", "sin": "*fp32", "cache": "*u8" if fp8 else "*bf16", "slots": "*i32"},
        **{"eps": "fp32", "k_scale": "fp32", "v_scale": "fp32"},
        **dict.fromkeys((*INTS, *STRIDES), "i32"),
    }
    if norm:
        signature |= {"q_weight": "*fp32", "k_weight": "*fp32"}
    else:
        constants |= {"q_weight": None, "k_weight": None}
    aligned = {"qkv", "cos", "sin", "cache", "q_weight", "k_weight", *INTS, *STRIDES}
    divisible = tuple(name for name in signature if name in aligned)
    return Build("embedllm_kernels.triton.rotary_store:_rotary_store", signature, constants, divisible, num_warps=2)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    builds = [
        build(128, 64),
        build(128, 64, norm=True),
        build(128, 64, norm=True, fp8=True),
        build(256, 32, norm=True),
        build(96, 48),
        build(64, 32, interleaved=True),
    ]
    builds.append(
        Build(
            "embedllm_kernels.triton.rotary_store:_kv_store",
            {
                **{"cache": "*bf16", "rows": "*bf16", "slots": "*i32", "scale": "fp32"},
                **dict.fromkeys(("width", "block_size", "row_stride", "block_stride", "slot_stride"), "i32"),
            },
            {"FP8": False, "BLOCK": 1_024},
            divisible=("cache", "rows", "width", "row_stride", "block_stride", "slot_stride"),
            num_warps=2,
        )
    )
    for build_, found in zip(builds, compile_for(capability, builds), strict=True):
        assert found.registers <= 128 and found.local == 0 and found.shared <= 8_192, build_
        wide = "ld.global.v4" in found.ptx and "st.global.v4" in found.ptx
        assert wide, f"{build_} is not vectorised"
