"""Copies of whole blocks in Triton against the reference, interpreted; and what they take when compiled."""

import pytest
import torch

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.copy import block_copy


def ints(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 1, 1), (5,), (), (2, 16, 1_100)])
def test_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, index_dtype: torch.dtype, test_seed: int
) -> None:
    """Bit by bit, NaN included: what the bytes mean is not looked at."""
    generator = torch.Generator().manual_seed(test_seed)
    raw = torch.randint(0, 256, (9, *shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    blocks = raw.view(dtype)[..., 0]
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    expected = blocks.clone().view(words)
    source, destination = ints(8, 2, 2, dtype=index_dtype), ints(0, 1, 7, dtype=index_dtype)
    reference.block_copy(expected, source, destination)
    before = blocks.clone().view(words)
    block_copy(blocks, source, destination)
    assert torch.equal(blocks.view(words), expected)
    assert torch.equal(blocks.view(words)[8], before[8]) and not torch.equal(expected, before)


def test_no_copies_and_no_values() -> None:
    blocks = torch.arange(12.0).view(3, 4)
    block_copy(blocks, ints(), ints())
    block_copy(blocks[:, :0], ints(0), ints(1))
    assert torch.equal(blocks, torch.arange(12.0).view(3, 4))


def test_blocks_with_gaps_between_them() -> None:
    """A part of every block, one run of odd length that starts at an odd place."""
    wide = torch.arange(70, dtype=torch.float16).view(5, 14)
    expected = wide.clone()
    expected[4, 3:10] = expected[1, 3:10]
    block_copy(wide[:, 3:10], ints(1), ints(4))
    assert torch.equal(wide, expected)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="not one run"):
        block_copy(torch.zeros(3, 4, 5)[:, :, :2], ints(0), ints(1))
    with pytest.raises(ValueError, match="2 sources"):
        block_copy(torch.zeros(3, 4), ints(0, 1), ints(2))


def test_past_two_to_the_31_values() -> None:
    """The last block of more than 2^31 words. Only pages that are touched take memory."""
    try:
        blocks = torch.empty((2**19 + 8, 2**12 + 8), dtype=torch.int64)
    except RuntimeError:
        pytest.skip("the system does not give that much address space")
    blocks[2] = torch.arange(2**12 + 8)
    block_copy(blocks, ints(2, dtype=torch.int32), ints(len(blocks) - 1, dtype=torch.int32))
    assert blocks.numel() > 2**31 and torch.equal(blocks[-1], torch.arange(2**12 + 8))
    block_copy(blocks, ints(len(blocks) - 1, dtype=torch.int32), ints(5, dtype=torch.int32))
    assert torch.equal(blocks[5], torch.arange(2**12 + 8))


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    build = Build(
        "embedllm_kernels.triton.copy:_block_copy",
        {"blocks": "*i64", "source": "*i64", "destination": "*i64", "size": "i32", "stride": "i32"},
        {"BLOCK": 2_048},
        divisible=("blocks", "size", "stride"),
        num_warps=8,
    )
    (found,) = compile_for(capability, [build])
    assert found.registers <= 64 and found.local == 0 and found.shared == 0
    assert "ld.global.v2.b64" in found.ptx and "st.global.v2.b64" in found.ptx, "copies are not 16 bytes wide"
