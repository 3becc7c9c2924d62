"""What the attention kernels take when they are compiled: registers, shared memory, the instructions of their dots."""

import pytest

from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.attention import FLOAT8_SINCE
from embedllm_kernels.triton.tuning import launch_for

KIB = 1_024
SIGNATURE = {
    **dict.fromkeys(("q", "cache", "out"), "*bf16"),
    **dict.fromkeys(("tables", "query_starts", "seq_lens"), "*i32"),
    **dict.fromkeys(("sums", "stats", "sinks"), "*fp32"),
    **dict.fromkeys(("q_token", "q_head", "out_token", "out_head", "block_stride", "slot_stride"), "i32"),
    **dict.fromkeys(("table_stride", "value_column", "sequences", "splits"), "i32"),
    **dict.fromkeys(("inner", "unit", "v_scale"), "fp32"),
}
DIVISIBLE = ("q", "cache", "out", "sums", "q_token", "q_head", "out_token", "out_head", "block_stride", "slot_stride")
PATHS = {
    "decode": "embedllm_kernels.triton.attention_decode:_decode",
    "prefill": "embedllm_kernels.triton.attention_prefill:_prefill",
    "merge": "embedllm_kernels.triton.attention_decode:_merge",
}


def attention(
    form: str,
    capability: tuple[int, int],
    *,
    group: int = 4,
    dim: int = 128,
    rows: int = 0,
    window: int = 0,
    capped: bool = False,
    sinks: bool = False,
    direct: bool = False,
    dtype: str = "bf16",
    float8: bool = False,
) -> Build:
    padded = 1 << (dim - 1).bit_length()
    launch = launch_for(form, capability, padded, 4 if dtype == "fp32" else 2, float8)
    constants = {
        "GROUP": group,
        "K_DIM": dim,
        "V_DIM": dim,
        "K_PAD": padded,
        "V_PAD": padded,
        "BLOCK_SIZE": 16,
        "WINDOW": window,
        "CAPPED": capped,
        "BLOCK_M": max(rows, launch.block_m),
        "TILE": launch.tile,
    }
    if form == "decode":
        constants["DIRECT"] = direct
    if not sinks:
        constants["sinks"] = None
    absent = {"decode": {"sequences", "splits"}, "prefill": {"sums", "stats", "splits"}}[form]
    signature = {name: kind.replace("bf16", dtype) for name, kind in SIGNATURE.items() if name not in absent}
    if float8:
        signature["cache"] = "*u8" if capability < FLOAT8_SINCE else "*fp8e4nv"
    divisible = tuple(name for name in (*DIVISIBLE, "value_column") if name in signature)
    return Build(PATHS[form], signature, constants, divisible, launch.num_warps, launch.num_stages)


def merge(splits: int, dim: int) -> Build:
    constants = {"QUERIES": 1, "V_DIM": dim, "V_PAD": dim, "WINDOW": 0, "TILE": 32, "SPLITS_PAD": splits}
    names = ("sums", "stats", "query_starts", "seq_lens", "out", "splits", "out_token", "out_head")
    return Build(PATHS["merge"], {name: SIGNATURE[name] for name in names}, constants, ("sums", "out"))


def configurations(capability: tuple[int, int]) -> dict[str, Build]:
    return {
        "decode": attention("decode", capability),
        "decode, group 8, all options": attention(
            "decode", capability, group=8, direct=True, sinks=True, window=512, capped=True
        ),
        "decode, 64 rows": attention("decode", capability, group=5, rows=64),
        "decode, 256": attention("decode", capability, dim=256),
        "decode, float32": attention("decode", capability, dtype="fp32"),
        "merge": merge(16, 128),
        "merge, largest": merge(64, 256),
        "prefill": attention("prefill", capability),
        "prefill, group 8, all options": attention("prefill", capability, group=8, window=512, capped=True, sinks=True),
        "prefill, 256": attention("prefill", capability, dim=256),
        "prefill, float32": attention("prefill", capability, dtype="fp32"),
    }


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_compiles(capability: tuple[int, int]) -> None:
    builds = configurations(capability)
    unknown = {
        f"default: {form}, {dim}": attention(form, (0, 0), dim=dim)
        for form in ("decode", "prefill")
        for dim in (128, 256)
    }
    if capability == (8, 0):  # whose instructions are those of the GPUs with little shared memory
        builds |= unknown
    found = dict(zip(builds, compile_for(10 * capability[0] + capability[1], list(builds.values())), strict=True))
    assert {name: taken.local for name, taken in found.items() if taken.local} == {}
    assert found["decode"].registers <= 128, "fewer than four programs fit into a processor"
    assert found["decode"].shared <= 48 * KIB
    assert found["decode"].ptx.count("cp.async.cg") >= 16, "keys and values are not copied ahead"
    assert found["prefill"].ptx.count("cp.async.cg") >= 32, "keys and values are not copied ahead"
    dots = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    for name, taken in found.items():
        whole = 99 if name in unknown else 100 if "decode" in name else 163 if capability == (8, 0) else 227
        assert taken.shared <= whole * KIB, name
        if "merge" not in name and "float32" not in name:
            assert (dots if "prefill" in name else "mma") in taken.ptx, name


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=str)
def test_compiles_over_float8(capability: tuple[int, int]) -> None:
    """Bytes are put together by integers where there is no instruction for it, and each is as exact as the other:
    every value of float8_e4m3fn is one of float16, through which the instruction goes."""
    options = {"group": 8, "sinks": True, "window": 512, "capped": True}
    builds = {
        "decode": attention("decode", capability, float8=True),
        "decode, all options": attention("decode", capability, direct=True, float8=True, **options),
        "decode, 64 rows": attention("decode", capability, group=5, rows=64, float8=True),
        "decode, 256": attention("decode", capability, dim=256, float8=True),
        "decode, float32": attention("decode", capability, dtype="fp32", float8=True),
        "prefill": attention("prefill", capability, float8=True),
        "prefill, all options": attention("prefill", capability, float8=True, **options),
        "prefill, 256": attention("prefill", capability, dim=256, float8=True),
        "prefill, float32": attention("prefill", capability, dtype="fp32", float8=True),
    }
    found = dict(zip(builds, compile_for(10 * capability[0] + capability[1], list(builds.values())), strict=True))
    assert {name: taken.local for name, taken in found.items() if taken.local} == {}
    for name, taken in found.items():
        assert ("cvt.rn.f16x2.e4m3x2" in taken.ptx) == (capability >= FLOAT8_SINCE), name
        assert "mul.ftz" not in taken.ptx, f"{name}: subnormals are lost"
        assert taken.shared <= 99 * KIB, name
    assert found["decode"].registers <= 168, "fewer than three programs fit into a processor"
    assert found["decode"].ptx.count("cp.async.cg") >= 6, "keys and values are not copied ahead"
