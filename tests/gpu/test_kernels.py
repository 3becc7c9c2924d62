"""Every Triton kernel on a card, in bfloat16 and float32, against its reference computed in float64 on the host.

Tolerances: float32 1e-5 (products in full float32), bfloat16 two roundings of the result, 2^-7, and for attention and
products over many values 2^-6.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference, sampling
from tests.kernels.paged import MIXES, Ragged, draw

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
STEP = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def noise(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, expected: Tensor, dtype: torch.dtype, roundings: float = 1.0) -> None:
    step = STEP[dtype] * roundings
    torch.testing.assert_close(found.cpu().double(), expected.double(), atol=step, rtol=step)


def moved(case: Ragged) -> tuple[Tensor, ...]:
    """The case on the card; the layer's view of its cache keeps the gaps between its blocks."""
    blocks = torch.full((len(case.cache), 3, *case.cache.shape[1:]), torch.nan, device="cuda").to(case.cache.dtype)
    blocks[:, 1] = case.cache.cuda()
    return case.q.cuda(), blocks[:, 1], case.tables.cuda(), case.query_starts.cuda(), case.seq_lens.cuda()


@DTYPES
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str
)
def test_attention(mix: str, block_size: int, options: dict[str, object], dtype: torch.dtype, test_seed: int) -> None:
    from embedllm_kernels.triton.attention import paged_attention

    case = draw(test_seed, MIXES[mix], heads=(4, 2), dims=(64, 64), block_size=block_size, dtype=dtype)
    wide = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
    counts = case.query_starts.diff().tolist()
    found = paged_attention(
        *moved(case),
        num_kv_heads=2,
        scale=0.3,
        max_query_len=max(counts),
        max_seq_len=int(case.seq_lens.max()),
        **wide,
    )
    expected = reference.paged_attention(
        case.q.float(),
        case.cache.float(),
        case.tables,
        case.query_starts,
        case.seq_lens,
        num_kv_heads=2,
        scale=0.3,
        **options,
    )
    near(found, expected, dtype, 2)


@pytest.mark.parametrize("form", ["decode", "prefill"])
@pytest.mark.parametrize("instruction", [False, True])
def test_attention_over_every_byte_of_float8(
    form: str, instruction: bool, monkeypatch: pytest.MonkeyPatch, test_seed: int
) -> None:
    """A sequence per byte, whose only value it is; and a ragged step. By integers, and by the card's instruction."""
    from embedllm_kernels.triton import attention

    if instruction and torch.cuda.get_device_capability() < attention.FLOAT8_SINCE:
        pytest.skip("the card has no instruction for it")
    monkeypatch.setattr(attention, "FLOAT8_SINCE", (0, 0) if instruction else (99, 0))
    every = torch.arange(256, dtype=torch.uint8)
    cache = torch.cat((torch.zeros(256, 1, 16, dtype=torch.uint8), every[:, None, None].expand(-1, 1, 16)), 2)
    cache = cache.view(torch.float8_e4m3fn).cuda()
    counts = torch.arange(257, dtype=torch.int32, device="cuda")
    q = torch.ones(256, 1, 16, dtype=torch.bfloat16, device="cuda")
    sizes = {"num_kv_heads": 1, "scale": 1.0, "max_query_len": 1, "max_seq_len": 1, "form": form}
    ones = torch.ones(256, dtype=torch.int32, device="cuda")
    found = attention.paged_attention(q, cache, counts[:256, None], counts, ones, **sizes)[:, 0, 0]
    expected = every.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found.cpu().float(), expected, atol=0, rtol=0, equal_nan=True)
    case = draw(test_seed, MIXES["everything"], heads=(4, 2), dims=(64, 64), block_size=16, dtype=torch.bfloat16)
    case.cache = case.cache.to(torch.float8_e4m3fn)
    scales = {"num_kv_heads": 2, "scale": 0.3, "k_scale": 0.5, "v_scale": 1.7}
    found = attention.paged_attention(*moved(case), max_query_len=19, max_seq_len=70, form=form, **scales)
    rest = case.tables, case.query_starts, case.seq_lens
    near(found, reference.paged_attention(case.q.float(), case.cache, *rest, **scales), torch.bfloat16, 2)


@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_long_attention_in_splits(num_splits: int, test_seed: int) -> None:
    from embedllm_kernels.triton.attention import paged_attention

    case = draw(test_seed, [(5_000, 1), (1, 1), (700, 1)], heads=(8, 2), dims=(128, 128), block_size=16)
    found = paged_attention(
        *moved(case), num_kv_heads=2, scale=0.1, max_query_len=1, max_seq_len=5_000, num_splits=num_splits
    )
    expected = reference.paged_attention(
        case.q, case.cache, case.tables, case.query_starts, case.seq_lens, num_kv_heads=2, scale=0.1
    )
    near(found, expected, torch.float32)


@DTYPES
@pytest.mark.parametrize("size", [5, 64, 1_000, 4_096])
def test_norms(size: int, dtype: torch.dtype, test_seed: int) -> None:
    from embedllm_kernels.triton.norm import add_rms_norm, rms_norm

    x, residual = noise(test_seed, 33, size, dtype=dtype), noise(1, 33, size, dtype=dtype)
    weight = noise(2, size, dtype=torch.float32)
    near(rms_norm(x.cuda(), weight.cuda(), 1e-5), reference.rms_norm(x.double().float(), weight, 1e-5), dtype)
    normed, total = add_rms_norm(x.cuda(), residual.cuda(), weight.cuda(), 1e-5)
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    near(normed, expected[0], dtype)
    near(total, expected[1], dtype)


@DTYPES
def test_rope_and_store(dtype: torch.dtype, test_seed: int) -> None:
    from embedllm_kernels.triton.rotary_store import rotary_store

    tokens, heads, kv_heads, dim = 37, 6, 2, 64
    qkv = noise(test_seed, tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = torch.rand(tokens, dim // 2, generator=torch.Generator().manual_seed(1)) * 6
    slots = torch.randperm(160, generator=torch.Generator().manual_seed(2))[:tokens].int()
    cache = torch.zeros(10, 16, kv_heads * 2 * dim, dtype=dtype)
    q, k, v = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    turned = reference.rotary(k, angle.cos(), angle.sin())
    expected = cache.clone()
    reference.kv_store(expected, torch.cat((turned.flatten(1), v.flatten(1)), 1), slots)
    device_qkv, device_cache = qkv.cuda(), cache.cuda()
    rotary_store(
        device_qkv, angle.cos().cuda(), angle.sin().cuda(), device_cache, slots.cuda(), num_heads=heads,
        num_kv_heads=kv_heads,
    )  # fmt: skip
    near(device_cache, expected, dtype, 2)
    near(device_qkv.view(tokens, -1, dim)[:, :heads], reference.rotary(q, angle.cos(), angle.sin()), dtype, 2)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str, dtype: torch.dtype, test_seed: int) -> None:
    from embedllm_kernels.triton.gated import gated

    x = noise(test_seed, 19, 2_200, dtype=dtype) * 3
    near(gated(x.cuda(), activation), reference.gated(x, activation), dtype, 4)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_experts(tokens: int, dtype: torch.dtype, test_seed: int) -> None:
    from embedllm_kernels.triton.moe import moe

    x, gate_up = noise(test_seed, tokens, 96, dtype=dtype), noise(1, 8, 2 * 80, 96, dtype=dtype) * 0.2
    down = noise(2, 8, 96, 80, dtype=dtype) * 0.2
    weights, ids = reference.route(noise(3, tokens, 8, dtype=torch.float32), 3, True)
    found = moe(x.cuda(), weights.cuda(), ids.cuda(), gate_up.cuda(), down.cuda())
    near(found, reference.moe(x.float(), weights, ids, gate_up.float(), down.float()), dtype, 8)


@pytest.mark.parametrize("size", [97, 5_000, 151_936])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.8, 0.0), (50, 0.9, 0.05)])
def test_draws_are_those_of_the_host(size: int, top_k: int, top_p: float, min_p: float, test_seed: int) -> None:
    """The same key gives the same token on every device, but where two scores are as good as equal."""
    from embedllm_kernels.triton.sampling import sample

    rows = 24
    logits = noise(test_seed, rows, size, dtype=torch.float32) * 3
    keys = [sampling.fold(test_seed, row) for row in range(rows)]
    temperature, words = torch.full((rows,), 0.8), sampling.key_words(keys)
    each: Callable[[float, torch.dtype], Tensor] = lambda value, dtype: torch.full((rows,), value, dtype=dtype)  # noqa: E731
    ids, best = sample(
        logits.cuda(),
        temperature.cuda(),
        each(top_k, torch.int32).cuda(),
        each(top_p, torch.float32).cuda(),
        each(min_p, torch.float32).cuda(),
        words.cuda(),
        filtered=top_k > 0 or top_p < 1 or min_p > 0,
    )
    assert torch.equal(best.cpu(), logits.amax(1))
    if top_k or top_p < 1 or min_p:
        limits = each(top_k, torch.int64), each(top_p, torch.float64), each(min_p, torch.float64)
        expected = sampling.draw_filtered(logits, logits.amax(1), temperature, words, *limits)
    else:
        expected = sampling.draw(logits, logits.amax(1), temperature, words, sampling.mix_ids(torch.arange(size)))
    assert int((ids.cpu() != expected).sum()) <= 1


def test_blocks_beyond_two_to_the_31_values() -> None:
    """Block ids are widened before they are multiplied: the last block of a large cache is written and read."""
    from embedllm_kernels.triton.rotary_store import kv_store

    width, blocks = 1_024, 2**31 // (16 * 1_024) + 8
    if torch.cuda.mem_get_info()[0] < 3 * blocks * 16 * width * 2:
        pytest.skip("the card has too little memory")
    cache = torch.zeros(blocks, 16, width, dtype=torch.bfloat16, device="cuda")
    rows = torch.ones(1, width, dtype=torch.bfloat16, device="cuda")
    kv_store(cache, rows, torch.tensor([blocks * 16 - 1], dtype=torch.int32, device="cuda"))
    assert cache[-1, -1].eq(1).all() and not cache[-1, -2].any() and not cache[0].any()
