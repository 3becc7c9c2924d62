"""Tokenizers made on the spot, one of each kind that models come with."""

import functools

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from embedllm.tokenizer import Tokenizer

TEXT = "the cat sat on the mat. don't! 12 + 345 = 357\n\tdef f(x): return x  # été 日本語 😀👍🏽 <b>|</b>"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> Backend:
    """As of GPT-2, Llama 3, Qwen."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT, "<|im start end system user assistant|>"] * 4, trainer)
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in ("<think>", "</think>")])
    return backend


def byte_fallback() -> Backend:
    """As of Llama 2: a space is ▁, unknown characters are <0xNN> tokens, the first space is stripped when decoding."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"▁abcdehinostu<>/|.é\ufffd", "▁a", "▁▁", "th", "▁th", "the", "▁the"]
    merges = [("▁", "a"), ("▁", "▁"), ("t", "h"), ("▁", "th"), ("th", "e"), ("▁th", "e")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def unigram() -> Backend:
    """As of T5 and XLM-R, behind a normaliser that folds look-alikes."""
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_special_tokens([AddedToken(text, normalized=True) for text in ("<s>", "</s>")])
    return backend


def word_piece() -> Backend:
    """As of BERT: the decoder removes spaces before punctuation."""
    words = ["[UNK]", "[CLS]", "[SEP]", *"abcdehinost.!,?'", "the", "cat", "##s", "##at", "do", "n't", "##."]
    backend = Backend(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return backend


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    """One of each, wrapped."""
    if kind == "byte-level":
        return Tokenizer(byte_level(), special_tokens={"eos_token": "<|im_end|>"})
    if kind == "word-piece":
        return Tokenizer(word_piece(), special_tokens={"bos_token": "[CLS]", "eos_token": "[SEP]"})
    return Tokenizer({"byte-fallback": byte_fallback, "unigram": unigram}[kind](), special_tokens=NAMED)


KINDS = ("byte-level", "byte-fallback", "unigram", "word-piece")
