"""The mixture of experts in Triton against its reference, interpreted; and what it takes when compiled."""

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton import moe as module
from embedllm_kernels.triton.moe import Tile, moe, tile_for

# The interpreter computes with numpy, which warns of what hardware does silently: exp(-x) → inf, 1 / inf → 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

# Sums of up to 200 products in another order; float16 results are rounded three times on the way.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3}


def make(
    seed: int, dtype: torch.dtype, tokens: int, hidden: int, inner: int, experts: int, chosen: int
) -> list[Tensor]:
    """x, weights, ids, gate_up, down; the rows of x have a gap and the weights are a slice of larger ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(tokens, hidden + 3).to(dtype)[:, :hidden]
    weights, ids = reference.route(normal(tokens, experts), chosen, True)
    gate_up = (normal(experts, 2 * inner, hidden + 1) / hidden**0.5).to(dtype)[..., :hidden]
    down = (normal(experts, hidden, inner) / inner**0.5).to(dtype)
    return [x, weights, ids, gate_up, down]


def check(given: list[Tensor], activation: str = "silu", **options: object) -> None:
    tolerance = TOLERANCES[given[0].dtype]
    found, expected = moe(*given, activation, **options), reference.moe(*given, activation)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "experts", "chosen"),
    [(1, 64, 32, 8, 2), (1, 50, 21, 60, 4), (33, 129, 40, 8, 2), (33, 32, 33, 60, 4), (3, 200, 5, 1, 1)],
)
def test_equals_the_reference(
    dtype: torch.dtype, tokens: int, hidden: int, inner: int, experts: int, chosen: int, test_seed: int
) -> None:
    check(make(test_seed, dtype, tokens, hidden, inner, experts, chosen))


@pytest.mark.parametrize("tile", [Tile(16, 16, 16, 4, 3), Tile(64, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)])
def test_every_tile(tile: Tile, test_seed: int) -> None:
    check(make(test_seed, torch.float16, 70, 70, 68, 4, 2), "gelu_tanh", tile=tile)


@pytest.mark.parametrize("expert", [0, 5, 7])
def test_all_tokens_on_one_expert(expert: int, test_seed: int) -> None:
    given = make(test_seed, torch.float32, 33, 48, 20, 8, 1)
    given[2].fill_(expert)
    given[3][torch.arange(8) != expert] = torch.nan  # experts nobody chose are not part of a result
    given[4][torch.arange(8) != expert] = torch.nan
    check(given)


@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
def test_lists_of_pairs(ids_type: torch.dtype, test_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair once, in its expert's blocks, in order; the rest is padding."""
    monkeypatch.setattr(module, "IDS", 16)
    given = make(test_seed, torch.float32, 37, 16, 16, 60, 3)
    given[2] = given[2].to(ids_type)
    tile = Tile(16, 16, 16, 4, 3)
    buffer = torch.full((1 << 20,), 255, dtype=torch.uint8)  # NaN and -1 everywhere
    check(given, tile=tile, workspace=buffer)
    parts = module._parts(given[0], given[2], given[3], tile)
    pairs_of, expert_of, *_ = module.scratch.cut(buffer, parts, buffer.device)
    blocks = pairs_of.view(-1, 16)
    found = 0
    for expert, ids in zip(expert_of.tolist(), blocks, strict=True):
        if expert >= 0:
            real = ids[ids < 111]
            assert torch.equal(given[2].flatten()[real], torch.full_like(real, expert).to(ids_type))
            assert torch.equal(real, real.sort().values) and bool((ids[len(real) :] == 111).all()) and len(real)
            found += len(real)
    assert found == 111 and expert_of[-1] == -1


def test_workspaces_and_outputs(test_seed: int) -> None:
    given = make(test_seed, torch.float16, 9, 40, 24, 8, 2)
    buffer = torch.full((module.workspace_size(given[0], given[2], given[3]),), 255, dtype=torch.uint8)
    wide = torch.full((9, 41), 7.0, dtype=torch.float16)
    out = moe(*given, workspace=buffer, out=wide[:, :40])
    assert torch.equal(out, moe(*given)) and bool((wide[:, 40] == 7).all())
    with pytest.raises(ValueError, match="workspace"):
        moe(*given, workspace=buffer[1:])


def test_no_tokens_and_unknown_activations() -> None:
    given = make(0, torch.float32, 0, 8, 4, 2, 1)
    assert moe(*given).shape == (0, 8)
    with pytest.raises(ValueError, match="relu"):
        moe(*given, "relu")


TYPES = {
    **dict.fromkeys(("x", "weight", "out", "y"), "*bf16"),
    **dict.fromkeys(("pairs_of", "expert_of"), "*i32"),
    **dict.fromkeys(("pairs", "num_experts", "max_blocks", "size", "depth"), "i32"),
    **dict.fromkeys(("x_stride", "expert_stride", "weight_stride", "weights_stride", "out_stride"), "i32"),
    "ids": "*i64",
    "weights": "*fp32",
}
ALIGNED = ("x", "weight", "out", "pairs_of", "size", "depth", "x_stride", "expert_stride", "weight_stride")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    """A model of 128 experts of which 8 are chosen: 1 token, 512 tokens, 8,192 tokens."""
    home, builds = "embedllm_kernels.triton.moe", []
    for tokens in (1, 512, 8_192):
        rows, columns, depth, warps, stages = tile_for(8 * tokens, 128)
        tile = {"SILU": True, "EVEN": True, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
        for constants in ({"CHOSEN": 8, "GATED": True}, {"CHOSEN": 1, "GATED": False}):
            builds.append(Build(f"{home}:_product", TYPES, {**constants, **tile}, ALIGNED, warps, stages))
    builds.append(Build(f"{home}:_assign", TYPES, {"EXPERTS": 256, "ROWS": 16, "IDS": 1_024}, ("ids", "pairs_of")))
    summed = ("y", "out", "size", "out_stride")
    builds.append(Build(f"{home}:_weighted_sum", TYPES, {"CHOSEN": 8, "BLOCK": 1_024}, summed))
    for build, found in zip(builds, compile_for(capability, builds), strict=True):
        assert found.local == 0 and found.shared <= 98_304 and found.registers <= 255, build
        if build.kernel.endswith("_product"):
            assert "cp.async" in found.ptx and ("wgmma" in found.ptx or "mma.sync" in found.ptx), build
