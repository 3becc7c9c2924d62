"""A plan through a real tiny decoder: chunks, copies, order, isolation, and a model that is not ours."""

import dataclasses
import gc
import weakref
from array import array
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from embedllm.batch import Batch
from embedllm.errors import EngineClosed, EngineError, ModelFormatError
from embedllm.kv_cache import KVCache, KVGroup
from embedllm.layers import Linear
from embedllm.models.config import ModelConfig
from embedllm.models.decoder import Decoder
from embedllm.plan_types import Entry, Plan
from embedllm.runner import LOGIT_ROWS, Runner

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
MIXTURE = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
BLOCK = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(raw: dict[str, object] = TINY, seed: int = 0, **options: object) -> Decoder:
    config = ModelConfig.from_dict(raw)
    decoder = Decoder(config, max_model_len=256, **options)
    generator = torch.Generator().manual_seed(seed)
    for name, shape in decoder.expected().items():
        decoder.put(name, torch.randn(shape, generator=generator) * (0.3 if "norm" not in name else 1.0))
    decoder.finish()
    return decoder


def running(decoder: Decoder, num_blocks: int = 64) -> Runner:
    """A runner on a pool that is NaN wherever nothing was written."""
    kv = KVCache(decoder.kv_group, num_blocks, BLOCK)
    kv.blocks.fill_(torch.nan)
    return Runner(decoder, kv, 8)


def entry(tokens: list[int], blocks: list[int], start: int = 0, logits: int = 1, **options: object) -> Entry:
    return Entry(0, 0, 0, start, tokens, 0, logits, array("i", blocks), **options)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(decoder: Decoder, tokens: list[int]) -> Tensor:
    """Logits after every token, computed in one piece with nothing else in the pool."""
    runner = running(decoder)
    blocks = list(range(-(-len(tokens) // BLOCK)))
    return runner(Plan(0, [entry(tokens, blocks, logits=len(tokens))])).logits


@pytest.mark.parametrize("raw", [TINY, MIXTURE], ids=["dense", "mixture"])
def test_chunks_batches_and_block_orders_do_not_change_the_answer(raw: dict[str, object]) -> None:
    decoder = make(raw)
    texts = {n: prompt(n, 10 + 3 * n) for n in range(5)}
    expected = {n: alone(decoder, tokens) for n, tokens in texts.items()}
    assert len({int(row.argmax()) for rows in expected.values() for row in rows}) > 10, "the model says one thing only"
    runner = running(decoder)
    pool = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    tables = {n: [pool.pop() for _ in range(8)] for n in texts}
    done = dict.fromkeys(texts, 0)
    step = 0
    while any(done[n] < len(texts[n]) for n in texts):
        entries, wanted = [], []
        for n, tokens in texts.items():
            size = (1, 7, BLOCK, 3, 100)[(n + step) % 5] if step % 2 else 1
            chunk = tokens[done[n] : done[n] + size]
            if chunk:
                entries.append(entry(chunk, tables[n], done[n], logits=len(chunk)))
                wanted.append(expected[n][done[n] : done[n] + len(chunk)])
                done[n] += len(chunk)
        out = runner(Plan(step, entries)).logits
        torch.testing.assert_close(out, torch.cat(wanted), atol=1e-4, rtol=1e-4)
        step += 1


def test_the_context_matters() -> None:
    """What makes the test above able to fail: another past, another block, another position change the logits."""
    decoder = make()
    tokens = prompt(1, 12)
    logits = alone(decoder, tokens)[-1]
    assert not torch.allclose(alone(decoder, [tokens[0] ^ 1, *tokens[1:]])[-1], logits, atol=1e-2)
    runner = running(decoder)
    runner(Plan(0, [entry(tokens[:11], [0, 1, 2], logits=0)]))
    for blocks, start in (([0, 2, 1], 11), ([0, 1, 2], 10)):
        out = runner(Plan(1, [entry([tokens[11]], blocks, start)])).logits[0]
        assert not torch.allclose(out, logits, atol=1e-2)


def test_copies_come_before_the_plans_own_writes() -> None:
    """A fork continues on a copy of the tail block, in the same plan in which its parent writes to the original."""
    decoder = make()
    shared, one, other = prompt(1, 6), [5], [9]
    runner = running(decoder)
    runner(Plan(0, [entry(shared, [0, 1], logits=0)]))
    plan = Plan(1, [entry(one, [0, 1], 6), entry(other, [0, 7], 6)], [(1, 7)])
    out = runner(plan).logits
    for row, tail in zip(out, (one, other), strict=True):
        torch.testing.assert_close(row, alone(decoder, shared + tail)[-1], atol=1e-4, rtol=1e-4)


def test_logits_come_in_the_plans_order_and_only_where_wanted() -> None:
    decoder = make()
    a, b, c = prompt(1, 9), prompt(2, 1), prompt(3, 5)
    plan = Plan(0, [entry(a, [0, 1, 2], logits=0), entry(b, [3]), entry(c, [4, 5], logits=3)])
    out = running(decoder)(plan)
    assert out.hidden is None
    assert out.logits.dtype == torch.float32
    expected = torch.cat((alone(decoder, b)[-1:], alone(decoder, c)[-3:]))
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
    out.logits.add_(1.0)  # the sampler works in place


def test_prompt_logprobs_get_hidden_states_and_logits_in_slices() -> None:
    decoder = make()
    long, short = prompt(1, 2 * LOGIT_ROWS + 3), prompt(2, 4)
    runner = running(decoder)
    plan = Plan(0, [entry(long, list(range(9)), wants_hidden=True), entry(short, [20])])
    hidden = runner(plan).hidden
    assert hidden is not None
    assert hidden.shape == (len(long), 32)
    slices = list(runner.logits(hidden))
    assert [len(rows) for rows in slices] == [LOGIT_ROWS, LOGIT_ROWS, 3]
    torch.testing.assert_close(torch.cat(slices), alone(decoder, long), atol=1e-4, rtol=1e-4)


def test_a_step_without_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = running(make())
    runs: list[int] = []
    head = runner._model._head.linear
    plain = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, *a, **k: (runs.append(self is head), plain(self, *a, **k))[1])
    out = runner(Plan(0, [entry([1, 2, 3], [0], logits=0)]))
    assert out.logits.shape == (0, 97)
    assert not any(runs), "the head ran for nothing"
    assert runner(Plan(1, [])).logits.shape == (0, 97)


def test_a_spoilt_sequence_spoils_only_itself() -> None:
    decoder = make(MIXTURE)
    texts = [prompt(n, 9) for n in range(4)]
    runner = running(decoder)
    tables = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(4)]
    runner(Plan(0, [entry(t[:8], b, logits=0) for t, b in zip(texts, tables, strict=True)]))
    runner.kv_cache.blocks[tables[2][0]].fill_(torch.nan)
    out = runner(Plan(1, [entry(t[8:], b, 8) for t, b in zip(texts, tables, strict=True)])).logits
    assert out[2].isnan().all()
    for n in (0, 1, 3):
        torch.testing.assert_close(out[n], alone(decoder, texts[n])[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw", [TINY, MIXTURE], ids=["dense", "mixture"])
def test_half_precision_stays_near_float32(raw: dict[str, object], dtype: torch.dtype) -> None:
    """Tolerance: 6 % of the logits' scale, 1 % on average; a wrong block or position moves them by tens of percent."""
    tokens = prompt(1, 30)
    exact, rounded = alone(make(raw), tokens), alone(make(raw, dtype=dtype), tokens)
    assert float((exact - rounded).abs().max()) < 0.06 * float(exact.abs().max())
    assert float((exact - rounded).abs().mean()) < 0.01 * float(exact.abs().max())


def test_packed_and_plain_weights_agree() -> None:
    tokens = prompt(1, 30)
    plain = make(pack=False)
    assert plain.packing == "packing is switched off"
    torch.testing.assert_close(alone(make(), tokens), alone(plain, tokens), atol=1e-4, rtol=1e-4)


def test_two_models_side_by_side() -> None:
    """Each step of one between two steps of the other, different sizes and dtypes, nothing shared."""
    small = make()
    other = make(MIXTURE | {"hidden_size": 64}, seed=5, dtype=torch.bfloat16)
    tokens = prompt(1, 12)
    expected = [alone(small, tokens)[-1], alone(other, tokens)[-1]]
    runners = [running(small), running(other)]
    for start in range(12):
        for runner in runners:
            last = runner(Plan(start, [entry(tokens[start : start + 1], [0, 1, 2], start)])).logits[0]
            if start == 11:
                torch.testing.assert_close(last, expected.pop(0), atol=0.3, rtol=0.1)


def test_it_leaves_torch_as_it_was() -> None:
    runner = running(make())
    runner(Plan(0, [entry([1], [0])]))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_between_layers_can_end_a_step() -> None:
    class Stopped(Exception):
        pass

    calls = []

    def look() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Stopped

    runner = running(make())
    with pytest.raises(Stopped):
        runner(Plan(0, [entry([1, 2], [0])]), look)
    calls.clear()
    calls += [1, 1]
    assert runner(Plan(0, [entry([1, 2], [0])]), look).logits.isfinite().all()
    assert len(calls) == 2 + 3


def test_close_gives_everything_back() -> None:
    decoder = make()
    runner = running(decoder)
    seen = weakref.ref(decoder), weakref.ref(runner.kv_cache.blocks)
    runner.close()
    runner.close()
    del decoder
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    with pytest.raises(EngineClosed):
        runner(Plan(0, [entry([1], [0])]))


class Summing:
    """A model that is none of ours: its logits are the sum of the ids so far, kept in the cache it is given."""

    kv_group = KVGroup(layers=1, kv_heads=1, k_dim=1, v_dim=1, dtype=torch.float32)

    def forward(self, batch: Batch, kv: KVCache, between_layers: object = None) -> Tensor:
        rows = batch.ids.float()[:, None].expand(-1, 2)
        kv.rows(0).index_copy_(0, kv.row_index(batch.slots), rows)
        sums = []
        for i, table in enumerate(batch.tables.long()):
            values = kv.layer(0)[table, :, 0].flatten()[: batch.lengths[i]].cumsum(0)
            sums.append(values[batch.lengths[i] - (batch.starts[i + 1] - batch.starts[i]) :])
        return torch.cat(sums)[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_any_model_with_forward_and_logits_runs() -> None:
    model = Summing()
    kv = KVCache(model.kv_group, 8, BLOCK)
    kv.blocks.fill_(torch.nan)
    runner = Runner(model, kv, 8)
    runner(Plan(0, [entry([1, 2, 3], [6], logits=0)]))
    out = runner(Plan(1, [entry([4, 5], [6, 1], 3, logits=2), entry([7], [2])])).logits
    assert out.flatten().tolist() == [10, 15, 7]


def test_weights_must_balance() -> None:
    config = ModelConfig.from_dict(TINY)
    decoder = Decoder(config)
    with pytest.raises(ModelFormatError, match=r"'layers.9.o.weight' is none of Qwen3ForCausalLM's"):
        decoder.put("layers.9.o.weight", torch.zeros(1))
    with pytest.raises(ModelFormatError, match=r"'norm.weight' has shape \[3\], expected \[32\]"):
        decoder.put("norm.weight", torch.zeros(3))
    decoder.put("norm.weight", torch.zeros(32))
    with pytest.raises(ModelFormatError, match=r"'norm.weight' was given twice"):
        decoder.put("norm.weight", torch.zeros(32))
    for name, shape in decoder.expected().items():
        if name not in ("norm.weight", "layers.1.q_norm.weight", "head.weight"):
            decoder.put(name, torch.zeros(shape))
    with pytest.raises(ModelFormatError, match=r"lacks head.weight, layers.1.q_norm.weight"):
        decoder.finish()
    with pytest.raises(EngineError, match="before finish"):
        decoder.logits(torch.zeros(1, 32))


def test_a_tied_head_is_the_embedding() -> None:
    raw = TINY | {"tie_word_embeddings": True}
    decoder = make(raw)
    assert "head.weight" not in decoder.expected()
    hidden = torch.randn(3, 32)
    embed = decoder._embed
    assert embed is not None
    torch.testing.assert_close(decoder.logits(hidden), hidden @ embed.T, atol=1e-4, rtol=1e-4)


def test_kv_group_of_a_config() -> None:
    group = make().kv_group
    assert (group.layers, group.kv_heads, group.k_dim, group.v_dim, group.window) == (3, 2, 8, 8, None)
    config = ModelConfig.from_dict(TINY)
    layers = tuple(dataclasses.replace(layer, window=7 + i) for i, layer in enumerate(config.layers))
    assert Decoder(dataclasses.replace(config, layers=layers)).kv_group.window == 9
