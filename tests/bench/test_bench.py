"""The bench measures what it says: the same work for everybody, figures that can be recomputed, JSON that is whole.

No time is asserted here.
"""

import json
from pathlib import Path

import pytest

import embedllm
from embedllm import testing
from embedllm.bench import gpu, overhead, waste
from embedllm.bench.engines import Embedllm, Run
from embedllm.bench.report import Comparison, Entry
from embedllm.bench.workloads import WORKLOADS, Job, Workload, workload
from embedllm.cli import main
from embedllm.errors import InvalidRequest


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


# ---- probes ---------------------------------------------------------------------------------------------------


def test_the_card_is_measured_beside_itself(model: str) -> None:
    """The same code on this machine's CPU and a tiny model; what it takes of a card is another matter."""
    card = gpu.measure("cpu", large=model, small=model, contexts=(16, 48), scale=1 / 256, dtype="float32")
    assert all(figure.value > 0 for figure in card.figures if "slope" not in figure.name)
    names = [figure.name for figure in card.figures]
    assert names[0] == "copy bandwidth" and len(names) == 8
    assert json.loads(json.dumps(card.as_json()))["probe"] == "gpu"
    assert "streaming weights and KV" in card.table()


def test_without_a_card_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="torch sees none"):
        gpu.measure()


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
    lengths = waste.chat_lengths(20_000)
    prompts, outputs = zip(*lengths, strict=True)
    assert sum(prompts) / len(prompts) == pytest.approx(waste.MEAN_PROMPT, rel=0.1)
    assert sum(outputs) / len(outputs) == pytest.approx(waste.MEAN_OUTPUT, rel=0.1)
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
