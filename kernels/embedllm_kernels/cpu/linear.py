"""y = x · Wᵀ + b, and what follows it, with W kept in the layout that oneDNN computes in.

A plain weight is re-packed inside every call, which for a few tokens costs as much as the product itself. Here that is
done once, at load. Knows no model. Invariant: a weight is packed only where this machine's oneDNN has the type in
hardware and the pack reproduced a plain product; everything else stays plain and says why.

Packed by `aten::mkldnn._reorder_linear_weight`, run by `mkldnn::_linear_pointwise`: the operators that Inductor's
freezing uses. What follows a product (residual, activation, the other half of a gated unit) is fused into it: after a
few megabytes of weights have gone through the caches, every further operation of a step starts cold and costs 10 to
20 µs however small it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from embedllm_kernels import reference

TYPICAL_TOKENS = 32  # the batch the layout is chosen for; measured: as fast at 1 and at 512 as a layout made for those
_POST: Mapping[str | None, tuple[str, list[object], str]] = {
    None: ("none", [], ""),
    "silu": ("swish", [], ""),
    "gelu_tanh": ("gelu", [], "tanh"),
}


class Weight:
    """One linear layer's weight [out, in], packed where that is possible, and its bias.

    `reason` is "" when packed, else why not. The tensor handed in is not kept once it is packed.
    """

    __slots__ = ("bias", "num_bytes", "packed", "plain", "reason", "shape")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = True) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.bias = bias
        self.num_bytes = weight.numel() * weight.element_size() + (0 if bias is None else bias.nbytes)
        self.packed: Tensor | None = None
        self.plain: Tensor | None = None
        self.reason = why_not(weight) if pack else "packing is switched off"
        if self.reason:
            self.plain = weight
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)

    def __call__(
        self, x: Tensor, residual: Tensor | None = None, *, factor: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """reference.linear, rounded once at the end where W is packed. x [tokens, in] → [tokens, out].

        At most one of residual, factor and activation. None of them is written to.
        """
        if self.packed is None:
            assert self.plain is not None
            return reference.linear(x, self.plain, self.bias, residual, factor, activation)
        run = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            y = run.binary(x, residual, self.packed, self.bias, "add")
        elif factor is not None:
            y = run.binary(x, factor, self.packed, self.bias, "mul")
        else:
            y = run(x, self.packed, self.bias, *_POST[activation])
        return y  # type: ignore[no-any-return]


def why_not(weight: Tensor) -> str:
    """Why this weight stays plain; "" where it can be packed."""
    if weight.device.type != "cpu":
        return f"weights on {weight.device.type} are not packed"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch build has no oneDNN"
    operators = torch.ops.mkldnn
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return "this torch build has no prepacked oneDNN linear"
    if weight.dtype is torch.bfloat16:
        return "" if operators._is_mkldnn_bf16_supported() else "this processor has no bfloat16 instructions"
    if weight.dtype is torch.float16:
        return "" if operators._is_mkldnn_fp16_supported() else "this processor has no float16 instructions"
    return "" if weight.dtype is torch.float32 else f"{weight.dtype} weights are not packed"
