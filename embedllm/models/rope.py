"""Rotary position embedding: which frequencies a model turns its queries and keys by.

Owns the parsing of every spelling of rope settings and the formulas of its scalings. Knows no layer and no batch.
Invariant: the frequencies depend on the model and on max_model_len only, never on the request being run.

Sources: rotary embedding arXiv:2104.09864; linear scaling arXiv:2306.15595; YaRN arXiv:2309.00071; LongRoPE
arXiv:2402.13753; the Llama 3.1 scaling as published with its config.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedllm.errors import UnsupportedModel
from embedllm.models.fields import Fields

if TYPE_CHECKING:
    import torch

MAX_POSITIONS = 2**31 - 1
_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rope of one layer. `dim`: how many of each head's first dimensions are turned, even. `theta`: its base.

    kind: default | linear | llama3 | yarn | longrope; the fields after it are that kind's own.
    amplitude: factor on cos and sin (yarn, longrope), 1.0 for the others.
    """

    dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    amplitude: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def frequencies(self, max_model_len: int) -> torch.Tensor:
        """Radians per position, float32 [dim // 2] on the CPU.

        `max_model_len` chooses between longrope's two sets, once for the life of the model.
        """
        import torch

        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        periods = self.theta**exponents  # [dim // 2], radians to positions
        if self.kind == "longrope":
            chosen = self.long_factor if max_model_len > self.original_max_len else self.short_factor
            return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * periods)
        plain = 1.0 / periods
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain)
        return plain

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """Long waves are slowed by `factor`, short ones kept, those between blended."""
        import torch

        waves = 2 * math.pi / plain  # positions per turn
        longest = self.original_max_len / self.low_freq_factor
        shortest = self.original_max_len / self.high_freq_factor
        slowed = torch.where(waves > longest, plain / self.factor, plain)
        blend = (self.original_max_len / waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blended = (1 - blend) * slowed / self.factor + blend * slowed
        between = (waves >= shortest) & (waves <= longest)
        return torch.where(between, blended, slowed)

    def _yarn(self, plain: torch.Tensor) -> torch.Tensor:
        """Dimensions that turn often are kept, those that turn less than once slowed, a ramp between."""
        import torch

        def dimension(turns: float) -> float:
            """The dimension that makes `turns` turns over the original context."""
            return self.dim * math.log(self.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001  # a ramp needs a width
        ramp = ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return plain / self.factor * (1 - kept) + plain * kept


def parse_rope(config: Fields, spec: Fields, *, head_dim: int, theta: float, partial: bool) -> Rope:
    """The rope that `spec` (rope_parameters or rope_scaling, maybe empty) asks for.

    `config` is the whole config.json, where older files keep rope_theta, partial_rotary_factor and
    original_max_position_embeddings; `theta` is the family's default base; `partial` whether the family can turn a part
    of each head only. Raises UnsupportedModel for a kind or a combination that would be computed wrongly.
    """
    kind = spec.text("rope_type", spec.text("type", "default"))
    if kind == "su":
        kind = "longrope"
    if kind not in _KINDS:
        reason = "lets one request's length change another's answer" if kind == "dynamic" else "is not known"
        raise UnsupportedModel(f"{spec.where}: rope type {kind!r} {reason}; known are {', '.join(_KINDS)}")
    share = spec.number("partial_rotary_factor", 0.0, 1.0, config.number("partial_rotary_factor", 0.0, 1.0, 1.0))
    dim = int(head_dim * share)
    if dim != head_dim and not partial:
        raise UnsupportedModel(f"{config.where}: partial_rotary_factor={share} is not used by this architecture")
    if dim < 2 or dim % 2:
        raise UnsupportedModel(f"{config.where}: rope over {dim} of {head_dim} dimensions; it takes an even number")
    base = spec.number("rope_theta", 1.0, 1e18, config.number("rope_theta", 1.0, 1e18, theta, above=True), above=True)
    if kind == "default":
        return Rope(dim=dim, theta=base)
    if kind == "linear":
        return Rope(dim=dim, theta=base, kind=kind, factor=spec.number("factor", 0.0, 1e9, above=True))
    max_len = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    original = config.integer(
        "original_max_position_embeddings",
        1,
        MAX_POSITIONS,
        spec.integer("original_max_position_embeddings", 1, MAX_POSITIONS, max_len),
    )
    if kind == "llama3":
        low, high = spec.number("low_freq_factor", 0.0, 1e9, above=True), spec.number("high_freq_factor", 0.0, 1e9)
        if high <= low:
            spec.fail("high_freq_factor", f"is {high:g}, must be above low_freq_factor={low:g}")
        factor = spec.number("factor", 0.0, 1e9, above=True)
        return Rope(
            dim=dim,
            theta=base,
            kind=kind,
            factor=factor,
            original_max_len=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if kind == "yarn":
        return _parse_yarn(spec, dim=dim, theta=base, original=original, max_len=max_len)
    return _parse_longrope(spec, dim=dim, theta=base, original=original, max_len=max_len)


def _parse_yarn(spec: Fields, *, dim: int, theta: float, original: int, max_len: int) -> Rope:
    factor = spec.number("factor", 0.0, 1e9, max_len / original, above=True)
    mscale, mscale_all = spec.number("mscale", 0.0, 1e9, 0.0), spec.number("mscale_all_dim", 0.0, 1e9, 0.0)

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    inferred = growth(mscale) / growth(mscale_all) if mscale and mscale_all else growth(1.0)
    return Rope(
        dim=dim,
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_len=original,
        amplitude=spec.number("attention_factor", 0.0, 1e6, inferred, above=True),
        beta_fast=spec.number("beta_fast", 0.0, 1e9, 32.0) or 32.0,
        beta_slow=spec.number("beta_slow", 0.0, 1e9, 1.0) or 1.0,
        truncate=spec.flag("truncate", True),
    )


def _parse_longrope(spec: Fields, *, dim: int, theta: float, original: int, max_len: int) -> Rope:
    factor = spec.number("factor", 0.0, 1e9, max_len / original, above=True)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    return Rope(
        dim=dim,
        theta=theta,
        kind="longrope",
        factor=factor,
        original_max_len=original,
        amplitude=spec.number("attention_factor", 0.0, 1e6, inferred, above=True),
        short_factor=spec.numbers("short_factor", dim // 2, 0.0, 1e9),
        long_factor=spec.numbers("long_factor", dim // 2, 0.0, 1e9),
    )
