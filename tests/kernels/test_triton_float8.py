"""A KV cache of float8_e4m3fn: attention over it, and whole models that write and read it, interpreted.

Tolerances: what a byte stands for is exact, so attention is as near to its reference as over any other cache (float32
1e-5, float16 2e-3). A model's logits are those of the CPU's own operations over KV that was rounded to float8 and back,
2e-4 in float32. Against KV that was not rounded (three bits of mantissa: each value is off by up to a sixteenth) the
log-probabilities of these small random models differ on average by 0.3 of their logits' standard deviation at most.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import embedllm
from embedllm import kv_cache, ops
from embedllm.kv_cache import KVCache, KVGroup
from embedllm.models.hub import resolve
from embedllm.models.load import load
from embedllm.runner import Runner
from embedllm_kernels import reference
from tests.engine import tiny_models
from tests.kernels.paged import MIXES, Ragged, draw
from tests.kernels.test_triton_model import BLOCK, MODELS, make, plans

pytest.importorskip("triton")
from embedllm_kernels.triton.attention import paged_attention
from embedllm_kernels.triton.tuning import Launch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
MEMORY = 32 * 16 * 1_152  # bytes of 32 blocks of 16 tokens of a tiny model's float32 KV
FORMS = pytest.mark.parametrize("form", ["decode", "prefill"])


def in_bytes(case: Ragged) -> Ragged:
    """The case over a cache of float8, one layer of three; slots that nobody wrote are NaN there too."""
    blocks = torch.zeros((len(case.cache), 3, *case.cache.shape[1:]), dtype=torch.uint8).view(FP8)
    blocks[:, 1] = case.cache.to(FP8)
    assert (blocks[:, 1].view(torch.uint8) == 0x7F).any()
    return replace(case, cache=blocks[:, 1])


def attend(case: Ragged, form: str, **options: object) -> Tensor:
    defaults = {
        "num_kv_heads": case.num_kv_heads,
        "scale": 0.3,
        "max_query_len": int(case.query_starts.diff().max()),
        "max_seq_len": int(case.seq_lens.max()),
        "launch": Launch(16, 16, 4, 1),
    }
    return paged_attention(
        case.q, case.cache, case.tables, case.query_starts, case.seq_lens, form=form, **{**defaults, **options}
    )


def expect(case: Ragged, **options: object) -> Tensor:
    options = {"num_kv_heads": case.num_kv_heads, "scale": 0.3, **options}
    found = reference.paged_attention(case.q, case.cache, case.tables, case.query_starts, case.seq_lens, **options)
    assert not found.isnan().any()
    return found


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_the_reference_dequantises(test_seed: int) -> None:
    """The same cache in float32, times the scales."""
    case = in_bytes(draw(test_seed, MIXES["everything"]))
    wide = case.cache.float()
    k_width = 2 * 16
    scaled = torch.cat((wide[..., :k_width] * 0.37, wide[..., k_width:] * 1.7), -1)
    close(expect(case, k_scale=0.37, v_scale=1.7), expect(replace(case, cache=scaled)))


@DTYPES
@FORMS
def test_every_byte(form: str, dtype: torch.dtype) -> None:
    """All 256 as values of the only key: both signs, subnormals, ±448, and NaN, which stays NaN."""
    row = torch.cat((torch.zeros(16, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)))
    one = torch.tensor([1], dtype=torch.int32)
    found = paged_attention(
        torch.ones(1, 1, 16, dtype=dtype),
        row.view(FP8)[None, None],
        one[None] - 1,
        torch.tensor([0, 1], dtype=torch.int32),
        one,
        num_kv_heads=1,
        scale=1.0,
        max_query_len=1,
        max_seq_len=1,
        form=form,
    )
    torch.testing.assert_close(found[0, 0], row[16:].view(FP8).to(dtype), atol=0, rtol=0, equal_nan=True)
    assert found.isnan().sum() == 2


@DTYPES
@FORMS
@pytest.mark.parametrize("mix", ["one token", "decodes", "chunks", "drafts", "everything"])
def test_ragged_steps(mix: str, form: str, dtype: torch.dtype, test_seed: int) -> None:
    case = in_bytes(draw(test_seed, MIXES[mix], dtype=dtype))
    scales = {"k_scale": 0.37, "v_scale": 1.7}
    close(attend(case, form, num_splits=2, **scales), expect(case, **scales))


@FORMS
@pytest.mark.parametrize(
    ("heads", "dims", "block_size"),
    [((2, 2), (16, 16), 1), ((6, 2), (80, 80), 3), ((8, 1), (24, 16), 5), ((7, 1), (256, 256), 16)],
    ids=str,
)
def test_shapes_and_options(
    form: str, heads: tuple[int, int], dims: tuple[int, int], block_size: int, test_seed: int
) -> None:
    case = in_bytes(draw(test_seed, [(37, 1), (20, 3), (5, 5)], heads=heads, dims=dims, block_size=block_size))
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(test_seed))
    options = {"scale": dims[0] ** -0.5, "window": 19, "softcap": 1.5, "sinks": sinks, "k_scale": 1.3, "v_scale": 0.6}
    close(attend(case, form, **options), expect(case, **options))


@FORMS
def test_a_slot_too_many_is_caught(form: str, test_seed: int) -> None:
    """The NaN in unwritten slots is what makes these tests able to fail."""
    case = in_bytes(draw(test_seed, [(9, 1), (18, 3)]))
    case.seq_lens += 1
    assert attend(case, form).isnan().any(-1).any(-1).tolist()[0]


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        attend(in_bytes(draw(0, [(3, 1)])), "decode", k_scale=0.0)


def logits(runner: Runner, dtype: torch.dtype) -> list[Tensor]:
    """Some steps over a new cache of this type, NaN wherever nothing is written; the same tokens each time."""
    assert runner._model is not None
    kv = KVCache(replace(runner.kv_cache.group, dtype=dtype), 32, BLOCK)
    kv.blocks.copy_(torch.full(kv.blocks.shape, torch.nan))
    runner, found = Runner(runner._model, kv, 8), []
    for plan in plans():
        found.append(runner(plan).logits)
        runner.remember([0, 1, 2], torch.tensor([13, 21, 34]))
    return found


def compare(build: Callable[[], Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels over float8 against the CPU over KV that was rounded, and over KV as it is."""
    exact, store = logits(build(), torch.float32), ops.CPUAttention.store
    with monkeypatch.context() as patch:
        patch.setattr(ops.CPUAttention, "store", lambda own, layer, kv: store(own, layer, kv.to(FP8).to(kv.dtype)))
        rounded = logits(build(), torch.float32)
    monkeypatch.setattr(ops, "on_gpu", lambda device: True)
    for ours, near, far in zip(logits(build(), FP8), rounded, exact, strict=True):
        assert far.isfinite().all() and far.std() > 0.05, "a model that says nothing proves nothing"
        torch.testing.assert_close(ours, near, atol=2e-4, rtol=2e-4)
        gap = (ours.log_softmax(1) - far.log_softmax(1)).abs().mean() / far.std()
        assert 1e-3 < gap < 0.3


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_decoder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(lambda: make(MODELS[name]), monkeypatch)


def test_a_model_that_transformers_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(resolve(tiny_models.folder("gpt2")), dtype="float32")
    assert not loaded.native
    compare(lambda: Runner(loaded, KVCache(loaded.kv_group, 1, BLOCK), 8), monkeypatch)


def test_an_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option reaches the cache: a quarter of float32's bytes, four times the blocks in as much memory."""
    options = {"tokenizer": None, "dtype": "float32", "max_model_len": 64, "progress": False}
    monkeypatch.setattr(ops, "on_gpu", lambda device: True)
    found = []
    for dtype in (None, FP8):
        monkeypatch.setattr(kv_cache, "dtype_named", lambda name, device, dtype=dtype: dtype)
        name = "auto" if dtype is None else "fp8"
        with embedllm.LLM(
            tiny_models.folder("llama-tied"), kv_cache_dtype=name, kv_cache_memory=MEMORY, **options
        ) as llm:
            tokens = llm.generate([5, 6, 7, 8, 9], max_tokens=3, temperature=0.0, ignore_eos=True).tokens
            assert llm.memory().kv_cache == MEMORY and len(tokens) == 3
            found.append((llm.memory().kv_bytes_per_token, llm.stats().num_kv_blocks))
    assert found[0][0] == 4 * found[1][0] and 4 * found[0][1] == found[1][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
def test_blocks_are_copied(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, test_seed: int) -> None:
    """Byte by byte, all layers, by the kernel; one source twice."""
    monkeypatch.setattr(ops, "on_gpu", lambda device: True)
    cache = KVCache(KVGroup(layers=3, kv_heads=1, k_dim=3, v_dim=2, dtype=dtype), 9, 2)
    raw = cache.blocks.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, generator=torch.Generator().manual_seed(test_seed), dtype=torch.uint8))
    expected = raw.clone()
    for source, destination in ((8, 0), (2, 1), (2, 7)):
        expected[destination] = expected[source]
    cache.copy_blocks([(8, 0), (2, 1), (2, 7)])
    assert torch.equal(raw, expected)
    cache.copy_blocks([])
