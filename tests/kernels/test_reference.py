"""The specification against loops that a reader can check by eye, and against torch's own operations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embedllm_kernels import reference
from tests.kernels.paged import MIXES, Ragged, draw


def by_hand(
    case: Ragged, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention of one query and one head at a time, in Python floats where it matters."""
    out = []
    shared = case.q.shape[1] // case.num_kv_heads
    for i, length in enumerate(case.seq_lens.tolist()):
        first, last = case.query_starts[i : i + 2].tolist()
        for row in range(first, last):
            position = length - (last - row)
            heads = []
            for head in range(case.q.shape[1]):
                seen = [j for j in range(position + 1) if window is None or j > position - window]
                keys, values = case.keys[i][:, head // shared].double(), case.values[i][:, head // shared].double()
                scores = [float(case.q[row, head].double() @ keys[j]) * scale for j in seen]
                if softcap is not None:
                    scores = [softcap * math.tanh(score / softcap) for score in scores]
                total = sum(map(math.exp, scores)) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                heads.append(sum(math.exp(s) / total * values[j] for s, j in zip(scores, seen, strict=True)))
            out.append(torch.stack(heads))
    return torch.stack(out).to(case.q.dtype)


def attend(case: Ragged, **options: object) -> Tensor:
    return reference.paged_attention(
        case.q,
        case.cache,
        case.tables,
        case.query_starts,
        case.seq_lens,
        num_kv_heads=case.num_kv_heads,
        **{"scale": 0.3, **options},
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}], ids=str
)
def test_attention_is_what_the_formula_says(mix: str, options: dict[str, object], test_seed: int) -> None:
    case = draw(test_seed, MIXES[mix], block_size=3)
    torch.testing.assert_close(attend(case, **options), by_hand(case, 0.3, **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (14, 2), (3, 1)], ids=str)
def test_attention_equals_torch(heads: tuple[int, int], test_seed: int) -> None:
    case = draw(test_seed, MIXES["whole prompts"], heads=heads)
    out = attend(case)
    for i in range(len(case.keys)):
        first, last = case.query_starts[i : i + 2].tolist()
        q, k, v = (x.transpose(0, 1)[None] for x in (case.q[first:last], case.keys[i], case.values[i]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[first:last], y[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


def test_attention_with_values_of_another_size(test_seed: int) -> None:
    case = draw(test_seed, MIXES["everything"], dims=(16, 8))
    assert attend(case).shape[2] == 8
    torch.testing.assert_close(attend(case), by_hand(case, 0.3), atol=1e-5, rtol=1e-5)


def test_attention_leaves_its_inputs_alone(test_seed: int) -> None:
    case = draw(test_seed, MIXES["everything"])
    before = copy.deepcopy(case)
    attend(case, window=7, softcap=3.0, sinks=torch.zeros(4))
    for name in ("q", "cache", "tables", "query_starts", "seq_lens"):
        assert torch.equal(getattr(case, name).nan_to_num(7.0), getattr(before, name).nan_to_num(7.0)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(dtype: torch.dtype, test_seed: int) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(test_seed)).to(dtype)
    weight = torch.linspace(0.5, 2.0, 7)
    out = reference.rms_norm(x, weight, 1e-6)
    for row, result in zip(x.double(), out, strict=True):
        expected = row / math.sqrt(float((row * row).mean()) + 1e-6) * weight.double()
        assert torch.equal(result, expected.to(dtype)) or torch.allclose(result.double(), expected, rtol=2**-8)
    normed, total = reference.add_rms_norm(x, x, weight, 1e-6)
    assert torch.equal(total, x + x)
    assert torch.equal(normed, reference.rms_norm(x + x, weight, 1e-6))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_is_a_rotation_by_the_angle(interleaved: bool, test_seed: int) -> None:
    """Pairs as complex numbers times e^(i·angle); dimensions beyond the turned ones stay."""
    generator = torch.Generator().manual_seed(test_seed)
    x, angle = torch.randn(6, 3, 10, generator=generator), torch.rand(6, 4, generator=generator) * 9
    out = reference.rotary(x, angle.cos(), angle.sin(), interleaved)
    for t in range(6):
        for h in range(3):
            for d in range(4):
                a, b = (2 * d, 2 * d + 1) if interleaved else (d, d + 4)
                turned = complex(x[t, h, a], x[t, h, b]) * complex(math.cos(angle[t, d]), math.sin(angle[t, d]))
                assert abs(turned - complex(out[t, h, a], out[t, h, b])) < 1e-5
    assert torch.equal(out[..., 8:], x[..., 8:])


def test_gated_and_its_activations() -> None:
    x = torch.tensor([[-1.0, 2.0, 3.0, -4.0]])
    silu = [3 * -1 / (1 + math.exp(1)), -4 * 2 / (1 + math.exp(-2))]
    assert reference.gated(x)[0].tolist() == pytest.approx(silu)
    assert reference.gated(x, "gelu_tanh")[0].tolist() == pytest.approx([3 * -0.158808, -4 * 1.954598], rel=1e-5)
    with pytest.raises(ValueError, match="'relu6' is not known"):
        reference.gated(x, "relu6")


def test_route_and_moe_one_token_at_a_time(test_seed: int) -> None:
    generator = torch.Generator().manual_seed(test_seed)
    x = torch.randn(9, 8, generator=generator)
    gate_up, down = torch.randn(5, 12, 8, generator=generator), torch.randn(5, 8, 6, generator=generator)
    logits = torch.randn(9, 5, generator=generator)
    for renormalise in (False, True):
        weights, ids = reference.route(logits, 2, renormalise)
        out = reference.moe(x, weights, ids, gate_up, down)
        for t in range(9):
            share = logits[t].softmax(0)
            best = share.argsort(descending=True)[:2].tolist()
            assert ids[t].tolist() == best
            whole = float(share[best].sum()) if renormalise else 1.0
            expected = sum(share[e] / whole * (down[e] @ reference.gated(gate_up[e] @ x[t])) for e in best)
            torch.testing.assert_close(out[t], expected, atol=1e-4, rtol=1e-4)


def test_kv_store_writes_its_slots_only() -> None:
    cache = torch.full((4, 2, 3, 6), torch.nan)[:, 1]
    rows = torch.arange(12.0).view(2, 6)
    reference.kv_store(cache, rows, torch.tensor([11, 3], dtype=torch.int32))
    assert torch.equal(cache[3, 2], rows[0])
    assert torch.equal(cache[1, 0], rows[1])
    assert int(cache.isnan().sum()) == 4 * 3 * 6 - 12


def test_block_copy_reads_before_it_writes() -> None:
    blocks = torch.arange(4.0)[:, None].repeat(1, 3)
    reference.block_copy(blocks, torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert blocks[:, 0].tolist() == [0, 0, 1, 3]


def test_linear_and_soft_cap() -> None:
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [0.0, 1.0]])
    bias, residual = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([[10.0, 20.0, 30.0]])
    assert reference.linear(x, weight, bias, residual).tolist() == [[21.5, 37.0, 32.0]]
    assert reference.soft_cap(torch.tensor([1e9, -1e9, 0.001]), 5.0).tolist() == pytest.approx([5.0, -5.0, 0.001])
