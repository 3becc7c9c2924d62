"""The tokenizer of the model in the box: byte-level BPE made for Python sources, with ChatML's markers.

A line break and the indentation after it are one token, a digit is one token, and any byte can be spelled.
It knows nothing of the model. Invariant: decode(encode(text)) is text, for every text.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 8192
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CONTROL = (END_OF_TEXT, TURN_START, TURN_END)  # left out of decoded text
MARKUP = ("<tool_call>", "</tool_call>", "<tools>", "</tools>")  # single tokens that stay in decoded text
PIECES = r"(?:[ \t]*\n)+[ \t]*|[ .]?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|[ \t]+(?=[ \t]\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn the merges from texts; control tokens get the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKUP),
        special_tokens=list(CONTROL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    return tokenizer
