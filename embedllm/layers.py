"""The parts a decoder is built from, each holding its weights in the form it computes with.

Owns packing: a weight handed in is kept once, in the fastest layout there is for it. Knows no architecture. Invariant:
a part computes its rows independently, so a row of NaN stays a row of NaN.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from embedllm import ops
from embedllm.batch import round_rows
from embedllm_kernels import reference
from embedllm_kernels.cpu import norm
from embedllm_kernels.cpu.linear import Weight

Linear = Weight


def parts_for(device: torch.device) -> Any:
    """Norm, Linear, MLP and Experts for weights on this device: of this module, or their twins in `gpu`."""
    if ops.on_gpu(device):
        from embedllm import gpu

        return gpu
    return sys.modules[__name__]


class Norm:
    """RMS norm over the last dimension, or of each head with a weight of its own."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight [n], or [heads, n] for inputs [..., heads, n]."""
        self.per_head, self.eps = weight.dim() == 2, eps
        self.weight = weight.float() if self.per_head else norm.prepare(weight)

    def __call__(self, x: Tensor) -> Tensor:
        run = norm.rms_norm_each if self.per_head else norm.rms_norm
        return run(x, self.weight, self.eps)


class MLP:
    """down(act(gate) · up). Gate and up are two products: the activation and the multiplication are fused into them."""

    def __init__(
        self, gate_up: Tensor, down: Tensor, activation: str, biases: tuple[Tensor | None, Tensor | None], pack: bool
    ) -> None:
        """gate_up [2 · inner, hidden] = [gate; up], down [hidden, inner], and their biases."""
        inner = len(gate_up) // 2
        bias = biases[0]
        self.gate = Linear(gate_up[:inner], None if bias is None else bias[:inner], pack)
        self.up = Linear(gate_up[inner:], None if bias is None else bias[inner:], pack)
        self.down = Linear(down, biases[1], pack)
        self.activation = activation

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [tokens, hidden] → [tokens, hidden], plus the residual where one is given."""
        return self.down(self.up(x, factor=self.gate(x, activation=self.activation)), residual)

    @property
    def linears(self) -> list[Linear]:
        return [self.gate, self.up, self.down]


class Experts:
    """A mixture of experts: each token goes through the few that its router scores highest."""

    def __init__(
        self,
        router: Linear,
        gate_up: Tensor,
        down: Tensor,
        activation: str,
        num_chosen: int,
        renormalise: bool,
        pack: bool,
    ) -> None:
        """gate_up [experts, 2 · inner, hidden], down [experts, hidden, inner]."""
        weights = zip(gate_up, down, strict=True)
        self.router, self.experts = router, [MLP(*each, activation, (None, None), pack) for each in weights]
        self.num_chosen, self.renormalise = num_chosen, renormalise

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [tokens, hidden] → [tokens, hidden]. Each expert runs once, over the tokens that chose it."""
        weights, ids = ops.route(self.router(x), self.num_chosen, self.renormalise)
        by_expert = ids.flatten().argsort(stable=True)  # choices, those of one expert side by side
        tokens, shares = by_expert // self.num_chosen, weights.flatten()[by_expert, None]
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(ids.flatten().bincount(minlength=len(self.experts)).tolist()):
            if not count:
                continue
            rows = tokens[start : start + count]
            chosen = x.new_zeros((round_rows(count), x.shape[1]))
            torch.index_select(x, 0, rows, out=chosen[:count])
            y = self.experts[expert](chosen)[:count]
            out.index_add_(0, rows, y.float().mul_(shares[start : start + count]))
            start += count
        y = out.to(x.dtype)
        return y if residual is None else y.add_(residual)

    @property
    def linears(self) -> list[Linear]:
        return [self.router, *(linear for expert in self.experts for linear in expert.linears)]


class Head:
    """Hidden states to float32 logits."""

    def __init__(self, linear: Linear, divisor: float, softcap: float | None) -> None:
        self.linear, self.divisor, self.softcap = linear, divisor, softcap

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [rows, H] → float32 [rows, vocabulary]."""
        count = len(hidden)
        if not count:  # a step of prompt chunks only: the head may be a third of all weights
            return torch.zeros((0, self.linear.shape[0]), device=hidden.device)
        rows = round_rows(count)
        if rows != count:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, rows - count))
        logits = self.linear(hidden)[:count].float()
        if self.divisor != 1.0:
            logits.div_(self.divisor)
        return logits if self.softcap is None else reference.soft_cap(logits, self.softcap)
