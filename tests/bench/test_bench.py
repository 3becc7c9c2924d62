"""The bench measures what it says: the same work for everybody, figures that can be recomputed, JSON that is whole.

No time is asserted here.
"""

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import embedllm
from embedllm import testing
from embedllm.bench import gpu, gpu_attention, gpu_engine, gpu_kernels, overhead, waste, workloads
from embedllm.bench import run as bench_run
from embedllm.bench.apart import Apart, Recipe
from embedllm.bench.card import Roof, Setup, Sizes
from embedllm.bench.engines import Embedllm, Engine, Run
from embedllm.bench.figures import Figure, Goal, Sheet
from embedllm.bench.gpu_engine import Shape
from embedllm.bench.report import Comparison, Entry
from embedllm.bench.workloads import WORKLOADS, Job, Workload, workload
from embedllm.cli import main
from embedllm.errors import InvalidRequest
from embedllm.models.shapes import SHAPES
from tests.kernels.conftest import why_not_interpreted
from tests.rules.tree import ROOT


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny qwen2 without a tokenizer; wide weights, so that its tokens depend on the context."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("bench-model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2_304,
        initializer_range=0.4,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


# ---- workloads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_the_same_every_time(name: str) -> None:
    assert workload(name, 1_000) == workload(name, 1_000)
    assert all(0 <= token < 50 for job in workload(name, 50, 0.1).jobs for token in job.prompt)


def test_workloads_are_what_their_names_say() -> None:
    mixed = workload("mixed", 1_000)
    assert len(mixed.jobs) == 32
    assert all(16 <= len(job.prompt) <= 128 and 8 <= job.num_output <= 64 for job in mixed.jobs)
    assert len(workload("single", 1_000).jobs) == 1
    shared = workload("shared-prefix", 1_000)
    assert len(shared.jobs) == 64
    assert len({job.prompt[:512] for job in shared.jobs}) == 1 and len({job.prompt for job in shared.jobs}) == 64
    nano = workload("nano", 20_000)
    assert len(nano.jobs) == 256 and nano.temperature == 0.6
    assert all(100 <= len(job.prompt) <= 1_024 and 100 <= job.num_output <= 1_024 for job in nano.jobs)
    assert len(workload("nano", 20_000, 0.125).jobs) == 32
    chat = workload("sharegpt", 1_000)
    assert [(len(job.prompt), job.num_output) for job in chat.jobs] == workloads.chat_lengths(256)
    assert workload("sharegpt", 1_000, 0.25).longest <= 2_048


# ---- comparisons ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_engines_do_the_same_work(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "figures.json"
    line = ["bench", "mixed", "single", "-m", model, "--dtype", "float32", "--scale", "0.1", "--rounds", "2"]
    assert main([*line, "--against", "hf,hf-batch,hf-cb", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert {"date", "command", "settings", "machine", "versions", "results"} <= found.keys()
    assert [result["workload"] for result in found["results"]] == ["mixed", "single"]
    for result in found["results"]:
        assert [engine["engine"] for engine in result["engines"]] == ["embedllm", "hf", "hf-batch", "hf-cb"]
        assert all(len(engine["seconds"]) == 2 for engine in result["engines"])
        # Equal greedy tokens prove equal work; left padding may move a near tie of one request.
        assert [engine["same_tokens"] for engine in result["engines"][:2]] == [1.0, 1.0]
        assert min(engine["same_tokens"] for engine in result["engines"]) > 0.5
    table = capsys.readouterr().out
    assert "embedllm is" in table and "hf-cb" in table and "mixed: 3 requests" in table


def test_json_alone_goes_to_stdout(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "single", "-m", model, "--dtype", "float32", "--rounds", "1", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"][0]["output_tokens"] == 64
    assert "output tok/s" in captured.err


def test_a_peer_that_is_not_installed_is_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    line = ["bench", "single", "-m", model, "--dtype", "float32", "--rounds", "1", "--against", "llama.cpp"]
    assert main(line) == 0
    assert "llama.cpp skipped: the llama.cpp peer needs: pip install llama-cpp-python gguf" in capsys.readouterr().out


def test_an_engine_that_cannot_open_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 100, "model_type": "llama", "architectures": ["Nonsense"]}')
    assert main(["bench", "single", "-m", str(tmp_path), "--rounds", "1"]) == 1
    assert capsys.readouterr().err.startswith("embedllm bench: ")


def test_rounds_do_not_warm_each_other(model: str) -> None:
    """Only hits inside the workload count: a second round finds nothing of the first."""
    engine = Embedllm(model, "float32", 700)
    try:
        for _ in range(2):
            engine.run(workload("single", 128))
        assert engine.llm.stats().prefix_cache_hits == 0
        engine.run(workload("shared-prefix", 128, 0.5))
        assert engine.llm.stats().prefix_cache_hits > 0
    finally:
        engine.close()


def test_medians_and_ratios() -> None:
    work = Workload("two", (Job((1,), 2), Job((2,), 2)))
    ours = Entry("embedllm", "1", [Run(seconds, [[1, 2], [3, 4]], [0.1, 0.3]) for seconds in (1.0, 2.0, 9.0)])
    other = Entry("other", "1", [Run(seconds, [[1, 2], [3, 5]]) for seconds in (4.0, 4.0, 1.0)])
    found = Comparison(work, [ours, other], {"third": "no reason"})
    assert ours.tokens_per_second == 2.0 and other.tokens_per_second == 1.0
    assert found.ratio(other) == 2.0
    assert found.agreement(other) == 0.5
    assert (ours.first_token(0.5), other.first_token(0.5)) == (0.3, None)
    assert "third skipped: no reason" in found.table()
    assert json.loads(json.dumps(found.as_json()))["engines"][1]["embedllm_is_times"] == 2.0


def test_on_a_card_one_engine_ends_before_the_next_opens(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes what memory there is. On a CPU they are all open, to take turns."""
    happened: list[str] = []

    class Fake(Engine):
        version = "1"

        def __init__(self, name: str) -> None:
            self.name = name
            happened.append(f"{name} opens")

        def run(self, work: Workload) -> Run:
            return Run(1.0, [[0] * job.num_output for job in work.jobs])

        def close(self) -> None:
            happened.append(f"{self.name} ends")

    monkeypatch.setattr(bench_run, "_open", lambda model, scratch, names, *rest: ([Fake(name) for name in names], {}))
    args = argparse.Namespace(model=model, shape=None, device="cuda", dtype="float32", scale=0.1, rounds=2)
    found = bench_run.compare(args, ["mixed", "single"], ["hf"], lambda text: None)
    assert happened == ["embedllm opens", "embedllm ends", "hf opens", "hf ends"]
    assert [[entry.name for entry in one.entries] for one in found] == [["embedllm", "hf"]] * 2
    assert all(len(entry.runs) == 2 for one in found for entry in one.entries)
    happened.clear()
    args.device = "cpu"
    bench_run.compare(args, ["mixed"], ["hf"], lambda text: None)
    assert happened == ["embedllm opens", "hf opens", "embedllm ends", "hf ends"]


# ---- random models --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_random_model_is_the_same_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = testing.write_random_model(tmp_path, "smollm2-135m", dtype="float32")
    other, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    prompt = [5, 900, 17, 40_000]
    theirs = other.generate(
        torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    with embedllm.LLM(folder, tokenizer=None, num_kv_blocks=64) as llm:
        assert llm.generate(prompt, max_tokens=6, ignore_eos=True).tokens == theirs[0, 4:].tolist()


def test_an_unknown_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(embedllm.errors.ModelNotFound, match="no shape is called 'qwen'"):
        testing.write_random_model(tmp_path, "qwen")
    with pytest.raises(embedllm.errors.InvalidRequest, match="dtype='int8'"):
        testing.write_random_model(tmp_path, "smollm2-135m", dtype="int8")


# ---- a card ---------------------------------------------------------------------------------------------------

TINY = Sizes(
    hidden=32, inner=48, heads=4, kv_heads=2, head_dim=16, vocab=64, block=4, decode=((1, 12), (2, 9)), prefill=(10,),
    ragged=(5, 3), rows=(1,), residual_rows=(2,), tokens=(3,), sampled=(2, 300),
)  # fmt: skip
ON_CPU = Setup(device="cpu", dtype="float32", contexts=(16, 48), scale=1 / 256, sizes=TINY, peers=())
interpreted = pytest.mark.skipif(bool(why_not_interpreted()), reason="kernels are interpreted here")


@pytest.mark.slow
@interpreted
def test_everything_that_a_processor_can_do_is_measured(model: str) -> None:
    """The same code on this machine's CPU, tiny shapes and interpreted kernels; what a card takes is another matter."""
    said: list[str] = []
    setup = Setup(**vars(ON_CPU) | {"large": model, "small": model, "peers": ("hf", "hf-cb")})
    sheet = gpu.measure(setup, said.append)
    name = Path(model).name
    assert [figure.failure for figure in sheet.figures if figure.failure] == []
    assert [figure.name for figure in sheet.figures] == [
        "copy bandwidth", "matrix rate, float32",
        "decode attention, 1 × 12 tokens", "decode attention, 2 × 9 tokens", "decode attention, ragged, 2 sequences",
        "prefill attention, 10 tokens", "prefill attention, 10 tokens, torch", "prefill attention, ragged, 2 prompts",
        "product qkv [128, 32], 1 rows", "product o [32, 64], 1 rows", "product gate_up [96, 32], 1 rows",
        "product down [32, 48], 1 rows", "product head [64, 32], 1 rows", "residual sum in the product, 2 rows",
        "rms_norm, 3 tokens", "add_rms_norm, 3 tokens", "gated, 3 tokens", "rotary_store, 3 tokens",
        *(f"sampling 2 × 300, {kind}" for kind in gpu_kernels.SAMPLING),
        f"{name}: alone at 16 tokens", f"{name}: alone at 48 tokens", f"{name}: slope over its length",
        f"{name}: slowdown beside a spinning thread", f"{name}: decode 128 × (32 in, 2,048 out)",
        f"{name}: prefill 32 × 4,096", f"{name}: mixed", f"{name}: sharegpt", f"{name}: nano",
        "mixed: embedllm beside hf", "sharegpt: embedllm beside hf",
        "mixed: embedllm beside hf-cb", "sharegpt: embedllm beside hf-cb",
    ]  # fmt: skip
    signed = ("slope", "slowdown")  # by chance these may come out below zero on so small a model
    assert all(figure.value > 0 for figure in sheet.figures if not any(word in figure.name for word in signed))
    ours, beside = (
        sheet.value(f"{name}: mixed"),
        next(f for f in sheet.figures if f.name == "mixed: embedllm beside hf"),
    )
    theirs = float(beside.beside.partition(") ")[2].partition(" tok/s")[0].replace(",", ""))
    assert ours and beside.value == pytest.approx(ours / theirs, rel=0.01) and beside.goal == Goal(20)
    assert said[1:] == sheet.table().splitlines()[1:]
    assert "random weights" in said[0]


@pytest.mark.slow
@interpreted
def test_a_part_that_fails_leaves_the_others(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown shape; the peers, which would load its weights, fail with it."""
    few = Sizes(**vars(TINY) | {"decode": (), "prefill": (), "rows": (), "residual_rows": (), "tokens": ()})
    options = {"large": "no-such-shape", "small": model, "sizes": few, "peers": ("hf",)}
    monkeypatch.setattr(gpu, "measure", functools.partial(gpu.measure, Setup(**vars(ON_CPU) | options)))
    target = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--json", str(target)]) == 1
    found = json.loads(target.read_text())
    (result,) = found["results"]
    assert {"device", "driver", "torch", "triton", "transformers", "date", "weights"} <= result.keys()
    assert result["probe"] == "gpu" and result["weights"] == "random" and result["failed"] == 2
    lines = {line["name"]: line for line in result["figures"]}
    assert "no shape is called 'no-such-shape'" in lines["large shape"]["failure"]
    assert "config.json" in lines["hf"]["failure"]
    nano = lines[f"{Path(model).name}: nano"]
    assert nano["goal"] == {"limit": 15_000, "at_most": False, "met": nano["value"] >= 15_000} and nano["share"] > 0
    printed = capsys.readouterr().out
    assert "FAILED ModelNotFound" in printed and "2 lines failed" in printed


def test_a_process_that_dies_is_a_line() -> None:
    """An unknown part ends its process with an exception that nobody catches there."""
    (figure,) = gpu._elsewhere("no such part", ON_CPU, Roof(1.0, 1.0))
    assert figure.name == "no such part" and figure.failure == "RuntimeError: its process ended with exit code 1"


def test_a_figure_that_fails_leaves_the_others_of_its_part() -> None:
    def lines() -> Iterator[tuple[str, Any]]:
        yield "first", lambda: Figure("first", 1.0, "s")
        yield "second", lambda: 1 / 0
        yield "third", lambda: Figure("third", 3.0, "s")
        raise MemoryError("no more")

    found = list(gpu.figures("part", lines))
    assert [(figure.name, figure.value) for figure in found] == [
        ("first", 1.0), ("second", None), ("third", 3.0), ("part", None),
    ]  # fmt: skip
    assert found[1].failure == "ZeroDivisionError: division by zero" and found[3].failure == "MemoryError: no more"
    assert Sheet({}, found).num_failed == 2


def test_goals_are_judged() -> None:
    few, many = Goal(6.4, at_most=True), Goal(6_700)
    assert few.is_met(6.4) and few.is_met(6.0) and not few.is_met(6.41)
    assert many.is_met(6_700) and not many.is_met(6_699.9)
    assert "71.0% of its roofline; goal ≤ 6.4, met" in Figure("a", 6.3, "ms", 0.71, "its roofline", few).line()
    assert "goal ≥ 6,700, missed; 3 requests" in Figure("b", 5.0, "tok/s", goal=many, beside="3 requests").line()
    assert Figure("c", None, goal=many, failure="no card").is_met is None
    sheet = Sheet({"device": "X"}, [Figure("a", 6.3, goal=few), Figure("b", 5.0, goal=many), Figure("c", 1.0)])
    assert sheet.summary() == "  1 of 2 goals met"
    assert [line.get("goal", {}).get("met") for line in sheet.as_json()["figures"]] == [True, False, None]


def test_the_roofline_of_a_shape(tmp_path: Path) -> None:
    """The figures that its published shape gives by hand."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama-3.1-8b"]))
    shape = Shape.read(tmp_path, 2)
    per_layer = 4_096 * (4_096 + 2 * 1_024) + 4_096 * 4_096 + 3 * 4_096 * 14_336
    assert shape.step_bytes == 2 * (32 * per_layer + 128_256 * 4_096) and shape.kv_bytes == 131_072
    work = Workload("two", (Job((1,) * 100, 3), Job((1,) * 10, 1)))
    flops = sum(2 * 32 * per_layer * n + 2 * 32 * 4_096 * n**2 for n in (100, 10))
    # Two steps after the prompts', with 101 and 102 tokens of the first request in the cache.
    num_bytes = 2 * shape.step_bytes + (101 + 102) * 131_072
    assert shape.least_seconds(work, Roof(1e12, 1e15)) == pytest.approx(flops / 1e15 + num_bytes / 1e12)


def test_the_page_lists_every_kernel() -> None:
    """Names that are made without a card; the page says of each figure whether it was measured."""
    page = (ROOT / "docs" / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    for part in (gpu_attention.lines, gpu_kernels.lines):
        names = [name for name, _ in part(Setup(), Roof(1.0, 1.0))]
        assert len(names) > 10 and [name for name in names if f"| {name} |" not in page] == []


def test_idle_time_by_hand() -> None:
    prompt = [(0.0, 100.0), (200.0, 300.0)]  # a quarter of the spans, which is left out
    decoding = [(400.0, 410.0), (405.0, 408.0), (415.0, 425.0), (425.0, 440.0), (450.0, 455.0), (455.0, 460.0)]
    assert gpu_engine.idle_share([*decoding, *prompt]) == pytest.approx((5 + 10) / 60)
    assert gpu_engine.idle_share([*decoding, *prompt], 6.0) == pytest.approx(10 / 60)  # 410 to 415 is too short a gap
    with pytest.raises(RuntimeError, match="saw no kernel"):
        gpu_engine.idle_share([])


@interpreted
@pytest.mark.parametrize("options", ["window_size and enable_gqa", "is_causal"])
def test_attention_kernels_are_given_the_same_work(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with either form of varlen_attn's options: torch has the real one for CUDA alone."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any, starts: Any, gqa: bool) -> torch.Tensor:
        spans = [slice(*span) for span in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
        parts = [[part[span].transpose(0, 1) for part in (q, k, v)] for span in spans]
        out = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=gqa).transpose(0, 1) for part in parts]
        return torch.cat(out)

    def young(q: Any, k: Any, v: Any, a: Any, b: Any, m: int, n: int, *, window_size: Any, enable_gqa: bool) -> Any:
        assert window_size == (-1, 0) and m == n == 5
        return attend(q, k, v, a, enable_gqa)

    def old(q: Any, k: Any, v: Any, a: Any, b: Any, m: int, n: int, is_causal: bool = False) -> Any:
        assert is_causal
        return attend(q, k, v, a, False)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", old if options == "is_causal" else young)
    ragged = gpu_attention.Sequences.make(ON_CPU, (5, 3), whole=True, layers=1)
    torch.testing.assert_close(gpu_attention.varlen_peer(ragged)[1](), ragged.paged(0, True), atol=1e-5, rtol=1e-5)
    one = gpu_attention.Sequences.make(ON_CPU, (10,), whole=True, layers=1)
    theirs = gpu_attention.own_peer(one)[1]()
    torch.testing.assert_close(theirs[0].transpose(0, 1), one.paged(0, True), atol=1e-5, rtol=1e-5)
    last = gpu_attention.Sequences.make(ON_CPU, (5, 3), whole=False, layers=2)
    assert last.paged(1, False).shape == (2, 4, 16) and last.num_kv_bytes == 8 * 2 * 2 * 16 * 4
    assert ragged.num_flops == 4 * 4 * 16 * (15 + 6)


@interpreted
def test_both_residual_sums_are_the_same_sum() -> None:
    import torch

    x, weight, total, norm = torch.randn(2, 48), torch.randn(32, 48), torch.randn(2, 32), torch.rand(32)
    first, second = total.clone(), total.clone()
    by_product, by_norm = (
        gpu_kernels.by_product(x, weight, first, norm),
        gpu_kernels.by_norm(x, weight, second, norm),
    )
    torch.testing.assert_close(by_product, by_norm)
    torch.testing.assert_close(first, second)


def test_an_engine_that_takes_too_long_is_ended(model: str, tmp_path: Path) -> None:
    recipe = Recipe("embedllm", model, "", "float32", "cpu", 64, 1, str(tmp_path))
    with pytest.raises(TimeoutError, match=r"embedllm took over 0\.01 s"):
        Apart(recipe, limit=0.01)


def test_without_a_card_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="torch sees none"):
        gpu.measure()


# ---- probes ---------------------------------------------------------------------------------------------------


def test_overhead_measures_the_engine_and_not_the_model() -> None:
    found = overhead.measure(running=(1, 4), num_output=20)
    assert [(point.running, point.steps) for point in found.points] == [(1, 17), (4, 17)]
    assert all(0 < point.seconds < 0.1 for point in found.points)
    assert json.loads(json.dumps(found.as_json()))["probe"] == "overhead"
    assert "fitted" in found.table()


def test_the_line_goes_through_the_points() -> None:
    points = tuple(overhead.Point(n, 10, 100e-6 + 5e-6 * n) for n in (1, 8, 64))
    line = overhead.fit(points)
    assert line.step == pytest.approx(100e-6) and line.per_sequence == pytest.approx(5e-6)
    assert line.within_target
    assert not overhead.fit((overhead.Point(1, 10, 1e-3), overhead.Point(2, 10, 1e-3))).within_target


def test_chat_lengths_have_the_published_means() -> None:
    lengths = workloads.chat_lengths(20_000)
    prompts, outputs = zip(*lengths, strict=True)
    assert sum(prompts) / len(prompts) == pytest.approx(workloads.MEAN_PROMPT, rel=0.1)
    assert sum(outputs) / len(outputs) == pytest.approx(workloads.MEAN_OUTPUT, rel=0.1)
    assert min(prompts) >= 4 and max(outputs) <= 1_024


def test_replay_agrees_with_the_engine_at_every_step() -> None:
    """The replayed waste is the engine's own, asked between two steps."""
    with embedllm.LLM(testing.HashLM(eos_every=0), num_kv_blocks=2_048, block_size=4, max_num_seqs=16) as llm:
        with llm.trace() as trace:
            handles = [llm.submit([i] * (5 + 3 * i), max_tokens=400, n=1 + i % 2) for i in range(8)]
            own = set()
            while not any(handle.done for handle in handles):
                stats = llm.stats()
                if not stats.request_finished:
                    own.add((round(stats.kv_cache_usage * 2_048), round(stats.kv_cache_waste, 6)))
        steps = list(waste.replay(trace, 4))
        events = trace.counts()
    assert events["fork"] == 4 and events["share"]
    own.discard((0, 0.0))
    assert len(own) > 20
    # Samples are born after a step's tokens are counted, so a look between those two is not in the replay.
    assert len(own - {(step.used, round(step.waste, 6)) for step in steps}) <= 4
    assert all(0 <= step.waste < 1 for step in steps if step.used)


def test_replay_by_hand() -> None:
    events = [
        ("queue", 0, 6), ("admit", 0, 0, 0), ("allocate", 3), ("allocate", 4), ("step", 1, 1, 6), ("schedule", 0, 0, 6),
        ("commit", 0, 6, 1), ("queue", 1, 5), ("admit", 1, 1, 4), ("share", 3, 2), ("allocate", 5),
        ("step", 2, 2, 2), ("schedule", 0, 6, 1), ("schedule", 1, 4, 1),
        ("commit", 0, 7, 1), ("finish", 0, 1), ("free", 4), ("commit", 1, 5, 1), ("queue", 2, 1),
        ("step", 3, 1, 1), ("schedule", 1, 5, 1), ("finish", 1, 1), ("free", 5), ("idle", 3),
    ]  # fmt: skip
    steps = list(waste.replay(events, 4))
    assert [(s.running, s.used, s.tokens, s.unshared, s.waiting) for s in steps] == [
        (1, 2, 6, 2, False),
        (2, 3, 12, 4, False),
        (1, 2, 6, 2, True),
    ]
    assert [s.waste for s in steps] == [pytest.approx(2 / 8), pytest.approx(4 / 12), pytest.approx(2 / 8)]
    assert steps[1].saved == pytest.approx(1 / 4)


def test_contiguous_baselines_by_hand() -> None:
    row = waste.contiguous("oracle", [(3, 2)], 100)
    assert row.steps == 2
    assert row.waste == pytest.approx(((1 - 3 / 5) + (1 - 4 / 5)) / 2)
    assert waste.contiguous("pow2", [(3, 5)], 100).waste == pytest.approx(
        sum(1 - tokens / 11 for tokens in range(3, 8)) / 5
    )
    both = waste.contiguous("oracle", [(3, 2), (3, 2), (3, 2)], 12)  # two fit at once
    assert (both.steps, both.running) == (4, 2.0)


def test_waste_runs_the_real_engine() -> None:
    found = waste.measure(24)
    assert found.rows[0].waste < found.rows[1].waste < found.rows[3].waste
    assert 0 < found.saved < 1
    assert json.loads(json.dumps(found.as_json()))["requests"] == 24
    assert "memory saved" in found.table()
