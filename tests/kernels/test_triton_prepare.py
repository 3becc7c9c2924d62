"""A step's inputs built from per-row state, against plain loops, interpreted; and what it takes when compiled."""

import pytest
import torch
from torch import Tensor

from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.prepare import prepare_decode, scatter_tokens


def prepared(rows: Tensor, last_tokens: Tensor, positions: Tensor, tables: Tensor, block_size: int) -> list[list[int]]:
    """ids, positions, slots and lengths."""
    found: list[list[int]] = [[], [], [], []]
    for row in rows.tolist():
        position = int(positions[row])
        index = position // block_size
        if row < 0 or index >= tables.shape[1]:
            entry = 0, 0, -1, 0
        else:
            slot = int(tables[row, index]) * block_size + position % block_size
            entry = int(last_tokens[row]), position, slot, position + 1
        for values, value in zip(found, entry, strict=True):
            values.append(value)
    return found


def scattered(sampled: Tensor, rows: Tensor, last_tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    last_tokens, positions = last_tokens.clone(), positions.clone()
    for token, row in zip(sampled.tolist(), rows.tolist(), strict=True):
        if row >= 0:
            last_tokens[row] = token
            positions[row] += 1
    return last_tokens, positions


def state(seed: int, num_rows: int, max_blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and tables; ids of blocks up to what int32 slots reach."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    tables = draw((2**31 - 1) // block_size, num_rows, max_blocks + 3)[:, :max_blocks]  # rows with a gap
    return draw(150_000, num_rows), draw(max_blocks * block_size, num_rows), tables


def rows_of(seed: int, entries: int, num_rows: int) -> Tensor:
    """Rows in any order, each fourth entry padding."""
    rows = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:entries].int()
    rows[3::4] = -1
    return rows


def out(entries: int) -> list[Tensor]:
    """Four outputs packed into one buffer, at odd places in it, with a value behind each."""
    buffer = torch.full((4, entries + 1), -77, dtype=torch.int32)
    return [row[:entries] for row in buffer]


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("entries", [1, 5, 127, 128, 300])
def test_prepare_equals_the_loop(entries: int, block_size: int, test_seed: int) -> None:
    tokens, positions, tables = state(test_seed, 301, 7, block_size)
    rows = rows_of(test_seed, entries, 301)
    given = tokens.clone(), positions.clone(), tables.clone()
    found = out(entries)
    prepare_decode(rows, tokens, positions, tables, block_size, *found)
    assert [values.tolist() for values in found] == prepared(rows, tokens, positions, tables, block_size)
    assert all(values.as_strided((1,), (1,), values.storage_offset() + entries).item() == -77 for values in found)
    assert all(torch.equal(a, b) for a, b in zip(given, (tokens, positions, tables), strict=True))


def test_a_position_past_its_table_has_no_slot() -> None:
    """It must not take the block that begins the next row's table."""
    tables = torch.tensor([[4, 5], [6, 7]], dtype=torch.int32)
    positions = torch.tensor([8, 7], dtype=torch.int32)
    found = out(2)
    prepare_decode(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([9, 9]).int(), positions, tables, 4, *found)
    assert [values.tolist() for values in found] == [[0, 9], [0, 7], [-1, 31], [0, 8]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("entries", [1, 5, 127, 128, 300])
def test_scatter_equals_the_loop(entries: int, dtype: torch.dtype, test_seed: int) -> None:
    tokens, positions, _ = state(test_seed, 301, 7, 16)
    rows = rows_of(test_seed, entries, 301)
    sampled = torch.randint(0, 150_000, (entries,), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = scattered(sampled, rows, tokens, positions)
    scatter_tokens(sampled, rows, tokens, positions)
    assert torch.equal(tokens, expected[0]) and torch.equal(positions, expected[1])


def test_steps_follow_each_other_without_the_host() -> None:
    """Three steps over a block's end, each fed by the tokens of the one before."""
    tokens, positions = torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3, 0], dtype=torch.int32)
    tables = torch.tensor([[0, 0], [5, 2], [0, 0]], dtype=torch.int32)
    rows, found, seen = torch.tensor([1], dtype=torch.int32), out(1), []
    for sampled in (11, 12, 13):
        scatter_tokens(torch.tensor([sampled]), rows, tokens, positions)
        prepare_decode(rows, tokens, positions, tables, 4, *found)
        seen.append([values.item() for values in found])
    assert seen == [[11, 4, 8, 5], [12, 5, 9, 6], [13, 6, 10, 7]]


def test_nothing_to_do() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    some = torch.tensor([5, 6], dtype=torch.int32)
    prepare_decode(none, some, some, some[None], 4, none, none, none, none)
    scatter_tokens(none, none, some, some)
    assert some.tolist() == [5, 6]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    state = dict.fromkeys(("rows", "last_tokens", "positions_by_row"), "*i32")
    outputs = dict.fromkeys(("out_ids", "out_positions", "out_slots", "out_seq_lens"), "*i32")
    sizes = dict.fromkeys(("size", "block_size", "max_blocks", "table_stride"), "i32")
    module, constants = "embedllm_kernels.triton.prepare", {"BLOCK": 128}
    builds = [
        Build(f"{module}:_prepare_decode", {**state, "tables_by_row": "*i32", **outputs, **sizes}, constants),
        Build(f"{module}:_scatter_tokens", {**state, "sampled": "*i64", "size": "i32"}, constants),
    ]
    for found in compile_for(capability, builds):
        assert found.registers <= 64 and found.local == 0 and found.shared == 0
