"""What a decoding step reads, by the reference and by its twin, against a plain loop; what the twin takes compiled."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.prepare import prepare_decode

TWINS = pytest.mark.parametrize("prepare", [reference.prepare_decode, prepare_decode], ids=["reference", "triton"])
Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # rows, known, last_tokens, positions, tables


def expected(
    rows: Tensor, known: Tensor, last_tokens: Tensor, positions: Tensor, tables: Tensor, block_size: int
) -> list[list[int]]:
    """ids, slots and lengths."""
    found: list[list[int]] = [[], [], []]
    for i, position in enumerate(positions.tolist()):
        entry = 0, -1, 0
        if position >= 0:
            token = int(known[i]) if rows[i] < 0 else int(last_tokens[rows[i]])
            entry = token, int(tables[i, position // block_size]) * block_size + position % block_size, position + 1
        for values, value in zip(found, entry, strict=True):
            values.append(value)
    return found


def given(seed: int, entries: int, block_size: int) -> Given:
    """Known and unknown ids and padding in any order; ids of blocks up to what int32 slots reach."""
    generator = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    tables = ints(0, (2**31 - 1) // block_size, entries, 10)[:, :7]  # rows with a gap
    positions = ints(0, 7 * block_size, entries)
    positions[3::4] = -1
    rows = ints(0, 301, entries)
    rows[::3] = -1
    return rows, ints(0, 150_000, entries), ints(0, 150_000, 301), positions, tables


def out(entries: int) -> list[Tensor]:
    """Three outputs packed into one buffer, at odd places in it, with a value behind each."""
    buffer = torch.full((3, entries + 1), -77, dtype=torch.int32)
    return [row[:entries] for row in buffer]


@TWINS
@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("entries", [1, 5, 127, 128, 300])
def test_equals_the_loop(prepare: Callable[..., None], entries: int, block_size: int, test_seed: int) -> None:
    case = given(test_seed, entries, block_size)
    before, found = [values.clone() for values in case], out(entries)
    prepare(*case, block_size, ids=found[0], slots=found[1], seq_lens=found[2])
    assert [values.tolist() for values in found] == expected(*case, block_size)
    assert all(values.as_strided((1,), (1,), values.storage_offset() + entries).item() == -77 for values in found)
    assert all(torch.equal(a, b) for a, b in zip(before, case, strict=True))


@TWINS
def test_padding_is_not_looked_up(prepare: Callable[..., None]) -> None:
    """Its row and its table may name what is not there."""
    far = torch.tensor([2**30, 0], dtype=torch.int32)
    positions, found = torch.tensor([-1, 6], dtype=torch.int32), out(2)
    rows = torch.tensor([-1 if prepare is reference.prepare_decode else 2**30, 0], dtype=torch.int32)
    tables = torch.stack((far, torch.tensor([4, 9], dtype=torch.int32)))
    prepare(rows, far, far[1:] + 8, positions, tables, 4, ids=found[0], slots=found[1], seq_lens=found[2])
    assert [values.tolist() for values in found] == [[0, 8], [-1, 38], [0, 7]]


def test_nothing_to_do() -> None:
    none, some = torch.zeros(0, dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)
    prepare_decode(none, none, some, none, some[None], 4, ids=none, slots=none, seq_lens=none)
    assert some.tolist() == [5, 6]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    tensors = ("rows", "known", "last_tokens", "positions", "tables", "out_ids", "out_slots", "out_seq_lens")
    sizes = dict.fromkeys(("size", "block_size", "table_stride"), "i32")
    signature = {**dict.fromkeys(tensors, "*i32"), **sizes}
    (found,) = compile_for(
        capability, [Build("embedllm_kernels.triton.prepare:_prepare_decode", signature, {"BLOCK": 128})]
    )
    assert found.registers <= 64 and found.local == 0 and found.shared == 0
