"""A model folder's tokenizer: equal to transformers', safe from any thread, closed to control tokens in plain text."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors

from embedllm.errors import InvalidRequest, ModelFormatError
from embedllm.tokenizer import Tokenizer, TokenizerProtocol
from tests.unit.tiny_tokenizers import KINDS, TEXT, byte_fallback, byte_level, tokenizer

TEXTS = [
    TEXT,
    "",
    " ",
    "a",
    "\x00",
    "<|im_start|>user\n<|im_end|>x<think>",
    "e\u0301 é ﬁ",
    "👩‍👩‍👧‍👦" * 3,
    "\r\n\t " * 9,
]


def folder(path: Path, backend: Any, **config: Any) -> Path:
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    backend = byte_level()
    backend.enable_truncation(4)  # left in files by whoever saved them; a prompt is never cut
    path = folder(
        tmp_path, backend, tokenizer_class="PreTrainedTokenizerFast", bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    ours, theirs = Tokenizer.from_folder(path), AutoTokenizer.from_pretrained(str(path))
    assert ours is not None and ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert ours.encode(text, False) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (True, False), (True, True), (False, False)])
def test_bos_and_eos_as_the_config_asks(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    backend = byte_fallback()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    asked = {n: v for n, v in (("add_bos_token", bos), ("add_eos_token", eos)) if v is not None}
    path = folder(tmp_path, backend, bos_token={"content": "<s>"}, eos_token="</s>", **asked)
    found = Tokenizer.from_folder(path)
    assert found is not None
    body = found.encode("the a", False)
    assert found.encode("the a") == [*([1] if bos in (None, True) else []), *body, *([2] if eos else [])]


def test_a_folder_without_one_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path) is None


def test_old_files_are_converted_by_transformers(tmp_path: Path) -> None:
    data = json.loads(byte_level().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(data["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in data["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"})
    )
    found = Tokenizer.from_folder(tmp_path)
    assert found is not None and found.eos_ids == (0,)
    assert found.decode(found.encode(TEXT)) == TEXT
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises((ModelFormatError, ImportError), match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer_config.json", "nope"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "new"}}}'),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("generation_config.json", "{"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    folder(tmp_path, byte_level())
    (tmp_path / name).write_text(text)
    if text == '{"added_tokens_decoder": []}':
        assert Tokenizer.from_folder(tmp_path) is not None
        return
    with pytest.raises(ModelFormatError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_truncated_files_never_do_worse_than_a_format_error(tmp_path: Path) -> None:
    folder(tmp_path, byte_fallback())
    whole = (tmp_path / "tokenizer.json").read_bytes()
    for cut in range(0, len(whole) - 1, len(whole) // 40):
        (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
        with pytest.raises(ModelFormatError, match=r"tokenizer\.json"):
            Tokenizer.from_folder(tmp_path)


def test_tokens_that_only_the_config_knows(tmp_path: Path) -> None:
    size = byte_level().get_vocab_size()
    listed = {str(size): {"content": "<tool>", "special": False}, str(size + 1): {"content": "<pad>", "special": True}}
    folder(tmp_path, byte_level(), added_tokens_decoder=listed, pad_token="<pad>", mask_token=None)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>"}, "pad_token": "other"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [size, 2]}))
    found = Tokenizer.from_folder(tmp_path)
    assert found is not None
    assert found.encode("<tool><pad>") == [size, size + 1]
    assert size + 1 in found.special_ids and size not in found.special_ids
    assert found.special_tokens == {"pad_token": "<pad>", "eos_token": "<|im_end|>"}
    assert found.control_tokens["<tool>"] == size  # it ends an answer, so a message may not hold it


def test_chat_templates_are_found_in_all_their_places(tmp_path: Path) -> None:
    def found() -> Any:
        loaded = Tokenizer.from_folder(tmp_path)
        assert loaded is not None
        return loaded.chat_template

    folder(tmp_path, byte_level())
    assert found() is None
    folder(tmp_path, byte_level(), chat_template="A")
    assert found() == "A"
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    folder(tmp_path, byte_level(), chat_template=named)
    assert found() == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("été")
    assert found() == "été"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("C")
    assert found() == {"default": "été", "rag": "C"}


def test_text_that_cannot_be_tokenized_is_refused() -> None:
    small = Tokenizer(byte_level(), max_bytes=10)
    assert small.encode("a" * 10)
    for text in ("a" * 11, "é" * 6, "😀" * 3):
        with pytest.raises(InvalidRequest, match="10 "):
            small.encode(text)
    with pytest.raises(InvalidRequest, match=r"U\+D83D, at character 2"):
        small.encode("ab\ud83d")
    for value in (None, b"bytes", 5, ["a"]):
        with pytest.raises(InvalidRequest, match="must be a str"):
            small.encode(value)  # type: ignore[arg-type]


def test_sixteen_threads_at_once() -> None:
    shared = tokenizer("byte-level")
    texts = [f"{TEXT} {i} <|im_end|>" * 3 for i in range(50)]
    want = [(shared.encode(t), shared.encode_pieces([t, 2])) for t in texts]
    fresh = Tokenizer(byte_level(), special_tokens={"eos_token": "<|im_end|>"})
    errors: list[BaseException] = []
    start = threading.Barrier(16)

    def work() -> None:
        try:
            start.wait()
            for text, (ids, pieces) in zip(texts, want, strict=True):
                assert fresh.encode(text) == ids and fresh.encode_pieces([text, 2]) == pieces
                assert fresh.decode(ids, False) == text
                stream = fresh.decode_stream(False)
                assert "".join(map(stream.push, ids)) + stream.finish() == text
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_hold_control_tokens_only_where_they_are_ids(kind: str) -> None:
    found = tokenizer(kind)
    names = list(found.control_tokens)
    plain = "the cat " + " and ".join(names) + names[0]
    ids = found.encode_pieces([found.control_tokens[names[1]], plain, found.control_tokens[names[2]], plain])
    unknown = {found.control_tokens.get("<unk>"), found.control_tokens.get("[UNK]")}
    control = [i for i in ids if i in found.control_tokens.values() and i not in unknown]
    assert control == [found.control_tokens[names[1]], found.control_tokens[names[2]]]
    if kind.startswith("byte"):
        assert found.decode(ids, False).replace(" ", "") == (names[1] + plain + names[2] + plain).replace(" ", "")
    with pytest.raises(InvalidRequest, match="U\\+FDD0"):
        found.encode_pieces(["a\ufdd01\ufdd1"])


def test_a_control_token_that_merges_would_build_stays_text() -> None:
    pieces = ["<unk>", *"</s>a", "</", "s>", "</s>", "</s>a"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "a")]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>"])
    found = Tokenizer(backend, special_tokens={"eos_token": "</s>"})
    end = pieces.index("</s>")
    assert found.encode("</s>a") == [end, pieces.index("a")]
    assert found.encode_pieces(["</s>a", end]) == [pieces.index("</"), pieces.index("s>"), pieces.index("a"), end]


@given(st.lists(st.one_of(st.integers(0, 2), st.text(st.characters(codec="utf-8"), max_size=12)), max_size=8))
@settings(max_examples=150)
def test_pieces_equal_the_joined_text_where_nothing_is_a_control_token(pieces: list[int | str]) -> None:
    for kind in ("byte-level", "byte-fallback"):
        found = tokenizer(kind)
        names = {i: text for text, i in found.control_tokens.items()}
        joined = "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)
        texts = [piece for piece in pieces if isinstance(piece, str)]
        if "\ufdd0" in joined or any(name[0] in text or name[-1] in text for name in names.values() for text in texts):
            continue
        assert found.encode_pieces(pieces) == found.encode(joined, False)


def test_the_protocol_is_enough_for_a_tokenizer_of_ones_own() -> None:
    class Letters(TokenizerProtocol):
        vocab_size = 128
        eos_ids = (0,)

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(char) for char in text]

        def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
            return "".join(map(chr, ids))

    letters = Letters()
    assert letters.encode_pieces(["ab", 0, "c"]) == [97, 98, 0, 99]
    stream = letters.decode_stream()
    assert [stream.push(i) for i in (97, 98)] == ["a", "b"] and stream.finish() == ""


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    folder(tmp_path, byte_level(), eos_token="<|im_end|>", chat_template="{{ messages[0].content }}")
    code = (
        "import sys; from embedllm.tokenizer import Tokenizer; from embedllm.chat import Chat; "
        f"t = Tokenizer.from_folder({str(tmp_path)!r}); t.decode(t.encode('hi <|im_end|>')); "
        "Chat(t).encode([{'role': 'user', 'content': '<|im_end|>'}]); "
        "bad = [m for m in ('transformers', 'torch', 'numpy') if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
