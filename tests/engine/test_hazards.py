"""The list of known hazards has an answer in every row; and the tests of those that no other file answers."""

import ast
import contextlib
import decimal
import gc
import itertools
import json
import math
import os
import random
import re
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import embedllm
from embedllm import SamplingParams
from embedllm.errors import EmbedLLMError, EngineDead, InvalidRequest, ModelFormatError, RequestFailed, UnknownOption
from embedllm.testing import ByteTokenizer, HashLM, ScriptedModel
from tests.engine.faultlab import Lab
from tests.engine.hooked import Hooked, assert_idle, engine_of, opened, prompt_of, right
from tests.engine.memory_cycles import write_llama
from tests.rules.tree import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CASES = tomllib.loads((ROOT / "tests/engine/cases.toml").read_text(encoding="utf-8"))["case"]
WANTED = {  # every hazard that was collected, by chapter
    "S": [*range(1, 12), *range(20, 34), *range(40, 50), *range(60, 71), *range(80, 92)],
    "B": [*range(1, 5), *range(10, 19), *range(20, 26), *range(30, 37), *range(40, 46), *range(50, 57)],
}


# ---- the list ---------------------------------------------------------------------------------------------------


def test_functions(path: Path) -> set[str]:
    """Names of the tests in a file; read, not imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


test_functions.__test__ = False  # type: ignore[attr-defined]


def test_every_hazard_has_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    ids = [case["id"] for case in CASES]
    assert ids == [f"{chapter}-{number:02}" for chapter, numbers in WANTED.items() for number in numbers]
    for case in CASES:
        assert set(case) <= {"id", "hazard", "reference", "tests", "not_here", "later"}, case["id"]
        assert case["hazard"] and (case.get("tests") or case.get("not_here") or case.get("later")), case["id"]
        assert re.fullmatch(r"CVE-\d{4}-\d{4,}", case.get("reference", "CVE-2000-0000")), case["id"]
        assert not ("not_here" in case and "later" in case), case["id"]
    found: dict[str, set[str]] = {}
    missing = []
    for name in sorted({name for case in CASES for name in case.get("tests", ())}):
        file, _, function = name.partition("::")
        if file not in found:
            found[file] = test_functions(ROOT / file) if (ROOT / file).exists() else set()
        if function not in found[file]:
            missing.append(name)
    assert not missing
    tested = sum("tests" in case for case in CASES)
    not_here = sum("not_here" in case and "tests" not in case for case in CASES)
    later = sum("later" in case and "tests" not in case for case in CASES)
    with capsys.disabled():
        print(
            f"\n{len(CASES)} hazards: {tested} tested, {not_here} that cannot occur, {later} that come with later work"
        )


# ---- numbers ----------------------------------------------------------------------------------------------------


class Gap(ByteTokenizer):
    """Knows ids the model has no logits for."""

    vocab_size = 300


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize("bad", [-1, 97, 2**31 - 1, 2**31, 2**63, 2**64, "191222", "abc", 1.0, True, None], ids=repr)
def test_ids_outside_the_vocabulary(field: str, bad: Any) -> None:
    model = Hooked()
    with opened(model) as llm:
        value: Any = {bad: -100.0} if field == "logit_bias" else [bad]
        with pytest.raises(InvalidRequest, match=field) as refused:
            llm.generate(prompt_of(1), min_tokens=1, **{field: value})
        if isinstance(bad, int) and not isinstance(bad, bool):
            assert str(bad) in str(refused.value)
        assert_idle(llm)
        right(llm, model)


def test_ids_between_the_tokenizer_and_the_logits() -> None:
    """The tokenizer knows 300 ids and the logits are 97 wide: 97 decides."""
    model = Hooked()
    with opened(model, tokenizer=Gap()) as llm:
        for field in ("allowed_token_ids", "stop_token_ids"):
            with pytest.raises(InvalidRequest, match="ids end at 96"):
                llm.generate(prompt_of(1), **{field: [3, 100]})
        with pytest.raises(InvalidRequest, match="empty"):
            llm.generate(prompt_of(1), allowed_token_ids=[])
        assert set(llm.generate(prompt_of(1), allowed_token_ids=[3, 3, 96], max_tokens=5).tokens) <= {3, 96}
        with pytest.raises(InvalidRequest, match="out of range"):
            llm.generate("é")


def test_bad_words_without_a_logit() -> None:
    model = Hooked()
    with opened(model, tokenizer=Gap()) as llm:
        for words in (["é"], [" "], ["  "], ["\x00"], ["aé"], ["x" * 1_000]):
            assert len(llm.generate(prompt_of(1), bad_words=words, max_tokens=5).tokens) == 5
        with pytest.raises(InvalidRequest, match="bad_words"):
            llm.generate(prompt_of(1), bad_words=[""])


@pytest.mark.parametrize(
    "ids",
    [[97], [-1], [2**31], [2**63], [2**64], [True], [1.0], ["1"], [None], [np.int64(1)], [torch.tensor(1)], [[1]]],
    ids=repr,
)
def test_prompt_ids(ids: Any) -> None:
    model = Hooked()
    with opened(model) as llm:
        with pytest.raises(InvalidRequest):
            llm.submit([1, *ids])
        assert_idle(llm)
        right(llm, model)


VALUES: list[Any] = [
    *(None, True, "1", "", -1, 0, 1, 2, 0.5, 0.01, -0.0, 1e-45, 1e-10, 1e308, math.inf, -math.inf, math.nan),
    *(2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63), 10**6, 33, 129),
    *(decimal.Decimal("0.5"), np.float32(0.5), np.int64(1), torch.tensor(1.0), [], [1], {}, {"a": 1}, b"x", 1j),
]
NUMBERS = [
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "priority", "deadline"),
]


def test_every_number_in_every_field() -> None:
    """A value is refused in the caller, naming the field, or the request runs to its end; nothing in between."""
    model, ran = Hooked(eos_every=20), Counter[str]()
    with opened(model, max_model_len=64) as llm:
        bystander = llm.submit(prompt_of(9), max_tokens=40)
        for field, value in itertools.product(NUMBERS, VALUES):
            limits: dict[str, Any] = {} if field == "max_tokens" else {"max_tokens": 3}
            try:
                completion = llm.generate(prompt_of(1), **(limits | {field: value}))
            except InvalidRequest as error:
                named = field in str(error) or "fit" in str(error) or "exceed" in str(error)
                assert named, f"{field}={value!r}: {error}"
                ran[f"{field} refused"] += 1
            except embedllm.errors.DeadlineExceeded:
                assert field == "deadline" and value < 1
            except RequestFailed:
                assert (field, value) == ("repetition_penalty", 1e-45)  # it makes logits infinite, its own only
            else:
                assert all(0 <= token < 97 for output in completion.outputs for token in output.tokens)
                ran[field] += 1
        assert bystander.result(5).tokens == model.expected(prompt_of(9), 40)
        assert llm.stats().num_step_faults == 0
        right(llm, model)
    assert all(ran[field] and ran[f"{field} refused"] for field in NUMBERS), ran  # each was taken and refused
    for field, value in (
        ("n", 10**6),
        ("logprobs", 10**6),
        ("prompt_logprobs", 33),
        ("max_tokens", 0),
        ("top_k", 0.01),
    ):
        with pytest.raises(InvalidRequest, match=field):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    "option",
    ["best_of", "use_beam_search", "guided_json", "chat_template", "add_generation_prompt", "prompt_embeds", "images",
     "echo"],
)  # fmt: skip
def test_options_that_are_not_offered(option: str) -> None:
    with opened() as llm:
        for call in (llm.generate, llm.submit, llm.stream):
            with pytest.raises(UnknownOption, match=option):
                call(prompt_of(1), **{option: 10**6})


@pytest.mark.parametrize("value", [10**6, "x", [], {"messages": []}, {"nosuch": 1}, {"tools": None}])
def test_template_options_cannot_be_anything(value: Any) -> None:
    model = ScriptedModel(["a"])
    with embedllm.LLM(model, tokenizer=model.tokenizer) as llm:
        with pytest.raises(InvalidRequest):
            llm.chat([{"role": "user", "content": "x"}], chat_template_kwargs=value)
        with pytest.raises(InvalidRequest, match="chat messages"):
            llm.generate("x", chat_template_kwargs=value)


def test_one_token_with_everything_asked() -> None:
    model = Hooked()
    with opened(model) as llm:
        completion = llm.generate(
            prompt_of(1, 1), max_tokens=1, min_tokens=1, logprobs=32, prompt_logprobs=32, n=2, stop_token_ids=[3],
            logit_bias={5: -math.inf}, repetition_penalty=1.5, deadline=60.0, priority=-5, cache_salt="x",
        )  # fmt: skip
        assert len(completion.tokens) == 1 and completion.prompt_logprobs == [None]
        for output in completion.outputs:
            assert output.logprobs is not None and all(math.isfinite(p.logprob) for p in output.logprobs[0])


def test_a_request_that_cannot_be_taken_is_not_half_taken() -> None:
    """Whatever fails while it is registered, nothing of it stays."""
    lab = Lab()
    calls = itertools.count()

    class Ids:
        """Fails for the second of three samples."""

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> int:
            number = next(calls)
            if number == 1:
                raise OverflowError("too large for its field")
            return number

    def fail(*args: Any) -> None:
        raise OverflowError("too large for its field")

    for holder, name, broken in ((lab.engine, "_ids", Ids()), (lab.engine._deadlines, "add", fail)):
        original = getattr(holder, name)
        setattr(holder, name, broken)
        told = lab.submit(prompt_of(1), 4, n=3, deadline=60.0)
        setattr(holder, name, original)
        lab.run()
        assert told.ended is not None and isinstance(told.ended.error, OverflowError)
        assert not lab.engine._live and not lab.engine._samples and not lab.engine.scheduler.sequences
    lab.told.clear()
    lab.check_alive()


def test_an_engine_that_finds_nothing_to_run_says_so() -> None:
    """Work, and no plan: after three steps everything is recomputed, and if that does not help, everybody is told."""
    lab = Lab()
    told = lab.submit(prompt_of(1), 4)
    lab.step()
    plan = lab.engine.scheduler.plan
    lab.engine.scheduler.plan = lambda: None  # type: ignore[method-assign]
    lab.run()
    assert lab.error_of(told) is None and lab.engine.metrics.num_step_faults == 1 and plan is not None
    lab.check()

    stuck = Lab()
    told = stuck.submit(prompt_of(1), 4)
    stuck.engine.scheduler.plan = lambda: None  # type: ignore[method-assign]
    stuck.engine.scheduler.successor = lambda limits: stuck.engine.scheduler  # type: ignore[method-assign]
    stuck.run(40)
    assert isinstance(stuck.error_of(told), EngineDead)
    assert "none can run" in str(stuck.dead.__cause__ if stuck.dead else "")


def test_salts_share_nothing() -> None:
    model = Hooked()
    with opened(model) as llm:
        prompt = prompt_of(1, 30)
        llm.generate(prompt, max_tokens=2, cache_salt="a")
        for salt, cached in (("b", 0), (None, 0), ("", 0), ("a", 28), ("A", 0), ("a\0", 0)):
            completion = llm.generate(prompt, max_tokens=2, cache_salt=salt)
            assert completion.usage.cached_tokens == cached, salt
            assert completion.tokens == model.expected(prompt, 2)


def test_ids_are_never_used_again() -> None:
    with opened() as llm:
        assert llm._core is not None
        its = llm._core.worker
        ids = [its.new_id() for _ in range(100)]
        assert len(set(ids)) == 100
        other = embedllm.LLM(engine_of(llm)._run.model, num_kv_blocks=512, block_size=4, max_batch_tokens=64)  # type: ignore[attr-defined]
        assert other._core is llm._core
        kept = [one.submit(prompt_of(1), max_tokens=2) for one in (llm, other) for _ in range(3)]
        assert len({generation._channel.request_id for generation in kept}) == 6
        assert all(generation.result(5).tokens for generation in kept)
        other.close()


# ---- files ------------------------------------------------------------------------------------------------------


def header(length: int | None, text: bytes) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> bytes:
    return json.dumps({"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HOSTILE = {
    "empty file": b"",
    "no header": b"\x01",
    "length 0": header(0, b""),
    "length 2**64-1": header(2**64 - 1, b"{}"),
    "length 2**63": header(2**63, b"{}"),
    "length past the end": header(1_000, b"{}"),
    "not JSON": header(None, b"not json"),
    "an array": header(None, b"[]"),
    "deep": header(None, b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "not UTF-8": header(None, b'{"\xff": 1}'),
    "unknown type": header(None, entry(dtype="F99")) + bytes(16),
    "negative offset": header(None, entry(offsets=(-16, 0))) + bytes(16),
    "reversed": header(None, entry(offsets=(16, 0))) + bytes(16),
    "past the end": header(None, entry(offsets=(0, 1_600))) + bytes(16),
    "bytes are not shape times type": header(None, entry(shape=(5,))) + bytes(16),
    "product overflows": header(None, entry(shape=(2**40, 2**40))) + bytes(16),
    "negative shape": header(None, entry(shape=(-4,))) + bytes(16),
    "shape is no list": header(None, entry(shape="4")) + bytes(16),
    "a gap": header(None, entry(offsets=(16, 32))) + bytes(32),
    "trailing bytes": header(None, entry()) + bytes(160),
    "duplicate keys": header(None, entry()[:-1] + b"," + entry()[1:]) + bytes(16),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_headers(name: str, tmp_path: Path) -> None:
    """Refused with the file's name, and nothing is left: no thread, no memory sized by the lie."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder)
    (folder / "model.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(EmbedLLMError) as refused:
        embedllm.LLM(folder)
    assert isinstance(refused.value, ModelFormatError), repr(refused.value)
    assert "model.safetensors" in str(refused.value) or "weight" in str(refused.value)


def write_config(folder: Path) -> None:
    from tests.engine.memory_cycles import LLAMA

    (folder / "config.json").write_text(json.dumps(LLAMA))


def test_a_good_file_of_the_same_config_loads(tmp_path: Path) -> None:
    """So that what was refused above was refused for its own sake."""
    with embedllm.LLM(write_llama(tmp_path / "model"), num_kv_blocks=16, max_model_len=64) as llm:
        assert len(llm.generate([1, 2], max_tokens=3, ignore_eos=True).tokens) == 3


def test_floors_of_dependencies_that_had_holes() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    floors = dict(re.findall(r"([a-z0-9-]+)>=([0-9.]+)", " ".join(project["dependencies"])))
    for name, least in {"jinja2": (3, 1, 6), "torch": (2, 10), "transformers": (5,)}.items():
        assert tuple(map(int, floors[name].split("."))) >= least, name


# ---- everything at once -----------------------------------------------------------------------------------------


def random_request(rng: random.Random) -> tuple[Any, dict[str, Any]]:
    """A prompt and options, of which about one in eight is nonsense."""
    prompt: Any = [rng.randrange(97) for _ in range(rng.choice((1, 2, 3, 4, 5, 8, 17, 40)))]
    options: dict[str, Any] = {"max_tokens": rng.choice((1, 2, 5, 9, 30, None)), "n": rng.choice((1, 1, 1, 2, 5))}
    extras: list[dict[str, Any]] = [
        {"temperature": rng.choice((0.0, 0.5, 100.0))},
        {"top_k": rng.choice((-1, 1, 5, 97))},
        {"top_p": rng.uniform(0.01, 1)},
        {"min_p": rng.random()},
        {"repetition_penalty": rng.choice((0.5, 1.0, 3.0))},
        {"presence_penalty": rng.uniform(-2, 2)},
        {"logprobs": rng.choice((0, 3, 32))},
        {"prompt_logprobs": rng.choice((0, 2))},
        {"logit_bias": {rng.randrange(97): rng.uniform(-100, 100) for _ in range(3)}},
        {"allowed_token_ids": [rng.randrange(97) for _ in range(3)]},
        {"stop_token_ids": [rng.randrange(97) for _ in range(4)]},
        {"seed": rng.randrange(2**40)},
        {"cache_salt": rng.choice(("a", "b"))},
        {"priority": rng.randrange(-2, 3)},
        {"deadline": rng.choice((0.001, 0.01, 60.0))},
        {"ignore_eos": True},
        {"logits_processor": rng.choice((lambda p, o, x: x, lambda p, o, x: x * math.nan, lambda *a: 1 / 0))},
        {"allowed_token_ids": [96], "min_tokens": 1},
        {"logit_bias": dict.fromkeys(range(96), -math.inf), "min_tokens": 1, "max_tokens": 3},
    ]
    for extra in rng.sample(extras, rng.randrange(4)):
        options |= extra
    if rng.random() < 0.12:
        options |= rng.choice(
            (
                {"max_tokens": 10**6},
                {"n": 0},
                {"top_p": 0},
                {"stop": "x"},
                {"seed": -1},
                {"nonsense": 1},
                {"top_k": "x"},
            )
        )
    if rng.random() < 0.05:
        prompt = rng.choice(([], [97], [-1], "text", None, [1.5], [[]]))
    return prompt, options


def storm(llm: embedllm.LLM, num_requests: int, rng: random.Random) -> Counter[str]:
    """Requests of every kind, of which a third are cancelled or dropped; how each of them ended."""
    ends: Counter[str] = Counter()
    open_ones: list[embedllm.Generation] = []
    for number in range(num_requests):
        prompt, options = random_request(rng)
        try:
            generation = (llm.submit if rng.random() < 0.5 else llm.stream)(prompt, **options)
        except InvalidRequest:
            ends["refused"] += 1
            continue
        fate = rng.random()
        if fate < 0.1:
            ends["dropped"] += 1
            continue
        if fate < 0.2:
            generation.cancel()
        elif fate < 0.3:
            with contextlib.suppress(EmbedLLMError, StopIteration):
                next(iter(generation))
        open_ones.append(generation)
        del generation
        while len(open_ones) > 40 or (number == num_requests - 1 and open_ones):
            one = open_ones.pop(rng.randrange(len(open_ones)))
            try:
                completion = one.result(60)
                assert all(0 <= token < 97 for output in completion.outputs for token in output.tokens)
                ends["finished"] += 1
            except EmbedLLMError as error:
                ends[type(error).__name__] += 1
            del one
    return ends


def check_nothing_is_left(llm: embedllm.LLM) -> None:
    gc.collect()
    assert_idle(llm)
    engine = engine_of(llm)
    assert not engine.scheduler.sequences and not engine._output.updates and not engine._output.ended
    assert len(engine._deadlines) <= 64
    assert not engine._readout._rows and not any(engine._readout._sampler._rows) and not engine.cancel_asked


@pytest.mark.slow
def test_a_storm_of_all_kinds_of_requests(test_seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = Hooked(eos_every=20)
    count = int(os.environ.get("EMBEDLLM_STORM", "1500"))
    with opened(model, num_kv_blocks=96, max_model_len=80, max_num_seqs=16) as llm:
        ends = storm(llm, count, random.Random(test_seed))
        assert llm.stats().num_step_faults == 0
        check_nothing_is_left(llm)
        right(llm, model)
    assert {"refused", "dropped", "finished", "RequestFailed", "RequestCancelled", "DeadlineExceeded"} <= set(ends)
    with capsys.disabled():
        print(f"\nstorm of {count} requests, 0 engine deaths: {dict(ends)}")


def resident() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's accounts")
def test_memory_stays_flat_over_many_requests(capsys: pytest.CaptureFixture[str]) -> None:
    """What the engine keeps per request that has ended, by tracemalloc: nothing."""
    import tracemalloc

    count = int(os.environ.get("EMBEDLLM_MANY", "3000"))
    model = HashLM(eos_every=0)
    with embedllm.LLM(model, num_kv_blocks=64, block_size=4) as llm:

        def run(number: int) -> None:
            for start in range(0, number, 100):
                llm.generate([[(start + i) % 90, i % 7] for i in range(100)], max_tokens=2, deadline=1e6)

        tracemalloc.start()
        try:
            run(1_200)  # the windows of the summaries fill up
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            run(count)
            gc.collect()
            growth = (tracemalloc.get_traced_memory()[0] - before) / count
        finally:
            tracemalloc.stop()
    with capsys.disabled():
        print(f"\n{growth:.1f} bytes kept per request over {count}")
    assert growth < 16


@pytest.mark.soak
def test_a_hundred_thousand_requests(test_seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Slope of resident memory over the last 80 %, blocks at idle, and not one engine that died."""
    count = int(os.environ.get("EMBEDLLM_SOAK", "100000"))
    model, rng, ends = Hooked(eos_every=20), random.Random(test_seed), Counter[str]()
    points = []
    with opened(model, num_kv_blocks=96, max_model_len=80, max_num_seqs=16) as llm:
        engine_of(llm)._debug = False
        began = time.monotonic()
        for part in range(50):
            ends += storm(llm, count // 50, rng)
            gc.collect()
            points.append((part * count // 50, resident()))
        check_nothing_is_left(llm)
        right(llm, model)
    late = points[10:]
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(late, 2))
    slope = slopes[len(slopes) // 2]
    with capsys.disabled():
        print(f"\n{count} requests in {time.monotonic() - began:.0f} s: {dict(ends)}; {slope:.1f} bytes per request")
    assert slope < 16
