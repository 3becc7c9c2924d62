"""The grouped CPU attention against the reference: ragged, odd, and with NaN in every slot that holds no token.

Tolerances: float32 1e-5. bfloat16 2e-2: torch's fused attention rounds the shares to bfloat16 before it multiplies by
V, the reference does not; outputs here are of size 1, whose bfloat16 spacing is 4e-3 to 8e-3.
"""

import random

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from embedllm_kernels.cpu import attention
from tests.kernels.paged import MIXES, Ragged, draw

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def both(
    case: Ragged, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    heads, k_dim = case.q.shape[1:]
    v_dim = case.cache.shape[2] // case.num_kv_heads - k_dim
    groups = attention.prepare(
        case.tables.long(),
        case.query_starts.tolist(),
        case.seq_lens.tolist(),
        block_size=case.cache.shape[1],
        slot_bytes=case.cache.shape[2] * case.cache.dtype.itemsize,
        num_heads=heads,
        dtype=case.q.dtype,
        window=window,
        exact=softcap is not None or sinks is not None,
    )
    out = torch.full((len(case.q), heads, v_dim), torch.nan, dtype=case.q.dtype)
    options = {"num_kv_heads": case.num_kv_heads, "scale": 0.3, "softcap": softcap, "sinks": sinks}
    fast = attention.paged_attention(case.q, case.cache, groups, out=out, **options)
    slow = reference.paged_attention(
        case.q, case.cache, case.tables, case.query_starts, case.seq_lens, window=window, **options
    )
    return fast, slow


def check(case: Ragged, **options: object) -> None:
    fast, slow = both(case, **options)
    tolerance = TOLERANCE[case.q.dtype]
    assert not slow.isnan().any()
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 1}, {"window": 6}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, options: dict[str, object], dtype: torch.dtype, test_seed: int) -> None:
    check(draw(test_seed, MIXES[mix], dtype=dtype), **options)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (7, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (24, 16)], ids=str)
def test_shapes(dims: tuple[int, int], heads: tuple[int, int], block_size: int, test_seed: int) -> None:
    check(draw(test_seed, MIXES["everything"], heads=heads, dims=dims, block_size=block_size))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sinks(window: int | None, softcap: float | None, test_seed: int) -> None:
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(test_seed))
    check(draw(test_seed, MIXES["everything"]), window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("number", range(60))
def test_random_steps(number: int, test_seed: int) -> None:
    """Any step: up to 12 sequences of up to 90 tokens, any options."""
    rng = random.Random(test_seed)
    spans = []
    for _ in range(rng.randint(1, 12)):
        length = rng.randint(1, 90)
        spans.append((length, rng.choice([1, 1, 1, min(length, rng.randint(1, 5)), rng.randint(1, length)])))
    if rng.random() < 0.7:
        spans.sort(key=lambda span: (span[1], span[0]))
    kv_heads = rng.choice([1, 2])
    case = draw(
        test_seed,
        spans,
        heads=(kv_heads * rng.choice([1, 2, 7]), kv_heads),
        dims=rng.choice([(16, 16), (8, 8), (16, 8)]),
        block_size=rng.choice([1, 2, 5, 16]),
        dtype=rng.choice([torch.float32, torch.bfloat16]),
    )
    sinks = torch.randn(case.q.shape[1]) if rng.random() < 0.3 else None
    check(case, window=rng.choice([None, 1, 3, 20]), softcap=rng.choice([None, None, 2.0]), sinks=sinks)


def test_long_chunks_are_cut_and_long_batches_split(monkeypatch: pytest.MonkeyPatch, test_seed: int) -> None:
    """The bounds on memory change the grouping, never the result."""
    spans = [(90, 1), (91, 1), (92, 1), (95, 1), (40, 13), (77, 50), (90, 90)]
    for name, value in (("MAX_MASK", 200), ("MAX_SCORES", 900), ("MAX_GATHER_BYTES", 20_000), ("SPLIT_SLOTS", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(attention, name, value)
            for options in ({}, {"window": 9}, {"softcap": 2.0}):
                check(draw(test_seed, spans), **options)


def test_similar_decodes_share_a_group() -> None:
    """A group costs as much as hundreds of slots: 32 decodes must not become 32 groups, nor pad 10 tokens to 3,000."""
    lengths = [150 + i for i in range(32)]
    starts = list(range(33))

    def groups(lengths: list[int], window: int | None = None) -> list[attention.Group]:
        tables = torch.zeros((len(lengths), 200), dtype=torch.int64)
        return attention.prepare(
            tables, starts, lengths, block_size=16, slot_bytes=512, num_heads=14, dtype=torch.float32, window=window
        )

    assert len(groups(lengths)) <= 2
    assert [group.size for group in groups([10] * 31 + [3_000])] == [31, 1]
    windowed = groups([3_000] * 32, window=64)
    assert len(windowed) == 1
    assert windowed[0].length <= 64 + 16, "blocks before the window are not gathered"


def test_whole_prompts_need_no_mask() -> None:
    tables = torch.arange(4)[None]
    options = {"block_size": 16, "slot_bytes": 512, "num_heads": 2, "dtype": torch.float32}
    (group,) = attention.prepare(tables, [0, 50], [50], **options)
    assert group.causal
    assert group.mask is None
    (group,) = attention.prepare(tables, [0, 20], [50], **options)
    assert group.mask is not None
    assert group.mask.shape == (1, 20, 50)


def test_a_row_of_nan_stays_alone(test_seed: int) -> None:
    """A sequence whose own K and V are NaN spoils its own rows only."""
    case = draw(test_seed, [(9, 1), (10, 1), (11, 1), (12, 4), (13, 4)])
    rows = case.cache[case.tables[1, :3].long()]
    clean, _ = both(case)
    case.cache[case.tables[1, :3].long()] = torch.full_like(rows, torch.nan)
    spoilt, _ = both(case)
    assert spoilt[1].isnan().all()
    keep = [i for i in range(len(clean)) if i != 1]
    assert torch.equal(spoilt[keep], clean[keep])


def test_a_gather_that_forgets_stale_slots_is_caught(monkeypatch: pytest.MonkeyPatch, test_seed: int) -> None:
    """The NaN in the cache is what makes these tests able to fail."""
    case = draw(test_seed, MIXES["decodes"])
    made = attention._group

    def forgetful(*args: object) -> attention.Group:
        group = made(*args)
        return attention.Group(*(None if name == "stale" else getattr(group, name) for name in group.__slots__))

    monkeypatch.setattr(attention, "_group", forgetful)
    assert both(case)[0].isnan().any()
