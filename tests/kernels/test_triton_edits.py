"""Edits of logits in Triton, interpreted, against sampling.penalise and plain masking; and what they take compiled.

Tolerance: 1e-6, for a product and a difference that may be rounded once or twice.
"""

import pytest
import torch
from torch import Tensor

from embedllm.edits import pack_ids
from embedllm_kernels import sampling
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.edits import apply_edits

STATES = 5


def pack(ids: Tensor) -> Tensor:
    """[n, V] bool as bits."""
    return torch.stack([torch.from_numpy(pack_ids(line.nonzero()[:, 0].tolist(), len(line))) for line in ids])


def penalties_of(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """State 0 has none, the others one, two or three."""
    columns = [(1.0, 0.0, 0.0), (1.3, 0.0, 0.0), (0.7, 0.4, 0.0), (1.0, 0.0, -0.5), (1.7, -0.3, 0.8)]
    repetition, frequency, presence = torch.tensor(columns[:n]).unbind(1)
    return repetition.contiguous(), frequency.contiguous(), presence.contiguous()


def expected(
    logits: Tensor,
    state: Tensor,
    penalties: tuple[Tensor, Tensor, Tensor] | None,
    counts: Tensor,
    in_prompt: Tensor,
    bias: tuple[Tensor, Tensor] | None,
    allowed: Tensor | None,
) -> Tensor:
    logits = logits.clone()
    if penalties is not None:
        rows, ids = ((counts > 0) | in_prompt)[state].nonzero(as_tuple=True)
        sampling.penalise(logits, rows, ids, counts[state[rows], ids].float(), *(p[state[rows]] for p in penalties))
    if bias is not None:
        for line, ids, values in zip(logits, *bias, strict=True):
            line[ids[ids >= 0].long()] += values[ids >= 0]
    return logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("asked", ["penalties", "bias", "mask", "penalties and bias", "penalties, bias and mask"])
@pytest.mark.parametrize("size", [1, 31, 2_080, 4_999])
def test_equals_the_reference(size: int, asked: str, mapped: bool, test_seed: int) -> None:
    generator = torch.Generator().manual_seed(test_seed)
    state = torch.tensor([3, 0, 4, 1] if mapped else [0, 1, 2, 3, 4])
    wide = torch.randn((len(state), size + 3), generator=generator) * 4
    wide[:, 0] = -torch.inf
    logits = wide[:, :size]  # rows with a gap
    counts = torch.randint(-3, 4, (STATES, size), generator=generator, dtype=torch.int32).clamp(min=0)
    in_prompt = torch.rand((STATES, size), generator=generator) < 0.3
    m = min(size, 7)
    ids = torch.stack([torch.randperm(size, generator=generator)[:m] for _ in state]).int()
    ids[1, m // 2 :] = -1
    ids[3] = -1
    bias = (ids, torch.randn((len(state), m), generator=generator)) if "bias" in asked else None
    allowed = torch.rand((len(state), size), generator=generator) < 0.5 if "mask" in asked else None
    penalties = penalties_of(STATES) if "penalties" in asked else None
    wanted = expected(logits, state, penalties, counts, in_prompt, bias, allowed)
    gap = wide[:, size:].clone()
    with_penalties = {"penalties": penalties, "counts": counts, "prompt": pack(in_prompt)} if penalties else {}
    apply_edits(
        logits,
        rows=state.int() if mapped else None,
        bias=bias,
        allowed=None if allowed is None else pack(allowed),
        **with_penalties,
    )
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=1e-6)
    assert torch.equal(wide[:, size:], gap)


def test_rows_that_ask_for_nothing_stay(test_seed: int) -> None:
    logits = torch.full((3, 50), torch.nan)
    neutral = (torch.ones(3), torch.zeros(3), torch.zeros(3))
    counts, prompt = torch.full((3, 50), 9, dtype=torch.int32), torch.full((3, 2), -1, dtype=torch.int32)
    logits[1] = 2.0
    neutral[0][1] = 4.0
    bias = (torch.full((3, 2), -1, dtype=torch.int32), torch.full((3, 2), torch.nan))
    apply_edits(logits, penalties=neutral, counts=counts, prompt=prompt, bias=bias)
    assert bool((logits[1] == 0.5).all()) and bool(logits[[0, 2]].isnan().all())
    before = logits.clone()
    apply_edits(logits)
    apply_edits(logits[:0], bias=bias)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    with pytest.raises(ValueError, match="together"):
        apply_edits(logits, counts=counts)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    floats, ints = ("logits", "repetition", "frequency", "presence", "bias"), ("size", "num_words", "row_stride")
    words = ("rows", "counts", "prompt", "bias_ids", "allowed")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(words, "*i32") | dict.fromkeys((*ints, "num_biases"), "i32")
    aligned, builds = ("logits", "counts", "size", "row_stride"), []
    for asked in ({"PENALTIES", "BIAS", "MASK", "MAPPED"}, {"PENALTIES"}, {"BIAS"}, {"MASK"}, {"PENALTIES", "BIAS"}):
        constants = {name: name in asked for name in ("PENALTIES", "BIAS", "MASK", "MAPPED")}
        builds.append(Build("embedllm_kernels.triton.edits:_edit", types, {**constants, "BLOCK": 2_048}, aligned))
    for found in compile_for(capability, builds):
        assert found.registers <= 128 and found.local == 0 and found.shared == 0
        assert "ld.global.v4" in found.ptx, "loads are not vectorised"
