"""The model that ships in the package: its files, tokenizer, template, data split, and the script that trained it."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
import torch
from tokenizers import Tokenizer

from embedllm.demo.train import chatml, corpus, evaluate
from embedllm.demo.train.dialogues import dialogues, is_held_out
from embedllm.demo.train.export import export, load_exported
from embedllm.demo.train.loop import Run, Trainer
from embedllm.demo.train.model import ModelConfig
from embedllm.demo.train.packing import Pool, pool_of
from embedllm.demo.train.tokens import CONTROL, MARKUP, VOCABULARY, train_tokenizer

FOLDER = Path(chatml.__file__).parents[1] / "model"
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is fastest alone on a core, and does not stall when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def shipped_template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = chatml.dumps
    return environment.from_string((FOLDER / "chat_template.jinja").read_text(encoding="utf-8"))


def render_shipped(messages: list[dict[str, Any]], tools: list[dict[str, Any]], generate: bool = False) -> str:
    return shipped_template().render(messages=messages, tools=tools or None, add_generation_prompt=generate)


# What ships


def test_files_are_there_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert sorted(sizes) == sorted(FILES)
    assert sum(sizes.values()) < 32 * 2**20


def test_shape_suits_what_comes_later() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_hidden_layers"] >= 10
    assert config["hidden_size"] % 128 == 0 and config["intermediate_size"] % 128 == 0
    assert config["head_dim"] == 64 and config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["vocab_size"] == VOCABULARY and config["max_position_embeddings"] >= 2048


def test_end_tokens(tokenizer: Tokenizer) -> None:
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert [tokenizer.id_to_token(token) for token in generation["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]


def test_transformers_gives_the_logits_of_the_training_code() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer = load_exported(FOLDER, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    text = "import os\n\ndef walk(top):\n    for name in os.listdir(top):\n        yield name\n"
    ids = torch.tensor([tokenizer.encode(text).ids])
    assert AutoTokenizer.from_pretrained(FOLDER)(text)["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        mine = ours.logits(ours.hidden(ids)[0])
        torch.testing.assert_close(mine, theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_it_completes_a_function_and_calls_a_tool() -> None:
    model, tokenizer = load_exported(FOLDER)
    head = "    def __len__(self):"
    body = evaluate.cut_at_dedent(head, evaluate.greedy(model, tokenizer, head, 48))
    assert evaluate.parses(body), body
    dialogue = next(d for d in dialogues(1, 100, held_out=True, max_turns=1) if d.kind == "tool")
    history, message = next(evaluate.assistant_turns(dialogue))
    text = evaluate.greedy(model, tokenizer, chatml.render(history, dialogue.tools, add_generation_prompt=True), 64)
    assert evaluate.is_right(message, text), text


# Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x  # ok\n\n\n\tif True:\n        pass\n",
        "  leading and trailing  \n \n  \t ",
        "zażółć gęślą jaźń — 漢字 🙂‍🌈 \u0000\u0007\r\n",
        "<|im_start|>user\nhi<|im_end|>\n<tool_call>{}</tool_call><|endoftext|>",
        "".join(map(chr, range(0x0, 0x3000, 7))),
        "1234567890 0x1F 3.14e-10",
    ],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCABULARY
    every = "".join(chr(number) for number in (*range(0x800), 0xFFFD, 0x10FFFF))
    assert tokenizer.decode(tokenizer.encode(every).ids) == every


def test_markers_are_single_tokens(tokenizer: Tokenizer) -> None:
    for marker in CONTROL + MARKUP:
        assert len(tokenizer.encode(marker).ids) == 1
    text = "<|im_start|>a<tool_call>b</tool_call><|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == "a<tool_call>b</tool_call>"


def test_indentation_and_digits(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("\n        ").ids) == 1
    assert len(tokenizer.encode("2026").ids) == 4


# Template


def test_template_renders_what_training_saw() -> None:
    for dialogue in dialogues(2, 100):
        assert render_shipped(dialogue.messages, dialogue.tools) == dialogue.text()
        for history, _ in evaluate.assistant_turns(dialogue):
            expected = chatml.render(history, dialogue.tools, add_generation_prompt=True)
            assert render_shipped(history, dialogue.tools, generate=True) == expected


def test_template_takes_what_callers_send() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    messages: list[dict[str, Any]] = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": " two"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}, call]},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    text = render_shipped(messages, [{"name": "add"}], generate=True)
    block = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert '{"name": "add", "description": "", "parameters": {}}' in text
    assert text.endswith(
        f"<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n{block}\n{block}<|im_end|>\n"
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    )


# Data


def test_held_out_paths() -> None:
    assert corpus.is_held_out("json/decoder.py")
    assert corpus.is_held_out("test/test_json/test_decode.py")
    assert corpus.is_held_out("test/test_email/__init__.py")
    assert corpus.is_held_out("test/test_logging.py")
    assert not corpus.is_held_out("asyncio/events.py")
    assert not corpus.is_held_out("test/test_re.py")


def test_split_keeps_near_duplicates_out_of_training() -> None:
    body = "\n".join(f"line_{number} = {number}" for number in range(40))
    other = "\n".join(f"other_{number} = {number}" for number in range(40))
    sources = [
        corpus.Source("json/a.py", body),
        corpus.Source("copy.py", body + "\nextra = 1\n"),
        corpus.Source("indented.py", "if True:\n" + "\n".join("    " + line for line in body.split("\n"))),
        corpus.Source("fine.py", other),
        corpus.Source("twin_of_fine.py", other),
    ]
    train, held_out = corpus.split(sources)
    assert [source.path for source in held_out] == ["json/a.py"]
    assert len(train) == 1 and train[0].text == other


def test_split_of_this_library_has_no_overlap() -> None:
    names = ("json", "logging", "http", "html", "importlib", "urllib")
    sources = [source for source in corpus.read_library() if source.path.startswith(names)]
    train, held_out = corpus.split(sources)
    assert {source.path.split("/")[0] for source in held_out} == {"json", "logging"}
    assert not {source.path for source in train} & {source.path for source in held_out}
    seen = set().union(*(corpus.shingles(source.text) for source in held_out))
    for source in train:
        own = corpus.shingles(source.text)
        assert len(own & seen) <= corpus.MAX_SHARED * len(own)


def test_functions_are_dedented_and_parse() -> None:
    source = corpus.Source("x.py", "class A:\n    def f(self):\n        a = 1\n        b = 2\n        return a + b\n")
    assert corpus.functions(source) == ["def f(self):\n    a = 1\n    b = 2\n    return a + b\n"]


def test_dialogues_are_deterministic_and_held_out_ones_are_new() -> None:
    train = list(dialogues(0, 1500))
    again = list(dialogues(0, 1500))
    held_out = list(dialogues(1, 300, held_out=True))
    assert train == again
    assert not {d.text() for d in train} & {d.text() for d in held_out}
    assert not any(is_held_out(key) for d in train for key in d.keys)
    assert all(is_held_out(key) for d in held_out for key in d.keys)


# Training


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, dict[str, Pool], Path]:
    texts = [dialogue.text() for dialogue in dialogues(3, 60)]
    tokenizer = train_tokenizer(texts, vocabulary=400)
    path = tmp_path_factory.mktemp("micro") / "tokenizer.json"
    tokenizer.save(str(path))
    config = ModelConfig(
        vocab=tokenizer.get_vocab_size(), hidden=32, mlp=64, layers=1, heads=2, kv_heads=1, head_dim=16, context=32
    )
    return config, {"dialogues": pool_of(tokenizer, texts), "library": pool_of(tokenizer, texts)}, path


def micro_run(folder: Path) -> Run:
    def clock() -> Iterator[int]:
        yield from itertools.count()  # two looks per step: every step takes a second

    ticks = clock()
    return Run(folder=folder, minutes=8 / 60, batch_tokens=128, compile=False, clock=lambda: float(next(ticks)))


MIXES = ((0.0, {"dialogues": 0.5, "library": 0.5}), (0.5, {"dialogues": 1.0}))


def test_training_resumes_with_the_same_losses(
    micro: tuple[ModelConfig, dict[str, Pool], Path], tmp_path: Path
) -> None:
    config, pools, _ = micro
    whole = Trainer(config, micro_run(tmp_path / "whole"), pools, MIXES)
    whole.train(log=str)
    assert whole.step == 8 and whole.losses[-1] < whole.losses[0]

    first = Trainer(config, micro_run(tmp_path / "parts"), pools, MIXES)
    assert not first.resume()
    first.train(log=str, max_steps=3)
    second = Trainer(config, micro_run(tmp_path / "parts"), pools, MIXES)
    assert second.resume() and second.step == 3
    second.train(log=str)
    assert second.losses == pytest.approx(whole.losses, rel=1e-3)


def test_export_of_a_checkpoint_loads_back(micro: tuple[ModelConfig, dict[str, Pool], Path], tmp_path: Path) -> None:
    config, pools, tokenizer_file = micro
    trainer = Trainer(config, micro_run(tmp_path), pools, MIXES)
    trainer.train(log=str, max_steps=1)
    export(trainer.checkpoint, tokenizer_file, tmp_path / "model")
    model, _ = load_exported(tmp_path / "model")
    for (name, saved), (_, now) in zip(trainer.masters.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(saved.to(torch.bfloat16), now, msg=name, rtol=0, atol=0)


def test_cached_and_whole_forward_agree(micro: tuple[ModelConfig, dict[str, Pool], Path], tmp_path: Path) -> None:
    config, pools, _ = micro
    model = Trainer(config, micro_run(tmp_path), pools, MIXES).masters
    ids = torch.arange(12)[None] % config.vocab
    with torch.no_grad():
        whole, _ = model.hidden(ids)
        _, past = model.hidden(ids[:, :11])
        last, _ = model.hidden(ids[:, 11:], past)
    torch.testing.assert_close(whole[:, 11:], last, rtol=1e-4, atol=1e-4)


# Evaluation


def test_cut_at_dedent() -> None:
    assert evaluate.cut_at_dedent("  def f(x):", "\n    return x\n\n  def g(): pass") == "def f(x):\n  return x\n"
    assert evaluate.cut_at_dedent("def f(x):", " return x\ny = 1") == "def f(x): return x"


def test_parse_call() -> None:
    assert evaluate.parse_call(chatml.render_call("f", {"a": 1})) == {"name": "f", "arguments": {"a": 1}}
    assert evaluate.parse_call("<tool_call>{") is None
    assert evaluate.parse_call("no call") is None
