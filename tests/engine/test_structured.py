"""Answers with a shape in the real engine: what comes out, what it depends on, and what a bad shape cannot do."""

import atexit
import contextlib
import functools
import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from numpy.typing import NDArray
from pydantic import BaseModel, Field, field_validator

import embedllm
from embedllm import SamplingParams, StructuredOutput, grammars
from embedllm.errors import EngineDead, InvalidOutput, InvalidRequest, RequestCancelled, RequestFailed, UnknownOption
from embedllm.grammars import Grammars
from embedllm.structured.backend import Shape, Vocabulary
from embedllm.testing import ByteTokenizer, ScriptedModel
from tests.engine.hooked import assert_idle, engine_of, until
from tests.unit.schemas import random_schema

BYTES = ByteTokenizer()
BOX = Path(embedllm.__file__).parent / "demo" / "model"


class City(BaseModel):
    """What the tests ask for."""

    name: str = Field(max_length=20)
    inhabitants: int = Field(ge=0, le=99_999_999)
    twins: list[str] = Field(max_length=2)


@pytest.fixture(scope="module")
def llm() -> Iterator[embedllm.LLM]:
    """The model in the box; float32, so that nothing but the tokens decides."""
    with embedllm.LLM(dtype="float32", num_kv_blocks=2_048, progress=False) as llm:
        yield llm


# ---- what comes out -----------------------------------------------------------------------------------------------


def test_every_kind_of_shape(llm: embedllm.LLM) -> None:
    city = llm.generate("Describe Paris:", json_schema=City)
    assert isinstance(city.parsed, City) and json.loads(city.text) == city.parsed.model_dump()
    assert city.finish_reason == "stop" and city.tokens[-1] in engine_of(llm)._eos_ids
    assert city.text == json.dumps(json.loads(city.text), ensure_ascii=False), "no free whitespace"
    plain = llm.generate("A city:", json_schema=City.model_json_schema())
    assert set(plain.parsed) == {"name", "inhabitants", "twins"}
    assert isinstance(llm.generate("data: ", json_object=True, max_tokens=400).parsed, dict)
    assert llm.generate("The sky is", choice=["green", "blue", "grey"]).text in ("green", "blue", "grey")
    digits = llm.generate("A phone number: ", regex=r"\d{3}-\d{4}")
    assert len(digits.text) == 8 and digits.text.replace("-", "").isdigit() and digits.parsed is None
    for grammar in ('root ::= "yes" | "no"', 'start: "yes" | "no"'):
        assert llm.generate("Is it? ", grammar=grammar).text in ("yes", "no")
    tag = {"structures": [{"begin": "<n>", "schema": {"type": "integer"}, "end": "</n>"}], "triggers": ["<n>"]}
    assert llm.generate("x", structural_tag=tag, max_tokens=20).tokens
    asked = StructuredOutput(json_schema=City)
    assert llm.generate("Describe Paris:", SamplingParams(structured=asked)).tokens == city.tokens
    assert llm.generate("Describe Paris:", structured={"json_schema": City}).tokens == city.tokens


def test_a_chat_a_list_and_several_samples(llm: embedllm.LLM) -> None:
    message = [{"role": "user", "content": "Tell me about a city."}]
    assert isinstance(llm.chat(message, json_schema=City).parsed, City)
    each = llm.generate(["A town:", "A village:"], json_schema=City)
    assert all(isinstance(completion.parsed, City) for completion in each)
    many = llm.generate("A city: ", json_schema=City, n=4, temperature=1.0, seed=3)
    assert all(isinstance(output.parsed, City) for output in many.outputs)
    assert len({output.text for output in many.outputs}) > 1
    alone = llm.generate("A city: ", json_schema=City, temperature=1.0, seed=3)
    assert alone.tokens == many.tokens, "a sample does not depend on its siblings"


def test_partial_data_grows_while_it_streams(llm: embedllm.LLM) -> None:
    seen: list[Any] = []
    generation = llm.stream("Describe Rome:", json_schema=City)
    for _ in generation:
        seen.append(generation.partial)
    found = [part for part in seen if part]
    assert found[-1] == json.loads(generation.text) and set(found[0]) <= {"name", "inhabitants", "twins"}
    assert llm.submit("Once", max_tokens=3).partial is None


def test_an_answer_cut_short_has_no_value_and_one_its_type_refuses_says_why(llm: embedllm.LLM) -> None:
    cut = llm.generate("Describe Paris:", json_schema=City, max_tokens=3)
    assert cut.finish_reason == "length"
    with pytest.raises(InvalidOutput, match="max_tokens") as caught:
        _ = cut.parsed
    assert caught.value.completion is cut

    class Never(BaseModel):
        """Refuses everything, which no grammar can know."""

        name: str = Field(max_length=4)

        @field_validator("name")
        @classmethod
        def refuse(cls, value: str) -> str:
            raise ValueError("not this one")

    with pytest.raises(InvalidOutput, match="not this one"):
        _ = llm.generate("x", json_schema=Never).parsed


def test_what_is_refused_in_the_caller(llm: embedllm.LLM) -> None:
    bad: list[dict[str, Any]] = [
        {"regex": "("},
        {"regex": "foo**"},
        {"regex": "\\"},
        {"choice": []},
        {"choice": "yes"},
        {"json_schema": {"type": "object", "properties": {"x": {"type": "nosuch"}}}},
        {"json_schema": "not a schema"},
        {"json_schema": {"not": {}}},
        {"json_schema": City, "regex": "a"},
        {"grammar": "root ::= undefined_rule"},
        {"grammar": "start: ("},
        {"structured": {"json_schema": {}}, "ignore_eos": True},
        {"structured": 7},
        {"structured": {"json_schema": City}, "choice": ["a"]},
        {"json_object": "yes"},
    ]
    for options in bad:
        with pytest.raises(InvalidRequest):
            llm.generate("x", **options)
    assert llm.generate("x", json_schema=None, json_object=False, max_tokens=1).parsed is None, "nothing was asked"
    with pytest.raises(UnknownOption, match="json_schema"):
        llm.generate("x", json_shema=City)
    with embedllm.LLM(ScriptedModel(["a"])) as no_text, pytest.raises(InvalidRequest, match="tokenizer"):
        no_text.generate([1], choice=["a"])
    assert_idle(llm)


# ---- what it depends on -------------------------------------------------------------------------------------------


def test_nothing_but_the_prompt_changes_the_answer(llm: embedllm.LLM) -> None:
    """Alone; among others in too little memory, with preemptions; token by token, for log-probabilities."""
    schemas = [random_schema(seed) for seed in range(12)]
    prompts = [f"Record number {i}: " for i in range(12)]
    options: dict[str, Any] = {"max_tokens": 120}
    alone = [llm.generate(p, json_schema=s, **options) for p, s in zip(prompts, schemas, strict=True)]
    one_by_one = [llm.generate(p, json_schema=s, logprobs=0, **options) for p, s in zip(prompts, schemas, strict=True)]
    assert [c.tokens for c in one_by_one] == [c.tokens for c in alone]
    assert all(len(c.logprobs or ()) == len(c.tokens) for c in one_by_one)
    with embedllm.LLM(dtype="float32", num_kv_blocks=12, max_num_seqs=8, max_batch_tokens=64, progress=False) as small:
        asked = [small.submit(p, json_schema=s, **options) for p, s in zip(prompts, schemas, strict=True)]
        assert [g.result().tokens for g in asked] == [c.tokens for c in alone]
        assert small.stats().num_preemptions > 0
        assert_idle(small)


def test_forced_text_takes_no_steps(llm: embedllm.LLM) -> None:
    shape = {"type": "object", "properties": {"a_rather_long_name": {"const": "and a rather long value too"}}}
    shape["required"] = ["a_rather_long_name"]
    before = llm.stats().num_steps
    completion = llm.generate("x", json_schema=shape)
    assert completion.parsed == {"a_rather_long_name": "and a rather long value too"}
    assert llm.stats().num_steps - before < len(completion.tokens) / 2
    before = llm.stats().num_steps
    again = llm.generate("x", json_schema=shape, logprobs=0)
    assert again.tokens == completion.tokens and llm.stats().num_steps - before >= len(completion.tokens)


def test_other_options_hold_inside_a_shape(llm: embedllm.LLM) -> None:
    shape = {"type": "string", "maxLength": 30}
    assert '"' not in llm.generate("x", json_schema=shape, stop=["e"]).text[1:-1].replace('"', "")
    banned = [llm.tokenize(text)[0] for text in ("yes", "no")]
    for bias in ({banned[0]: -100.0}, {banned[1]: -100.0}):
        (first,) = bias
        found = llm.generate("Is it? ", choice=["yes", "no"], logit_bias=bias, allowed_token_ids=None).tokens[0]
        assert found != first or len(set(banned)) == 1

    def loud(prompt: list[int], output: list[int], logits: Any) -> Any:
        return torch.ones_like(logits)  # every token is as good as any other, also those the shape forbids

    assert json.loads(llm.generate("x", json_schema={"enum": [1, "two", None]}, logits_processor=loud).text) in (
        1,
        "two",
        None,
    )
    with pytest.raises(RequestFailed, match="no token may be chosen"):
        llm.generate("x", choice=["yes"], allowed_token_ids=llm.tokenize("zzz"))
    assert_idle(llm)


@functools.cache
def random_model() -> str:
    """A folder with random weights and the tokenizer of the model in the box: the hardest case for a shape."""
    import transformers

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for path in BOX.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8_192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2_048, initializer_range=0.3, eos_token_id=2, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "num_schemas",
    [
        pytest.param(120, marks=pytest.mark.slow),
        pytest.param(1_000, marks=[pytest.mark.soak, pytest.mark.timeout(1_800)]),
    ],
)
@pytest.mark.parametrize("model", ["box", "random weights"])
def test_random_schemas_give_valid_answers(
    model: str, num_schemas: int, capsys: pytest.CaptureFixture[str], test_seed: int
) -> None:
    """Greedy and sampled, in a batch. Whatever does not end by its length parses and validates."""
    folder = None if model == "box" else random_model()
    num_cut = num_tokens = 0
    with embedllm.LLM(folder, dtype="float32", num_kv_blocks=4_096, progress=False) as llm:
        asked = []
        for number in range(num_schemas):
            schema = random_schema(test_seed + number)
            params = SamplingParams(temperature=1.0, seed=number) if number % 2 else SamplingParams()
            asked.append((schema, llm.submit(f"JSON {number}: ", params, json_schema=schema, max_tokens=1_900)))
        for schema, generation in asked:
            completion = generation.result()
            num_tokens += len(completion.tokens)
            if completion.finish_reason == "length":
                num_cut += 1
            else:
                Draft202012Validator(schema).validate(completion.parsed)
        assert_idle(llm)
    with capsys.disabled():
        print(f"\n{model}: {num_schemas:,} schemas, {num_cut} answers cut short, {num_tokens:,} tokens")
    assert num_cut <= max(2, num_schemas // 100)


# ---- what a bad shape cannot do -----------------------------------------------------------------------------------

NESTED: Any = functools.reduce(lambda inner, _: {"type": "object", "properties": {"a": inner}}, range(10_000), {})
WIDE: Any = functools.reduce(
    lambda inner, i: {"anyOf": [{"properties": {f"k{i}": inner}}, {"properties": {f"z{i}": inner}}]}, range(30), {}
)
HOSTILE: dict[str, dict[str, Any]] = {
    "nested 10,000 deep": {"json_schema": NESTED},
    "doubling": {"json_schema": WIDE},
    "itself": {"json_schema": {"$ref": "#"}},
    "one another": {
        "json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "without an end": {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
    "elsewhere": {"json_schema": {"$ref": "http://127.0.0.1/schema.json"}},
    "100,000 values": {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}},
    "4,000 values": {"json_schema": {"enum": [f"value {i}" for i in range(4_000)]}},
    "a type that is none": {"json_schema": {"type": []}},
    "a pattern that doubles": {"json_schema": {"type": "string", "pattern": "(a+)+$"}},
    "a pattern that is none": {"json_schema": {"type": "string", "pattern": "(["}},
    "a lone surrogate": {"json_schema": {"const": "\ud800"}},
    "a NUL": {"json_schema": {"const": "a\0b"}},
    "(a+)+b": {"regex": "(a+)+b"},
    "a billion": {"regex": "a{1,1000000000}"},
    "repeats of repeats": {"regex": "((((a{99}){99}){99}){99}){99}"},
    "foo**": {"regex": "foo**"},
    "a back-reference": {"regex": r"(a)\1"},
    "brackets": {"regex": "(" * 20_000},
    "NUL in a regex": {"regex": "a\0"},
    "left recursion": {"grammar": 'root ::= root "a" | "b"'},
    "an endless grammar": {"grammar": "root ::= root2\nroot2 ::= root"},
    "deep brackets": {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
    "an empty Lark grammar": {"grammar": "start: "},
    "no grammar": {"grammar": "\0"},
    "choices": {"choice": [f"{i}" for i in range(100_000)]},
    "a tag of nothing": {"structural_tag": {"type": "structural_tag", "format": {"type": "nothing"}}},
    "tags in tags": {"structural_tag": {"structures": [{"begin": "", "schema": {}, "end": ""}], "triggers": [""]}},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_shapes_are_refused_or_bounded(llm: embedllm.LLM, name: str) -> None:
    """Whatever comes of it, the engine lives, in seconds, and a bystander's tokens are what they are alone."""
    alone = llm.generate("def bystander(", max_tokens=40).tokens
    beside = llm.submit("def bystander(", max_tokens=40)
    began = time.monotonic()
    with contextlib.suppress(InvalidRequest, RequestFailed):
        completion = llm.generate("x", max_tokens=64, **HOSTILE[name])
        assert completion.finish_reason in ("stop", "length")
    assert time.monotonic() - began < grammars.COMPILE_SECONDS + 20
    assert beside.result().tokens == alone
    assert_idle(llm)


class Odd:
    """A backend that does as it is told, on a vocabulary of bytes: says "ab" and ends."""

    name = "odd"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.gate = threading.Event()
        self.gate.set()
        self.fail_compile: Exception | None = None
        self.fail_fill = False

    def prepare(self) -> None:
        pass

    def refuses(self, shape: Shape) -> str | None:
        return None

    def compile(self, shape: Shape) -> "Odd":
        self.gate.wait(20)
        if self.fail_compile is not None:
            raise self.fail_compile
        return self

    def new_state(self) -> Any:
        return _OddState(self)


class _OddState:
    def __init__(self, odd: Odd) -> None:
        self.odd, self.said = odd, 0

    def fill(self, row: NDArray[np.int32]) -> None:
        if self.odd.fail_fill:
            raise ValueError("the grammar is broken")
        row[:] = 0
        token = [97, 98, 258][self.said]
        row[token // 32] = np.int64(1 << token % 32).astype(np.int32)

    def accept(self, token: int) -> bool:
        right = token == [97, 98, 258][self.said]
        self.said += right
        return right

    def rollback(self, num_tokens: int) -> None:
        self.said -= num_tokens

    def forced_text(self) -> str:
        return ""

    can_end = False

    @property
    def done(self) -> bool:
        return self.said == 3


@pytest.fixture
def odd() -> Iterator[tuple[embedllm.LLM, Odd]]:
    """An LLM that scripts "zz", with the odd backend and a deadline of 0.2 s."""
    with embedllm.LLM(ScriptedModel(["zz"]), tokenizer=BYTES) as llm:
        core = llm._open()
        vocabulary = Vocabulary([bytes([i]) for i in range(256)] + [b""] * 3, (258,), BYTES.encode)
        backend = Odd(vocabulary)
        core.grammars = Grammars(lambda: vocabulary, lambda _: [backend], compile_seconds=0.2)
        yield llm, backend
        backend.gate.set()


def test_a_shape_bends_any_model(odd: tuple[embedllm.LLM, Odd]) -> None:
    llm, _ = odd
    assert llm.generate("x", regex="ab").text == "ab" and llm.generate("x").text == "zz"
    assert_idle(llm)


def test_a_compile_that_does_not_end_fails_its_request_only(odd: tuple[embedllm.LLM, Odd]) -> None:
    llm, backend = odd
    backend.gate.clear()
    stuck = llm.submit("x", regex="ab")
    assert llm.generate("bystander").text == "zz", "nobody waits for a compile"
    with pytest.raises(RequestFailed, match="not compiled within"):
        stuck.result()
    with pytest.raises(RequestFailed, match="not compiled within"):
        llm.generate("x", regex="ab")  # known by now, so not tried again
    second = llm.submit("x", regex="abc?")
    with pytest.raises(RequestFailed, match="not compiled within"):
        second.result()
    with pytest.raises(InvalidRequest, match="no grammar backend is left"):
        llm.generate("x", regex="abcd?")
    assert llm.generate("bystander").text == "zz"
    assert_idle(llm)


def test_a_backend_that_raises_fails_its_request_only(odd: tuple[embedllm.LLM, Odd]) -> None:
    llm, backend = odd
    backend.fail_compile = ValueError("cannot")
    with pytest.raises(RequestFailed, match="cannot"):
        llm.generate("x", regex="ab")
    backend.fail_compile = None
    assert llm.generate("x", regex="ab?").text == "ab"
    backend.fail_fill = True
    beside = llm.submit("bystander")
    with pytest.raises(RequestFailed, match="the grammar is broken"):
        llm.generate("x", regex="ab?")
    assert beside.result().text == "zz"
    assert_idle(llm)


def test_who_waits_for_a_compile_can_go(odd: tuple[embedllm.LLM, Odd]) -> None:
    llm, backend = odd
    backend.gate.clear()
    held = llm.submit("x", regex="ab")
    held.cancel()
    with pytest.raises(RequestCancelled):
        held.result()
    dropped = llm.submit("x", regex="ab")
    request_id = dropped._channel.request_id
    del dropped
    backend.gate.set()
    until(lambda: request_id not in llm._open().worker._channels)
    backend.gate.clear()
    third = llm.submit("x", regex="abc?")
    llm.close()
    with pytest.raises(RequestCancelled):
        third.result()


def test_a_compile_that_ends_after_the_engine_was_given_up_touches_nothing(
    odd: tuple[embedllm.LLM, Odd], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, backend = odd
    worker, submitted = llm._open().worker, list[Any]()
    backend.gate.clear()
    held = llm.submit("x", regex="ab")
    until(lambda: bool(worker._shaping))
    monkeypatch.setattr(worker, "_error", EngineDead("no progress"))  # as whoever waits does, on a thread of its own
    monkeypatch.setattr(engine_of(llm), "submit", submitted.append)
    backend.gate.set()
    until(lambda: not worker._shaping and held._channel.ended is not None)
    with pytest.raises(EngineDead, match="no progress"):
        held.result()
    assert not submitted
    monkeypatch.undo()
    worker._channels.clear()


def test_a_deadline_counts_while_the_shape_is_compiled(odd: tuple[embedllm.LLM, Odd]) -> None:
    llm, backend = odd
    backend.gate.clear()
    late = llm.submit("x", regex="ab", deadline=0.01)
    time.sleep(0.05)
    backend.gate.set()
    with pytest.raises(embedllm.errors.DeadlineExceeded):
        late.result()


def test_many_shapes_at_once_and_the_cache_stays_small(llm: embedllm.LLM) -> None:
    words = [f"word{i}" for i in range(3 * grammars.MAX_CACHED)]
    asked = [llm.submit("Say it: ", choice=[word]) for word in words]
    assert [generation.result().text for generation in asked] == words
    assert len(llm._open().grammars._cache) <= grammars.MAX_CACHED
    assert_idle(llm)


def test_shapes_come_and_go_while_others_run(llm: embedllm.LLM, test_seed: int) -> None:
    """Cancelled anywhere, everyone else's tokens stay the same."""
    rng = random.Random(test_seed)
    right = [llm.generate(f"City {i}: ", json_schema=City, max_tokens=60).tokens for i in range(4)]
    asked = []
    for i in range(40):
        generation = llm.submit(f"City {i % 4}: ", json_schema=City, max_tokens=60)
        asked.append((i % 4, generation))
        if rng.random() < 0.4:
            rng.choice(asked)[1].cancel()
    for index, generation in asked:
        with contextlib.suppress(RequestCancelled):
            assert generation.result().tokens == right[index]
    assert_idle(llm)
