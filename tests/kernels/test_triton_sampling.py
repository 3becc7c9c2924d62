"""Sampling in Triton, interpreted, against embedllm_kernels.sampling.

A draw must be the reference's id. Noise and probabilities are float32 here and float64 there, so another id is accepted
where the two scores differ by less than 1e-5, and at most once in a test.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from embedllm_kernels import sampling as reference

pytest.importorskip("triton")
from embedllm_kernels.triton import sampling

# The interpreter computes with numpy, which warns of what hardware does silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass
class Batch:
    """Rows of logits and what each asks for."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    words: Tensor

    def sample(self, **options: object) -> tuple[Tensor, Tensor]:
        return sampling.sample(self.logits, self.temperature, self.top_k, self.top_p, self.min_p, self.words, **options)

    def rows(self, chosen: slice) -> "Batch":
        return Batch(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def batch(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Batch:
    n = len(logits)
    words = reference.key_words([reference.fold(seed, i) for i in range(n)])
    limits = (torch.full((n,), top_p), torch.full((n,), min_p))
    return Batch(logits, torch.full((n,), temperature), torch.full((n,), top_k, dtype=torch.int32), *limits, words)


def expected(given: Batch) -> tuple[Tensor, Tensor]:
    """The ids of the reference, and the scores they were chosen by."""
    best = given.logits.amax(1)
    z = (given.logits.double() - best[:, None]) / given.temperature.double().clamp(min=1e-30)[:, None]
    mixed = reference.mix_ids(torch.arange(given.logits.shape[1]))
    scores = z + reference.gumbel_noise(mixed[None], given.words, torch.float64)
    limits = (given.top_k.long(), given.top_p.double(), given.min_p.double())
    filtered = (given.top_k > 0) | (given.top_p < 1) | (given.min_p > 0)
    if bool(filtered.any()):
        return reference.draw_filtered(given.logits, best, given.temperature, given.words, *limits), scores
    return reference.draw(given.logits, best, given.temperature, given.words, mixed), scores


def check(given: Batch, **options: object) -> None:
    found, best = given.sample(**options)
    ids, scores = expected(given)
    assert torch.equal(best, given.logits.amax(1))
    (other,) = (found != ids).nonzero(as_tuple=True)
    gap = (scores[other, found[other]] - scores[other, ids[other]]).abs()
    assert len(other) <= 1 and bool((gap < 1e-5).all()), (other, found[other], ids[other], gap)


def logits_of(rows: int, size: int, seed: int, spread: float = 3.0) -> Tensor:
    wide = torch.randn((rows, size + 5), generator=torch.Generator().manual_seed(seed)) * spread
    return wide[:, :size]  # rows with a gap


@pytest.mark.parametrize("size", [1, 5, 2_049, 7_001])
def test_greedy_takes_the_lowest_id(size: int, test_seed: int) -> None:
    logits = logits_of(4, size, test_seed)
    logits[1] = 1.0
    logits[2, size // 2 :] = logits[2].max() + 1  # ties
    logits[3] = -torch.inf
    found, best = batch(logits, temperature=0.0, top_k=3, top_p=0.5).sample()
    assert found.tolist() == [int(logits[0].argmax()), 0, size // 2, 0]
    assert torch.equal(best, logits.amax(1))


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (12, 77), (4, 2_048), (4, 4_999)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_unfiltered_draws(rows: int, size: int, temperature: float, test_seed: int) -> None:
    given = batch(logits_of(rows, size, test_seed), temperature, seed=test_seed)
    check(given, filtered=False)
    assert torch.equal(given.sample()[0], given.sample(filtered=False)[0])


def test_a_large_vocabulary(test_seed: int) -> None:
    given = batch(logits_of(3, 151_655, test_seed), 0.8, top_p=0.9, seed=test_seed)
    given.top_k[1] = 20
    given.top_p[2] = 1
    check(given)


FILTERS = {
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k of more than there are groups": {"top_k": 200},
    "top-k of all": {"top_k": 3_001},
    "top-p": {"top_p": 0.9},
    "a small top-p": {"top_p": 1e-6},
    "a large top-p": {"top_p": 0.9999},
    "min-p": {"min_p": 0.05},
    "min-p of one": {"min_p": 1.0},
    "all": {"top_k": 30, "top_p": 0.8, "min_p": 0.01},
    "top-p and min-p, hot": {"temperature": 3.0, "top_p": 0.7, "min_p": 0.1},
    "top-k and top-p, cold": {"temperature": 0.05, "top_k": 500, "top_p": 0.99},
}


@pytest.mark.parametrize("name", FILTERS)
def test_filtered_draws(name: str, test_seed: int) -> None:
    check(batch(logits_of(3, 3_001, test_seed), seed=test_seed, **FILTERS[name]))


@pytest.mark.parametrize("capacity", [8, 16_384])
@pytest.mark.parametrize("name", ["top-k", "top-p", "min-p", "all", "top-p and min-p, hot"])
def test_ties(name: str, capacity: int, test_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ties with the k-th stays; of what ties where top-p is reached, the lowest ids do. All keys, one row."""
    monkeypatch.setattr(sampling, "CAPACITY", capacity)
    logits = (logits_of(1, 301, test_seed) / 2).round() * 2
    logits[0, ::7] = -torch.inf
    check(batch(logits.expand(4, -1).contiguous(), seed=test_seed, **FILTERS[name]))


def test_no_more_than_top_k(test_seed: int) -> None:
    """So hot that the k-th and the next are drawn as often as the best."""
    check(batch(logits_of(1, 130, test_seed).expand(16, -1).contiguous(), 1e4, top_k=3, seed=test_seed))


def test_equal_logits(test_seed: int) -> None:
    given = batch(torch.zeros(3, 128), top_p=0.125, seed=test_seed)
    given.logits[:, ::2] = -0.0  # equal to 0
    check(given)


def test_fewer_ids_than_top_k(test_seed: int) -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [7, 70, 299]] = torch.tensor([1.0, 2.0, 1.5])
    for options in ({"top_k": 10}, {"top_k": 10, "top_p": 0.7}, {"top_p": 0.999}):
        check(batch(logits, seed=test_seed, **options))


def test_the_list_may_be_too_short(test_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CAPACITY", 16)
    monkeypatch.setattr(sampling, "TILE", 512)
    for name in ("top-k of more than there are groups", "a large top-p", "all"):
        check(batch(logits_of(2, 1_001, test_seed), seed=test_seed, **FILTERS[name]))


def test_rows_differ(test_seed: int) -> None:
    """Greedy, unfiltered and filtered rows in one batch, and each the same alone."""
    given = batch(logits_of(6, 2_500, test_seed), 0.9, seed=test_seed)
    given.temperature[1] = 0
    given.top_k[2:4] = 40
    given.top_p[3:5] = 0.8
    given.min_p[5] = 0.2
    found, best = given.sample()
    for i in range(6):
        alone, its_best = given.rows(slice(i, i + 1)).sample()
        assert alone[0] == found[i] and its_best[0] == best[i]
        if i != 1:
            check(given.rows(slice(i, i + 1)))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}])
def test_rows_that_must_be_refused(options: dict[str, float], test_seed: int) -> None:
    logits = logits_of(5, 2_100, test_seed)
    plain = batch(logits.clone(), seed=test_seed, **options).sample()[0]
    logits[0, 2_050] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3] = torch.nan
    ids, best = batch(logits, seed=test_seed, **options).sample()
    assert torch.isfinite(best).tolist() == [False] * 4 + [True]
    assert bool(best[0].isnan()) and bool(best[3].isnan())
    assert bool(((ids >= 0) & (ids < 2_100)).all()) and ids[4] == plain[4]


def test_workspaces(test_seed: int) -> None:
    given = batch(logits_of(3, 1_000, test_seed), top_p=0.9, seed=test_seed)
    buffer = torch.full((sampling.workspace_size(3, 1_000),), 255, dtype=torch.uint8)  # NaN and -1 everywhere
    assert torch.equal(given.sample(workspace=buffer)[0], given.sample()[0])
    with pytest.raises(ValueError, match="workspace"):
        given.sample(workspace=buffer[:-1])
    assert given.rows(slice(0, 0)).sample()[0].shape == (0,)
