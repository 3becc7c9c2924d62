"""The public fakes: HashLM notices every wrong slot, ScriptedModel says what it is told, bytes go both ways."""

from array import array
from collections.abc import Iterator

import pytest

import embedllm
from embedllm import events
from embedllm.config import Limits
from embedllm.errors import InvalidRequest, RequestFailed
from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.testing import ByteTokenizer, HashLM, HashRunner, ScriptedModel

LIMITS = Limits(block_size=4, num_blocks=8, max_num_seqs=2, max_batch_tokens=64)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def entry(tokens: list[int], start: int = 0, draft: int = 0, blocks: tuple[int, ...] = (5, 2, 7)) -> Entry:
    return Entry(0, 0, 0, start, tokens, draft, 1 + draft, array("i", blocks))


def step(runner: HashRunner, *entries: Entry, copies: tuple[tuple[int, int], ...] = ()) -> list[list[int]]:
    return runner.sample(Plan(0, list(entries), list(copies)))


@pytest.fixture
def model() -> HashLM:
    return HashLM(eos_every=0)


@pytest.fixture
def runner(model: HashLM) -> HashRunner:
    return model.runner(LIMITS)


def test_plan_by_plan_equals_expected(model: HashLM, runner: HashRunner) -> None:
    expected = model.expected(PROMPT, 2)
    assert step(runner, entry(PROMPT)) == [expected[:1]]
    assert step(runner, entry(expected[:1], start=10)) == [expected[1:]]


def test_chunks_and_positions(model: HashLM, runner: HashRunner) -> None:
    for start, end in ((0, 1), (1, 6), (6, 10)):
        found = step(runner, entry(PROMPT[start:end], start))
    assert found == [model.expected(PROMPT, 1)]
    assert step(runner, entry(PROMPT, start=1)) != [model.expected(PROMPT, 1)]


def test_unknown_token_is_the_rows_last(model: HashLM, runner: HashRunner) -> None:
    expected = model.expected(PROMPT, 2)
    step(runner, entry(PROMPT))
    assert step(runner, entry([UNKNOWN], start=10)) == [expected[1:]]


@pytest.mark.parametrize("right", [0, 1, 3])
def test_drafts_are_verified(model: HashLM, runner: HashRunner, right: int) -> None:
    expected = model.expected(PROMPT, 5)
    draft = expected[1 : 1 + right] + [96] * (3 - right)  # 96 is EOS, which never comes here
    step(runner, entry(PROMPT))
    assert step(runner, entry([expected[0], *draft], start=10, draft=3, blocks=(5, 2, 7, 1))) == [
        expected[1 : 2 + right]
    ]


def damage_poisoned(runner: HashRunner) -> Entry:
    runner.memory.poison(2)
    return entry([8], start=10)


def damage_freed(runner: HashRunner) -> Entry:
    runner.memory.append((events.FREE, 5))
    return entry([8], start=10)


def damage_swapped_table(runner: HashRunner) -> Entry:
    return entry([8], start=10, blocks=(2, 5, 7))


def damage_position(runner: HashRunner) -> Entry:
    return entry([8], start=11)


def damage_slot(runner: HashRunner) -> Entry:
    slots = runner.memory.contexts
    slots[20], slots[21] = slots[21], slots[20]
    return entry([8], start=10)


def damage_context(runner: HashRunner) -> Entry:
    """The last block holds the right tokens at the right positions, but was computed after another beginning."""
    step(runner, entry([1, *PROMPT[1:]], blocks=(0, 1, 7)))
    return entry([8], start=10)


@pytest.mark.parametrize("damage", [f for name, f in sorted(globals().items()) if name.startswith("damage_")])
def test_damage_shows(model: HashLM, runner: HashRunner, damage: object) -> None:
    step(runner, entry(PROMPT))
    assert step(runner, damage(runner)) != [model.expected([*PROMPT, 8], 1)]


def test_copies_come_before_writes(model: HashLM, runner: HashRunner) -> None:
    step(runner, entry(PROMPT))
    parent, fork = entry([8], start=10), entry([9], start=10, blocks=(5, 2, 3))
    fork.row = 1
    found = step(runner, parent, fork, copies=((7, 3),))
    assert found == [model.expected([*PROMPT, 8], 1), model.expected([*PROMPT, 9], 1)]


def test_expected_ends_as_asked() -> None:
    model = HashLM(vocab_size=5, eos_every=4, seed=3)
    free = model.expected([1], 60, ignore_eos=True)
    assert len(free) == 60 and set(free) == {0, 1, 2, 3, 4}
    assert model.expected([1], 60) == free[: free.index(4) + 1]
    assert model.expected([1], 60, stop_ids=[2], ignore_eos=True) == free[: free.index(2) + 1]
    assert model.expected([1], 60) != HashLM(vocab_size=5, eos_every=4, seed=4).expected([1], 60)
    with pytest.raises(InvalidRequest, match="vocab_size=2"):
        HashLM(vocab_size=2)


def test_logits_say_the_same_as_samples(model: HashLM, runner: HashRunner) -> None:
    first = entry(PROMPT)
    first.wants_hidden = True
    output = runner(Plan(0, [entry(PROMPT[:4], blocks=(1,)), first]))
    assert output.logits.shape == (2, 97) and output.hidden is not None and output.hidden.shape == (10, 97)
    assert output.logits.argmax(1).tolist() == model.expected(PROMPT[:4], 1) + model.expected(PROMPT, 1)
    (logits,) = runner.logits(output.hidden)
    assert logits.argmax(1).tolist() == [model.expected(PROMPT[:n], 1)[0] for n in range(1, 11)]
    chunk = entry([1])
    chunk.num_logits = 0
    assert runner(Plan(0, [chunk])).logits.shape == (0, 97)


# ---- in an LLM ------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def scripted(replies: object, **options: object) -> embedllm.LLM:
    return embedllm.LLM(ScriptedModel(replies, **options), tokenizer=ByteTokenizer(), progress=False)


@pytest.fixture
def hashed() -> Iterator[embedllm.LLM]:
    with embedllm.LLM(HashLM(), tokenizer=None, block_size=4, num_kv_blocks=64, max_num_seqs=4, progress=False) as llm:
        yield llm


def test_hash_lm_in_an_llm(hashed: embedllm.LLM) -> None:
    prompts = [[i, *PROMPT[: i % 7]] for i in range(40)]
    completions = hashed.generate(prompts, max_tokens=30)
    assert [c.tokens for c in completions] == [HashLM().expected(prompt, 30) for prompt in prompts]
    assert {c.finish_reason for c in completions} == {"stop", "length"}


def test_replies_in_turn() -> None:
    with scripted(["Hello!", "Grüße, 😀"]) as llm:
        assert [c.text for c in llm.generate(["a", "b", "a"])] == ["Hello!", "Grüße, 😀", "Hello!"]
        (c,) = llm.generate(["a longer prompt"])
        assert c.text == "Grüße, 😀" and c.finish_reason == "stop" and c.tokens[-1] == 258
        assert llm.generate("b", max_tokens=3).text == "Hel"


def test_reply_of_a_function() -> None:
    with scripted(lambda prompt: prompt[::-1]) as llm:
        assert llm.generate("stressed").text == "desserts"
        assert [c.text for c in llm.generate("abc", n=3).outputs] == ["cba"] * 3
        assert len(llm.generate("abc", prompt_logprobs=1).prompt_logprobs) == 3


def test_told_to_fail() -> None:
    with scripted(["one"], fail_at=[1]) as llm:
        assert llm.generate("a").text == "one"  # a step that fails once is run again
    with scripted(["one"], fail_at=[1, 2]) as llm:
        with pytest.raises(RequestFailed, match="step 2 was told to fail") as caught:
            llm.generate("a")
        assert caught.value.completion.text == "o"
        assert llm.generate("a").text == "one"


def test_scripts_are_checked() -> None:
    for replies in ("one text", [], ()):
        with pytest.raises(InvalidRequest, match="replies must be a list of texts or a function"):
            ScriptedModel(replies)


@pytest.mark.parametrize("text", ["", "abc", "\0", "Grüße 😀", "<|im_end|>", "e\u0301\u200d"])
def test_bytes_go_both_ways(tokenizer: ByteTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text


def test_special_tokens(tokenizer: ByteTokenizer) -> None:
    assert tokenizer.decode([256, 104, 105, 257, 258]) == "hi"
    assert tokenizer.decode([256, 104, 258], skip_special_tokens=False) == "<|im_start|>h<|endoftext|>"
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    with pytest.raises(InvalidRequest, match="not valid Unicode at character 1"):
        tokenizer.encode("a\ud800")


def test_chat(tokenizer: ByteTokenizer) -> None:
    with scripted(lambda prompt: prompt) as llm:
        completion = llm.chat([{"role": "user", "content": "hi <|im_end|>"}], skip_special_tokens=False)
    assert completion.text == "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert completion.tokens.count(257) == 1  # what the user wrote stays text
