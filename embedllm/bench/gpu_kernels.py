"""The other kernels of a step by themselves: products, norms, activations, rope with the cache's write, sampling.

Owns their inputs and how many bytes each must move at least: inputs and outputs once. Knows no engine. Invariant: what
takes more than a few MiB is read from memory and not from a cache, see `card.copies`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from embedllm.bench.card import Line, Roof, Setup, copies, seconds_per_call
from embedllm.bench.figures import Figure

if TYPE_CHECKING:
    from torch import Tensor

BANDWIDTH = "copy bandwidth"
TEMPERATURE, TOP_P = 0.8, 0.9
FLAT, PEAKED = 1.0, 4.0  # standard deviations of logits: as random weights give them, and nearer to trained ones

Call = Callable[[], object]


def lines(setup: Setup, roof: Roof) -> Iterator[Line]:
    """Products, the residual sum, what streams activations, sampling."""
    yield from _products(setup, roof)
    for rows in setup.sizes.residual_rows:
        name = f"residual sum in the product, {rows:,} rows"
        yield name, functools.partial(residual, setup, name, rows)
    for tokens in setup.sizes.tokens:
        for make in (rms_norm, add_rms_norm, gated, rotary_store):
            name = f"{make.__name__}, {tokens:,} tokens"
            yield name, functools.partial(_streamed, setup, roof, name, functools.partial(make, setup, tokens))
    rows, size = setup.sizes.sampled
    for kind, make_draw in SAMPLING.items():
        name = f"sampling {rows} × {size:,}, {kind}"
        yield name, functools.partial(_streamed, setup, roof, name, functools.partial(make_draw, setup))


def _streamed(setup: Setup, roof: Roof, name: str, make: Callable[[], tuple[int, Call]]) -> Figure:
    """Time of a kernel whose work is to move bytes. make() → (bytes, a call on data of its own)."""
    num_bytes, first = make()
    calls = [first] + [make()[1] for _ in range(copies(num_bytes, setup.device) - 1)]
    seconds = seconds_per_call(calls, setup.device)
    return Figure(name, seconds * 1e6, "µs", num_bytes / seconds / roof.bandwidth, BANDWIDTH)


def _noise(setup: Setup, *shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, dtype=getattr(torch, setup.dtype), device=setup.device)


# ---- products -------------------------------------------------------------------------------------------------


def _products(setup: Setup, roof: Roof) -> Iterator[Line]:
    """cuBLAS on the products of a decoding step: whatever their number of rows, the weights must be read once."""
    sizes = setup.sizes
    q_size = sizes.heads * sizes.head_dim
    shapes = {
        "qkv": (q_size + sizes.kv_width, sizes.hidden),
        "o": (sizes.hidden, q_size),
        "gate_up": (2 * sizes.inner, sizes.hidden),
        "down": (sizes.hidden, sizes.inner),
        "head": (sizes.vocab, sizes.hidden),
    }
    for rows in sizes.rows:
        for which, (out, inner) in shapes.items():
            name = f"product {which} [{out:,}, {inner:,}], {rows} rows"
            yield (
                name,
                functools.partial(_streamed, setup, roof, name, functools.partial(_product, setup, rows, out, inner)),
            )


def _product(setup: Setup, rows: int, out: int, inner: int) -> tuple[int, Call]:
    from torch.nn.functional import linear

    x, weight = _noise(setup, rows, inner), _noise(setup, out, inner)
    return weight.nbytes + x.nbytes + rows * out * x.itemsize, functools.partial(linear, x, weight)


def by_product(x: Tensor, weight: Tensor, total: Tensor, norm: Tensor) -> Tensor:
    """The norm of total + x · weightᵀ; total becomes that sum, which the product's own epilogue adds."""
    from embedllm_kernels.triton.norm import rms_norm as run

    total.addmm_(x, weight.t())
    return run(total, norm, 1e-5)


def by_norm(x: Tensor, weight: Tensor, total: Tensor, norm: Tensor) -> Tensor:
    """The same, the sum being taken where the norm reads the product."""
    from torch.nn.functional import linear

    from embedllm_kernels.triton.norm import add_rms_norm as run

    y = linear(x, weight)
    return run(y, total, norm, 1e-5, out=y, total=total)[0]


def residual(setup: Setup, name: str, rows: int) -> Figure:
    """The sum by the down product's own epilogue and then the norm, beside a plain product and a norm that sums.

    The first is what `embedllm.gpu` does.
    """
    sizes = setup.sizes
    weight = 0.02 * _noise(setup, sizes.hidden, sizes.inner)
    seconds = []
    for in_product in (True, False):
        calls: list[Call] = []
        for number in range(copies(weight.nbytes, setup.device)):
            w = weight if number == 0 else weight.clone()
            x, total = _noise(setup, rows, sizes.inner), _noise(setup, rows, sizes.hidden)
            calls.append(functools.partial(by_product if in_product else by_norm, x, w, total, _norm_weight(setup)))
        seconds.append(seconds_per_call(calls, setup.device))
    faster = "the product's epilogue" if seconds[0] <= seconds[1] else "add_rms_norm"
    beside = f"add_rms_norm after a plain product {seconds[1] * 1e6:.1f} µs; {faster} is faster and should stay"
    return Figure(name, seconds[0] * 1e6, "µs", beside=beside)


# ---- what streams activations ---------------------------------------------------------------------------------


def _norm_weight(setup: Setup) -> Tensor:
    import torch

    return torch.ones(setup.sizes.hidden, device=setup.device)


def rms_norm(setup: Setup, tokens: int) -> tuple[int, Call]:
    from embedllm_kernels.triton.norm import rms_norm as run

    x = _noise(setup, tokens, setup.sizes.hidden)
    return 2 * x.nbytes, functools.partial(run, x, _norm_weight(setup), 1e-5)


def add_rms_norm(setup: Setup, tokens: int) -> tuple[int, Call]:
    from embedllm_kernels.triton.norm import add_rms_norm as run

    x, total = (_noise(setup, tokens, setup.sizes.hidden) for _ in range(2))
    return 4 * x.nbytes, functools.partial(run, x, total, _norm_weight(setup), 1e-5, out=x, total=total)


def gated(setup: Setup, tokens: int) -> tuple[int, Call]:
    from embedllm_kernels.triton.gated import gated as run

    gate_up = _noise(setup, tokens, 2 * setup.sizes.inner)
    return gate_up.nbytes * 3 // 2, functools.partial(run, gate_up)


def rotary_store(setup: Setup, tokens: int) -> tuple[int, Call]:
    import torch

    from embedllm_kernels.triton.rotary_store import rotary_store as run

    sizes = setup.sizes
    turned = (sizes.heads + sizes.kv_heads) * sizes.head_dim
    qkv = _noise(setup, tokens, sizes.heads * sizes.head_dim + sizes.kv_width)
    angles = torch.arange(tokens, device=setup.device)[:, None] * torch.rand(sizes.head_dim // 2, device=setup.device)
    cache = torch.zeros(-(-tokens // sizes.block), sizes.block, sizes.kv_width, dtype=qkv.dtype, device=setup.device)
    slots = torch.arange(tokens, dtype=torch.int32, device=setup.device)
    num_bytes = qkv.nbytes + tokens * (turned + sizes.kv_width) * qkv.itemsize + 2 * angles.nbytes
    return num_bytes, functools.partial(
        run, qkv, angles.cos(), angles.sin(), cache, slots, num_heads=sizes.heads, num_kv_heads=sizes.kv_heads
    )


# ---- sampling -------------------------------------------------------------------------------------------------


def _logits(setup: Setup, deviation: float) -> Tensor:
    import torch

    return deviation * torch.randn(*setup.sizes.sampled, device=setup.device)


def _greedy(setup: Setup) -> tuple[int, Call]:
    from embedllm_kernels.sampling import argmax_rows

    logits = _logits(setup, FLAT)
    return logits.nbytes, functools.partial(argmax_rows, logits)


def _draw(setup: Setup, *, temperature: float, top_p: float, deviation: float) -> tuple[int, Call]:
    import torch

    from embedllm_kernels.sampling import key_words
    from embedllm_kernels.triton.sampling import sample

    logits, rows = _logits(setup, deviation), setup.sizes.sampled[0]

    def each(value: float, dtype: Any = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=setup.device)

    limits = each(temperature), each(0, torch.int32), each(top_p), each(0.0)
    words = key_words(list(range(rows))).to(setup.device)
    return logits.nbytes, functools.partial(sample, logits, *limits, words, filtered=top_p < 1)


SAMPLING: dict[str, Callable[[Setup], tuple[int, Call]]] = {
    "greedy": _greedy,
    "greedy by `sample`": functools.partial(_draw, temperature=0.0, top_p=1.0, deviation=FLAT),
    "a draw from all": functools.partial(_draw, temperature=TEMPERATURE, top_p=1.0, deviation=FLAT),
    f"top-p {TOP_P}, flat": functools.partial(_draw, temperature=TEMPERATURE, top_p=TOP_P, deviation=FLAT),
    f"top-p {TOP_P}, peaked": functools.partial(_draw, temperature=TEMPERATURE, top_p=TOP_P, deviation=PEAKED),
}
