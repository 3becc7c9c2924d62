"""The gated activation in Triton against its reference, interpreted; and what it takes when compiled."""

import pytest
import torch

from embedllm_kernels import reference
from tests.kernels.compiled import Build, compile_for

pytest.importorskip("triton")
from embedllm_kernels.triton.gated import gated

# The interpreter computes with numpy, which warns of what hardware does silently: exp(-x) → inf, 1 / inf → 0.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize(("tokens", "size"), [(0, 5), (1, 1), (3, 1_024), (5, 1_100)])
def test_equals_the_reference(
    activation: str, dtype: torch.dtype, tolerance: float, tokens: int, size: int, test_seed: int
) -> None:
    wide = torch.randn((tokens, 2 * size + 3), generator=torch.Generator().manual_seed(test_seed)).mul(3).to(dtype)
    gate_up = wide[:, : 2 * size]  # rows with a gap
    found, expected = gated(gate_up, activation), reference.gated(gate_up, activation)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="relu"):
        gated(torch.zeros(1, 2), "relu")


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability: int) -> None:
    build = Build(
        "embedllm_kernels.triton.gated:_gated",
        {"gate_up": "*bf16", "out": "*bf16", "size": "i32", "row_stride": "i32"},
        {"SILU": True, "BLOCK": 1_024},
        divisible=("gate_up", "out", "size", "row_stride"),
    )
    (found,) = compile_for(capability, [build])
    assert found.registers <= 64 and found.local == 0
    assert "ld.global.v4" in found.ptx, "loads are not vectorised"
