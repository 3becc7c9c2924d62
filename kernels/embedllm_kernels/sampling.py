"""Choosing tokens from logits: argmax, penalties, the candidate filters, counter-based noise, log-probabilities.

    noise(key, id) = -log(-log(1 - u)),  u = (bits(key, id) + 1/2) / 2^31           Gumbel(0, 1)
    token(key)     = argmax over kept ids of  logit(id) / temperature + noise(key, id)

The argmax is distributed as softmax(logits / temperature) over the kept ids (Gumbel-max; Maddison et al. 2014,
arXiv:1411.0030). `bits` is a keyed integer hash in int32 arithmetic, the same on every device, so a draw depends on
its key and its own row only. Knows nothing of requests. Invariant: every id returned is in [0, V), inputs are never
written unless the function says "in place", and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**64 - 1
_BLOCK = 64  # ids per block of the two-stage top-k
_FIRST_WIDTH = 128  # candidates listed before the first look whether they suffice
_CHUNK = 1 << 18  # elements worked on at a time: 1 MiB of float32 stays in a core's L2


def fold(key: int, word: int) -> int:
    """One step of key derivation: a 64-bit key and the next 64-bit word give a key (splitmix64's finaliser)."""
    x = ((key ^ word) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key_words(keys: list[int], device: torch.device | str = "cpu") -> Tensor:
    """64-bit keys as [n, 2] int32: low word, high word."""
    return (
        torch.tensor([_as_int64(key) for key in keys], dtype=torch.int64, device=device).view(torch.int32).view(-1, 2)
    )


def _as_int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_xor(x: Tensor, shift: int) -> Tensor:
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))  # a logical shift, int32 has none


def mix_ids(ids: Tensor) -> Tensor:
    """The key-independent half of the hash (lowbias32, C. Wellons): int32, the shape of `ids`."""
    x = ids.to(torch.int32, copy=True)
    x = _shift_xor(x, 16).mul_(0x21F0AAAD)
    x = _shift_xor(x, 15).mul_(0xD35A2D97 - 2**32)
    return _shift_xor(x, 15)


def gumbel_noise(mixed: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel(0, 1) noise: `mixed` [n or 1, k] of mix_ids, `words` [n, 2] of key_words -> [n, k] of `dtype`, finite."""
    x = mixed.bitwise_xor(words[:, :1]).mul_(0x7FEB352D)
    x = _shift_xor(x, 15).add_(words[:, 1:]).mul_(0x846CA68B - 2**32)
    x = _shift_xor(x, 16).mul_(0x31848BAB)
    u = _shift_xor(x, 14).bitwise_and_(2**31 - 1).to(dtype).add_(0.5).mul_(2.0**-31)
    u.clamp_(max=1 - 2.0**-24)  # float32 would round the last 64 values up to 1, whose noise is -inf
    return u.neg_().log1p_().neg_().log_().neg_()


def argmax_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n, V] -> (ids [n] int64, best [n]): each row's largest logit and its lowest id; NaN if the row has one."""
    if logits.device.type == "cpu":  # NumPy's is vectorised, torch's is not: 0.7 against 10 ms at 32 x 151,936
        ids = torch.from_numpy(logits.detach().numpy().argmax(1))
        return ids, logits.gather(1, ids[:, None])[:, 0]
    best, ids = logits.max(1)
    return ids, best


def penalise(
    logits: Tensor, rows: Tensor, ids: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> None:
    """Penalties in place, at distinct (row, id) pairs; every other tensor is 1-D, one entry per pair.

    repetition divides positive and multiplies negative logits (Keskar et al. 2019, arXiv:1909.05858); then
    frequency x count and, where count > 0, presence are subtracted. `counts` counts the id in the output.
    """
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts
    logits[rows, ids] = values - presence * (counts > 0)


def top_candidates(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[n, V] -> (values, ids) [n, width] of the largest logits in order, ties by id.

    Of several ids tied with the last value listed, any may be left out.
    """
    num_rows, size = logits.shape
    if width >= size:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values, ids
    num_blocks = size // _BLOCK
    if width * _BLOCK * 4 > size:
        _, ids = logits.topk(width, dim=1)
    else:  # what is among the `width` largest lies in one of the `width` blocks with the largest maxima
        maxima = logits[:, : num_blocks * _BLOCK].view(num_rows, num_blocks, _BLOCK).amax(2)
        starts = maxima.topk(width, dim=1).indices * _BLOCK
        inner = torch.arange(_BLOCK, device=logits.device)
        rest = torch.arange(num_blocks * _BLOCK, size, device=logits.device).expand(num_rows, -1)
        places = torch.cat([(starts[:, :, None] + inner).flatten(1), rest], 1)
        _, chosen = logits.gather(1, places).topk(width, dim=1)
        ids = places.gather(1, chosen)
    ids = ids.sort(dim=1).values
    values, order = logits.gather(1, ids).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def kept(values: Tensor, z: Tensor, mass: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which candidates survive top-k, then top-p, then min-p: a prefix of each row, never empty. [n, w] bool.

    values [n, w]: logits, sorted. z: (logit - best) / temperature. mass [n]: sum of exp(z) over the whole row.
    top_k [n] int64, 0 = all: what ties with the k-th stays. top_p [n]: ids stay until their mass, within the top-k,
    reaches it; the one that crosses stays. min_p [n]: ids below min_p x the best's probability go.
    """
    width = values.shape[1]
    kth = values.gather(1, (top_k - 1).clamp(0, width - 1)[:, None])
    limited = ((top_k > 0) & (top_k <= width))[:, None]
    keep = (values > -torch.inf) & (~limited | (values >= kth))
    p = z.exp() * keep
    before = p.cumsum(1)
    total = torch.where(limited, before[:, -1:], mass[:, None])
    before = before - p
    keep &= (top_p >= 1)[:, None] | (before < top_p[:, None] * total)
    keep &= p >= min_p[:, None]
    keep[:, 0] = True
    return keep


def draw(logits: Tensor, best: Tensor, temperature: Tensor, words: Tensor, mixed: Tensor) -> Tensor:
    """One id per row from softmax(logits / temperature) over all ids: [n] int64.

    best [n]: each row's largest logit, finite. temperature [n] > 0. words [n, 2]. mixed [V]: mix_ids(arange(V)).
    """
    ids = []
    step = max(1, _CHUNK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        scores = logits[part] - best[part, None]
        scores /= temperature[part, None].to(scores.dtype).clamp_(min=1e-30)
        scores += gumbel_noise(mixed[None], words[part], scores.dtype)
        ids.append(argmax_rows(scores)[0])
    return torch.cat(ids)


def draw_filtered(
    logits: Tensor, best: Tensor, temperature: Tensor, words: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """One id per row, drawn among those that top-k, then top-p, then min-p keep: [n] int64. See `draw` and `kept`.

    Lists the likeliest candidates only, and more of them for the rows where these do not suffice.
    """
    size = logits.shape[1]
    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    temperature = temperature.double().clamp(min=1e-30)
    mass = torch.ones_like(temperature)
    top_k = torch.where(top_k < size, top_k, 0)
    for row in ((top_p < 1) & (top_k == 0)).nonzero()[:, 0].tolist():
        mass[row] = ((logits[row] - best[row]) / temperature[row].float()).exp_().sum(dtype=torch.float64)
    todo, width = torch.arange(len(logits), device=logits.device), min(_FIRST_WIDTH, size)
    while len(todo):
        again = []
        step = max(1, (1 << 20) // width)
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            source = logits if len(part) == len(logits) else logits[part]
            values, ids = top_candidates(source, width)
            z = (values.double() - best[part, None]) / temperature[part, None]
            keep = kept(values, z, mass[part], top_k[part], top_p[part], min_p[part])
            scores = z + gumbel_noise(mix_ids(ids), words[part], torch.float64)
            chosen = scores.masked_fill(~keep, -torch.inf).argmax(1, keepdim=True)
            out[part] = ids.gather(1, chosen)[:, 0]
            if width < size:  # what ties with the last one listed is not known, so nothing as small may be kept
                last = values.gather(1, keep.sum(1, keepdim=True) - 1)[:, 0]
                again.append(part[(last <= values[:, -1]) | (top_k[part] > width)])
        todo = torch.cat(again) if again else todo[:0]
        width = min(width * 8, size)
    return out


def logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of softmax(logits), [n, V]: (of `chosen` [n], their ranks [n], the top k [n, k], their ids).

    Ranks count from 1 in the order (logit descending, id ascending), which is also the order of `ids` [n, k].
    """
    picked = logits.gather(1, chosen[:, None])
    norm = logits.logsumexp(1, keepdim=True)
    lower = torch.arange(logits.shape[1], device=logits.device) < chosen[:, None]
    rank = 1 + ((logits > picked) | ((logits == picked) & lower)).sum(1)
    k = min(k, logits.shape[1])
    if k == 0:
        empty = logits.new_empty((len(logits), 0))
        return (picked - norm)[:, 0], rank, empty, empty.to(torch.int64)
    values, ids = _exact_top(logits, k)
    return (picked - norm)[:, 0], rank, values - norm, ids


def _exact_top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest, ties at the edge by id too."""
    width = min(logits.shape[1], max(64, 2 * k))
    values, ids = top_candidates(logits, width)
    tied = values[:, k - 1] == values[:, -1]
    if width < logits.shape[1] and bool(tied.any()):
        full_values, full_ids = top_candidates(logits[tied], logits.shape[1])
        values[tied, :k], ids[tied, :k] = full_values[:, :k], full_ids[:, :k]
    return values[:, :k], ids[:, :k]
