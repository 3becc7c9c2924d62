"""Choosing tokens from logits: argmax, penalties, the candidate filters, counter-based noise, log-probabilities.

    noise(key, id) = -log(-log(1 - u)),  u = (bits(key, id) + 1/2) / 2^31           Gumbel(0, 1)
    token(key)     = argmax over kept ids of  logit(id) / temperature + noise(key, id)

The argmax is distributed as softmax(logits / temperature) over the kept ids (Gumbel-max; Maddison et al. 2014,
arXiv:1411.0030). `bits` is a keyed integer hash in int32 arithmetic, the same on every device, so a draw depends on
its key and its own row only. Knows nothing of requests. Invariant: every id returned is in [0, V), inputs are never
written unless the function says "in place", and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MASK = 2**64 - 1
_BLOCK = 64  # ids per block of the two-stage top-k
_FIRST_WIDTH = 128  # candidates listed before the first look whether they suffice; half of it for a small top-k
_CHUNK = 1 << 17  # elements worked on at a time: half a MiB of float32, several of which stay in a core's cache


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
    for part in _chunks(torch.arange(len(logits), device=logits.device), logits.shape[1]):
        scores = logits[part] - best[part, None]
        scores /= temperature[part, None].to(scores.dtype).clamp_(min=1e-30)
        scores += gumbel_noise(mixed[None], words[part], scores.dtype)
        ids.append(argmax_rows(scores)[0])
    return torch.cat(ids)


def _chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """`rows` in parts of about _CHUNK elements on a CPU, all at once elsewhere."""
    step = max(1, _CHUNK // size) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


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
    for rows in _chunks(((top_p < 1) & (top_k == 0)).nonzero()[:, 0], size):
        z = (logits[rows] - best[rows, None]) / temperature[rows, None].to(logits.dtype)
        mass[rows] = z.exp_().sum(1, dtype=torch.float64)
    small = bool(((top_k > 0) & (top_k < _FIRST_WIDTH // 2 - 8)).all())  # ties with the k-th stay too
    todo, width = torch.arange(len(logits), device=logits.device), min(_FIRST_WIDTH // (1 + small), size)
    while len(todo):
        again = []
        for part in _chunks(todo, width * 16):
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
    size = logits.shape[1]
    if logits.device.type != "cpu":
        return logprobs_in_one_go(logits, chosen, k)
    k, width = min(k, size), min(size, max(64, 2 * k))
    values, ids = top_candidates(logits, width)
    if width < size:  # ids that tie with the last one listed are not all known
        for row in (values[:, max(k - 1, 0)] == values[:, -1]).nonzero()[:, 0].tolist() if k else ():
            full_values, full_ids = top_candidates(logits[row : row + 1], size)
            values[row], ids[row] = full_values[0, :width], full_ids[0, :width]
    picked = logits.gather(1, chosen[:, None])
    here = ids == chosen[:, None]
    rank = 1 + here.int().argmax(1)
    listed = here.any(1) & ((picked[:, 0] > values[:, -1]) | (width == size))
    for row in (~listed).nonzero()[:, 0].tolist():
        line, value = logits[row], picked[row]
        lower = line[: int(chosen[row])]
        rank[row] = 1 + torch.count_nonzero(line > value) + torch.count_nonzero(lower == value)
    norm = logits.logsumexp(1, keepdim=True)
    return (picked - norm)[:, 0], rank, values[:, :k] - norm, ids[:, :k]


def logprobs_in_one_go(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logprobs` without a look at any value on the way, so that the host need not wait for the device."""
    size = logits.shape[1]
    ids = torch.arange(size, device=logits.device)
    picked = logits.gather(1, chosen[:, None])
    before = (logits > picked) | ((logits == picked) & (ids < chosen[:, None]))
    bits = (logits + 0.0).view(torch.int32).to(torch.int64)  # -0.0 becomes 0.0, which it is equal to
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    found = ((ordered << 32) - ids).topk(min(k, size), dim=1).indices
    norm = logits.logsumexp(1, keepdim=True)
    return (picked - norm)[:, 0], 1 + before.sum(1), logits.gather(1, found) - norm, found
