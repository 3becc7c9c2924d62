"""Text to token ids and back, for a model's folder.

Owns one immutable `tokenizers.Tokenizer` and what tokenizer_config.json says about it. Knows no chat and no streaming
beyond making a stream. transformers is imported only for folders that have no tokenizer.json. Invariant: nothing here
changes after construction, so any thread may call anything at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from embedllm.detokenizer import TextStream
from embedllm.errors import InvalidRequest, MissingDependency, ModelFormatError

if TYPE_CHECKING:
    import tokenizers

DEFAULT_MAX_BYTES = 16 * 2**20  # of UTF-8 in one text
# Without tokenizer.json, these say that there is a tokenizer which transformers can convert.
_OLD_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "merges.txt", "vocab.txt", "tekken.json")
# Stands for a control token inside `encode_pieces`. Noncharacters: Unicode keeps them for such private use.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class TokenizerProtocol(Protocol):
    """What the engine needs of a tokenizer. Subclass it: only encode, decode, vocab_size and eos_ids must be given."""

    vocab_size: int
    eos_ids: tuple[int, ...]
    bos_id: int | None = None
    special_ids: frozenset[int] = frozenset()
    special_tokens: Mapping[str, str] = {}  # "bos_token" -> "<s>": the names that chat templates use
    control_tokens: Mapping[str, int] = {}  # texts that a chat's contents must not turn into tokens
    chat_template: str | Mapping[str, str] | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises InvalidRequest if it is too long or not valid Unicode."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 that an id adds within a text; b"" if that cannot be told from what `decode` gives."""
        text = self.decode([i], skip_special_tokens=False)
        return b"" if "\ufffd" in text else text.encode()

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of a text that comes in pieces: control tokens as ids, and texts in which nothing is a control token."""
        return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else self.encode(piece, False))]

    def decode_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A fresh incremental decoder."""
        return TextStream(lambda ids: self.decode(ids, skip_special_tokens))


class Tokenizer(TokenizerProtocol):
    """A model's tokenizer.

    encode parses control tokens in plain prompts ("<|im_end|>" becomes one token), as transformers does; chats go
    through `encode_pieces`, which does not. Decoding never cleans up spaces. `max_bytes` limits one text's UTF-8.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        control_ids: Iterable[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._plain: tokenizers.Tokenizer | None = None
        self.max_bytes = max_bytes
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._id_of("bos_token")
        eos = self._id_of("eos_token")
        self.eos_ids = () if eos is None else (eos,)
        control = {*self.special_ids, *self.eos_ids, *control_ids} | ({self.bos_id} - {None})
        self.control_tokens = {token.content: i for i, token in sorted(added.items()) if i in control and token.content}
        self._byte_of = _byte_fallback(backend)
        self._alphabet = _byte_alphabet() if "ByteLevel" in repr(backend.decoder) else {}

    @classmethod
    def from_folder(cls, path: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> Tokenizer | None:
        """The tokenizer in a model's folder; None if it has none.

        Raises ModelFormatError naming the file that cannot be read, MissingDependency if an old format needs a package.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        named = {name: value for name, value in config.items() if name.endswith("_token")}
        named = {**_read_json(folder / "special_tokens_map.json"), **named}
        tokens = {name: text for name, value in named.items() if (text := _content(value))}
        if (folder / "tokenizer.json").is_file():
            backend = _load(folder / "tokenizer.json")
            _complete(backend, config, tokens, folder)
        elif any((folder / name).is_file() for name in _OLD_FILES):
            backend = _convert(folder)
        else:
            return None
        ends = _read_json(folder / "generation_config.json").get("eos_token_id")
        return cls(
            backend,
            special_tokens=tokens,
            control_ids=ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else [],
            chat_template=_chat_template(folder, config),
            max_bytes=max_bytes,
        )

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, control tokens parsed. add_special_tokens: what the model wants around a prompt, as BOS.

        Raises InvalidRequest if the text is over `max_bytes` of UTF-8 or has a lone surrogate.
        """
        self._check(text)
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _check(self, text: str) -> None:
        if not isinstance(text, str):
            raise InvalidRequest(f"text must be a str, got {type(text).__name__}")
        size = len(text)
        if size <= self.max_bytes and not text.isascii():
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                raise InvalidRequest(
                    f"the text has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}: "
                    "half a UTF-16 pair is no text; remove it, or decode your bytes with errors='replace'"
                ) from None
        if size > self.max_bytes:
            raise InvalidRequest(f"the text has over {size:,} bytes; at most {self.max_bytes:,} are tokenized at once")

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        """Ids of a text that comes in pieces: control tokens as ids, and texts in which nothing is a control token.

        The pieces are encoded as one text, so neighbours merge as they would without the cut.
        """
        whole = "".join(f"{_OPEN}{piece}{_CLOSE}" if isinstance(piece, int) else piece for piece in pieces)
        if whole.count(_OPEN) != sum(isinstance(piece, int) for piece in pieces):
            raise InvalidRequest("the text has U+FDD0, a noncharacter that no text may hold; remove it")
        self._check(whole)
        if self._plain is None:  # two threads may both build it; they build the same
            self._plain = _without_control_tokens(self._backend, self.control_tokens)
        return self._plain.encode(whole, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD, unknown ids are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, i: int) -> bytes:
        """The bytes that an id adds within a text, also where they are only a part of a character."""
        token = self._backend.id_to_token(i)
        if token is None:
            return b""
        if i in self._byte_of:
            return bytes((self._byte_of[i],))
        if self._alphabet:
            spelled = token.translate(self._alphabet)
            # A token with a character outside the alphabet (an added one) stands for its own text.
            return spelled.encode("latin-1") if all(ord(c) in self._alphabet for c in token) else token.encode()
        decoder = self._backend.decoder
        # Behind another token: what a decoder does to the start of a text is not done here.
        return (decoder.decode(["a", token])[1:] if decoder else token).encode()

    def decode_stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A fresh incremental decoder; one thread at a time may use it."""
        from tokenizers.decoders import DecodeStream

        backend = self._backend
        return TextStream(
            lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens),
            lambda ids: DecodeStream(ids=ids, skip_special_tokens=skip_special_tokens),
            backend,
            silent=self.special_ids if skip_special_tokens else frozenset(),
            byte_of=self._byte_of,
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFormatError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelFormatError(f"{path} must hold a JSON object, it holds {type(found).__name__}")
    return found


def _content(value: object) -> str | None:
    """A token as configs write it: its text, or an object with the text in it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _load(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"{path} is not a tokenizer this version of tokenizers can read: {error}") from error


def _complete(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], tokens: Mapping[str, str], folder: Path
) -> None:
    """Apply what tokenizer_config.json adds to tokenizer.json, as transformers does: added tokens, BOS and EOS."""
    from tokenizers import AddedToken, processors

    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
        raise ModelFormatError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must map ids to tokens")
    for key, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        text = _content(entry)
        if text is None or text in known:
            continue
        flags = {n: bool(entry.get(n)) for n in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != int(key):
            raise ModelFormatError(
                f"{folder / 'tokenizer_config.json'} gives {text!r} the id {key}, but it does not follow the ids of "
                f"tokenizer.json, which end at {backend.get_vocab_size() - 2}"
            )
    named = [text for text in tokens.values() if text not in known and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in named])
    asked = [config.get("add_bos_token"), config.get("add_eos_token")]
    if asked != [None, None] or backend.post_processor is None:
        wanted = [tokens.get(n) if a else None for n, a in zip(("bos_token", "eos_token"), asked, strict=True)]
        around = [(text, i) for text in wanted if text and (i := backend.token_to_id(text)) is not None]
        bos, eos = wanted
        single = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of an old folder, converted by transformers."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise MissingDependency(
            f"the tokenizer in {folder} is in an old format whose conversion needs another package: {error}; "
            "try `pip install sentencepiece protobuf tiktoken`"
        ) from error
    except Exception as error:  # whatever its many readers raise
        raise ModelFormatError(f"transformers cannot read the tokenizer in {folder}: {error}") from error
    if not getattr(found, "is_fast", False):
        raise ModelFormatError(
            f"the tokenizer in {folder} ({type(found).__name__}) has no `tokenizers` form; "
            "use tokenizer=None and pass token ids"
        )
    backend: tokenizers.Tokenizer = found.backend_tokenizer
    return backend


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The folder's chat template, or its templates by name; files come before tokenizer_config.json."""
    paths = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    try:
        files = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    except (OSError, ValueError) as error:
        raise ModelFormatError(f"a chat template in {folder} cannot be read: {error}") from error
    found: Any = files or config.get("chat_template")
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (TypeError, KeyError) as error:
            raise ModelFormatError(f"{folder / 'tokenizer_config.json'}: chat_template is malformed") from error
    if isinstance(found, dict) and list(found) == ["default"]:
        found = found["default"]
    if found is not None and not isinstance(found, (str, dict)):
        raise ModelFormatError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of them")
    return found


def _byte_fallback(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """{id: byte} of a decoder that joins runs of <0xNN> tokens; empty for others."""
    if "ByteFallback" not in repr(backend.decoder):
        return {}
    ids = ((backend.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
    return {i: byte for i, byte in ids if i is not None}


def _byte_alphabet() -> dict[int, int]:
    """{character: byte} of byte-level vocabularies: GPT-2's alphabet, in which bytes without a shape follow U+0100."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {0x100 + n: byte for n, byte in enumerate(hidden)}


def _without_control_tokens(backend: tokenizers.Tokenizer, control: Mapping[str, int]) -> tokenizers.Tokenizer:
    """The same tokenizer, in which control tokens are spelled by their ids and their own texts are plain text.

    They are renamed wherever they are: among the added tokens, in the model's vocabulary, in its merges.
    """
    from tokenizers import Tokenizer as Backend

    names = {text: f"{_OPEN}{i}{_CLOSE}" for text, i in control.items()}
    data = json.loads(backend.to_str())
    data["post_processor"] = None
    for token in data["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in merges if not {a, b, a + b} & names.keys()]
    plain = Backend.from_str(json.dumps(data))
    for text, name in names.items():
        if plain.token_to_id(name) != control[text]:
            raise ModelFormatError(f"the tokenizer's control token {text!r} cannot be told from its text")
    return plain
