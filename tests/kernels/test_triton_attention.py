"""Paged attention in Triton against its reference, interpreted: ragged, odd, NaN in every slot that holds no token.

Tolerances: float32 1e-5. float16 2e-3: the kernel rounds the shares to float16 before it multiplies by V, and outputs
are of size 1, whose float16 spacing is 1e-3. Tiles are small here, so that short sequences have several of them.
"""

import random

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.paged import MIXES, Ragged, draw

pytest.importorskip("triton")
from embedllm_kernels.triton.attention import paged_attention, split_count, workspace_size
from embedllm_kernels.triton.tuning import FLOAT8_LAUNCHES, LAUNCHES, Launch, launch_for

# The interpreter computes with numpy, which warns of what hardware does silently: exp(-x) → inf, 1 / inf → 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
SMALL = Launch(16, 16, 4, 1)
FORMS = ["decode", "prefill"]


def attend(case: Ragged, form: str | None, **options: object) -> Tensor:
    """The kernel's result over the case."""
    defaults = {
        "num_kv_heads": case.num_kv_heads,
        "scale": 0.3,
        "max_query_len": int(case.query_starts.diff().max()),
        "max_seq_len": int(case.seq_lens.max()),
        "launch": SMALL,
    }
    return paged_attention(
        case.q, case.cache, case.tables, case.query_starts, case.seq_lens, form=form, **{**defaults, **options}
    )


def expect(case: Ragged, **options: object) -> Tensor:
    """The reference's."""
    options = {"num_kv_heads": case.num_kv_heads, "scale": 0.3, **options}
    found = reference.paged_attention(case.q, case.cache, case.tables, case.query_starts, case.seq_lens, **options)
    assert not found.isnan().any()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "options"), [(torch.float32, {"window": 6}), (torch.float16, {})], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, form: str, dtype: torch.dtype, options: dict[str, object], test_seed: int) -> None:
    case = draw(test_seed, MIXES[mix], dtype=dtype)
    splits = 2 if mix in ("one token", "decodes") else 1
    close(attend(case, form, num_splits=splits, **options), expect(case, **options))


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_splits(splits: int, window: int | None, test_seed: int) -> None:
    """Up to five tiles of 16 keys: of seven splits, some have none."""
    case = draw(test_seed, [(1, 1), (70, 2), (33, 1), (16, 2)])
    size = workspace_size(
        num_tokens=6,
        num_sequences=4,
        num_heads=4,
        num_kv_heads=2,
        v_dim=16,
        max_query_len=2,
        max_seq_len=70,
        device=case.q.device,
        num_splits=splits,
    )
    workspace = torch.full((size + 3,), torch.nan)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(test_seed))
    options = {"window": window, "sinks": sinks}
    close(attend(case, "decode", num_splits=splits, workspace=workspace, **options), expect(case, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [
        ((2, 2), (16, 16), 1),
        ((6, 2), (80, 80), 3),
        ((7, 1), (256, 256), 16),
        ((8, 1), (24, 16), 5),
        ((14, 2), (64, 64), 16),
        ((3, 1), (8, 40), 3),
        ((20, 1), (96, 96), 2),
    ],
    ids=str,
)
def test_shapes(form: str, heads: tuple[int, int], dims: tuple[int, int], block_size: int, test_seed: int) -> None:
    case = draw(test_seed, [(37, 1), (20, 3), (5, 5)], heads=heads, dims=dims, block_size=block_size)
    close(attend(case, form, scale=dims[0] ** -0.5), expect(case, scale=dims[0] ** -0.5))


@pytest.mark.parametrize("window", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("block_m", [16, 64])
def test_windows(block_m: int, window: int, test_seed: int) -> None:
    """Narrower and wider than a tile, than a chunk, than a program's queries."""
    case = draw(test_seed, [(70, 41), (33, 33), (66, 3)])
    close(attend(case, "prefill", window=window, launch=Launch(block_m, 16, 4, 1)), expect(case, window=window))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_soft_cap(form: str, dtype: torch.dtype, sinks: bool, test_seed: int) -> None:
    case = draw(test_seed, [(40, 1), (21, 4), (1, 1)], dtype=dtype)
    logits = torch.randn(4, generator=torch.Generator().manual_seed(test_seed)) if sinks else None
    options = {"softcap": 1.5, "sinks": logits, "window": 25}
    close(attend(case, form, num_splits=2, **options), expect(case, **options))


@pytest.mark.parametrize("form", FORMS)
def test_sinks_of_any_size(form: str, test_seed: int) -> None:
    """None at all, one that takes nearly everything, and one that takes nearly nothing."""
    case = draw(test_seed, [(40, 1), (9, 2)])
    sinks = torch.tensor([-torch.inf, 30.0, -200.0, 0.0])
    close(attend(case, form, num_splits=3, sinks=sinks), expect(case, sinks=sinks))


@pytest.mark.parametrize("number", range(8))
def test_random_steps(number: int, test_seed: int) -> None:
    rng = random.Random(test_seed)
    form = FORMS[number % 2]
    lengths = [rng.randint(1, 90) for _ in range(rng.randint(1, 4))]
    longest = {"decode": 3, "prefill": 90}[form]
    spans = [(length, rng.randint(1, min(length, rng.choice([1, longest])))) for length in lengths]
    case = draw(
        test_seed,
        spans,
        heads=rng.choice([(2, 2), (3, 1), (7, 1)]),
        dims=rng.choice([(16, 16), (8, 8), (16, 24)]),
        block_size=rng.choice([1, 2, 5, 16]),
    )
    sinks = torch.randn(case.q.shape[1]) if rng.random() < 0.3 else None
    options = {"window": rng.choice([None, 1, 9, 20, 50]), "softcap": rng.choice([None, 2.0]), "sinks": sinks}
    launch = Launch(rng.choice([16, 32]), rng.choice([16, 32]), 4, 1)
    found = attend(case, form, num_splits=rng.choice([1, 3]), launch=launch, **options)
    close(found, expect(case, **options))


@pytest.mark.parametrize("spans", [[(40, 1), (7, 1)], [(70, 70), (9, 1)]], ids=str)
def test_the_form_and_launch_of_the_table(spans: list[tuple[int, int]], test_seed: int) -> None:
    case = draw(test_seed, spans, heads=(4, 1))
    close(attend(case, None, launch=None), expect(case))


@pytest.mark.parametrize("form", FORMS)
def test_views_and_an_output_of_the_callers(form: str, test_seed: int) -> None:
    """q and out as parts of wider rows, int64 indices, and rows past the last query that stay as they are."""
    case = draw(test_seed, [(18, 1), (6, 2)])
    wide = torch.cat((case.q.flatten(1), torch.zeros(3, 7)), 1)
    wide = torch.cat((wide, torch.full((2, wide.shape[1]), torch.nan)))
    out = torch.full((5, 5, 19), 8.0)
    view = out[:, 1:, :16]
    expected = expect(case)
    moved = Ragged(
        wide[:, : case.q[0].numel()].view(5, 4, 16),
        case.cache,
        case.tables.long(),
        torch.cat((case.query_starts, case.query_starts[-1:])).long(),  # one more sequence, of no queries
        torch.cat((case.seq_lens, torch.zeros(1))).long(),
        case.num_kv_heads,
        case.keys,
        case.values,
    )
    moved.tables = torch.cat((moved.tables, torch.full_like(moved.tables[:1], 2**40)))  # nobody may follow it
    found = attend(moved, form, out=view, num_splits=2)
    assert found is view
    close(view[:3], expected)
    assert (view[3:] == 8).all() and (out[:, 0] == 8).all() and (out[:, :, 16:] == 8).all()


@pytest.mark.parametrize("form", FORMS)
def test_blocks_before_the_window_are_not_read(form: str, test_seed: int) -> None:
    """They may belong to another sequence by now, and the table need not name them."""
    case = draw(test_seed, [(70, 2)], block_size=4)
    expected = expect(case, window=9)
    first = (70 - 2 - 9 + 1) // 4  # the first block that a query sees
    case.cache[case.tables[0, :first].long()] = torch.nan
    case.cache[0] = torch.nan if 0 not in case.tables[0, first:] else case.cache[0]
    close(attend(case, form, window=9), expected)
    case.tables[0, :first] = 2**30
    close(attend(case, form, window=9), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_nan_stays_alone(form: str, test_seed: int) -> None:
    """A sequence whose own K and V are NaN spoils its own rows only."""
    case = draw(test_seed, [(9, 1), (10, 1), (11, 2), (12, 4)])
    clean = attend(case, form, num_splits=2)
    case.cache[case.tables[1, :3].long()] = torch.nan
    spoilt = attend(case, form, num_splits=2)
    assert spoilt[1].isnan().all()
    keep = [0, *range(2, len(clean))]
    assert torch.equal(spoilt[keep], clean[keep])


@pytest.mark.parametrize("form", FORMS)
def test_a_slot_too_many_is_caught(form: str, test_seed: int) -> None:
    """The NaN in the cache is what makes these tests able to fail."""
    case = draw(test_seed, [(9, 1), (18, 3)])
    case.seq_lens += 1
    assert attend(case, form).isnan().any(-1).any(-1).tolist()[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_of_more_than_two_billion_values(form: str, test_seed: int) -> None:
    """Only the touched pages of the tensor are real."""
    blocks, layers, block_size, width = 2**15 + 40, 128, 16, 32
    try:
        everything = torch.empty((blocks, layers, block_size, width), dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 4 GiB of address space")
    small = draw(test_seed, [(37, 2)], heads=(2, 1), block_size=block_size, dtype=torch.float16, layers=1)
    layer = everything[:, layers - 1]
    table = blocks - 1 - torch.arange(3, dtype=torch.int32)
    layer[table.long()] = small.cache[small.tables[0].long()]
    expected = expect(small)
    small.cache, small.tables = layer, table[None]
    assert (blocks - 3) * layer.stride(0) > 2**31
    close(attend(small, form, num_splits=2), expected)


def test_only_splits_need_a_workspace() -> None:
    shape = {"num_tokens": 3, "num_sequences": 3, "num_heads": 8, "num_kv_heads": 2, "v_dim": 10, "max_seq_len": 10**5}
    device = torch.device("cpu")
    assert workspace_size(**shape, max_query_len=1, device=device, num_splits=4) == 3 * 8 * 4 * 12
    assert workspace_size(**shape, max_query_len=1, device=device, num_splits=1) == 0
    assert workspace_size(**shape, max_query_len=1, device=device) == 0, "no processors to fill"
    assert workspace_size(**shape, max_query_len=17, device=device, num_splits=4) == 0, "the prefill form"


def test_nothing_to_do() -> None:
    case = draw(0, [(3, 1)])
    case.q, case.query_starts = case.q[:0], torch.zeros(2, dtype=torch.int32)
    assert attend(case, None, max_query_len=1).shape == (0, 4, 16)


def test_what_cannot_work_is_refused() -> None:
    case = draw(0, [(3, 1)])
    with pytest.raises(ValueError, match="positive"):
        attend(case, None, scale=0.0)
    with pytest.raises(ValueError, match="144 float32"):
        attend(case, "decode", num_splits=2, workspace=torch.empty(143))


def test_split_count() -> None:
    assert split_count(1, 8, 132, 100_000) == 32  # 3 · 132 programs wanted, and a power of two
    assert split_count(1, 8, 132, 300) == 4  # of at least 64 keys
    assert split_count(1, 8, 132, 5) == 1
    assert split_count(64, 8, 132, 100_000) == 1
    assert split_count(1, 1, 132, 10**6) == 64


def test_launch_table() -> None:
    assert launch_for("decode", (12, 1), 128, 2) == launch_for("decode", (0, 0), 128, 2)
    assert launch_for("prefill", (9, 0), 128, 2).block_m == 128
    assert launch_for("prefill", (9, 0), 128, 4).tile == 16
    assert launch_for("prefill", (8, 0), 128, 2, True) == launch_for("prefill", (12, 1), 128, 2, True)
    assert launch_for("prefill", (8, 0), 128, 2, True).block_m < launch_for("prefill", (9, 0), 128, 2, True).block_m
    assert launch_for("decode", (9, 0), 256, 2, True).tile == launch_for("prefill", (9, 0), 128, 4, True).tile == 16
    wide, wider = launch_for("prefill", (9, 0), 256, 2), launch_for("prefill", (9, 0), 512, 2)
    assert (wider.block_m, wider.tile) == (wide.block_m // 2, wide.tile // 2)
    pairs = [*LAUNCHES.values(), *FLOAT8_LAUNCHES.values()]
    sizes = {size for pair in pairs for launch in pair for size in (launch.block_m, launch.tile)}
    assert all(size >= 16 and size.bit_count() == 1 for size in sizes)
