"""Token pools and the windows drawn from them.

Owns what is read how often. A pool is one long array of documents joined by <|endoftext|>; window k of a pool starts at
the k-th point of a golden-ratio sequence, which covers the pool evenly without a shuffle to store. Invariant: batches
follow from the seed and the step alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import corpus
from .dialogues import dialogues
from .tokens import END_OF_TEXT, train_tokenizer

Ids = npt.NDArray[np.uint16]
GOLDEN = (math.sqrt(5) - 1) / 2
Shares = dict[str, float]  # pool -> its share of the windows
Mixes = tuple[tuple[float, Shares], ...]
MIXES: Mixes = (  # from this progress on, these shares
    (0.0, {"library": 0.54, "tests": 0.20, "functions": 0.13, "dialogues": 0.13}),
    (0.6, {"library": 0.44, "tests": 0.14, "functions": 0.14, "dialogues": 0.28}),
)
ALIGNED = ("functions", "dialogues")  # their windows start where a document starts
NUM_DIALOGUES = 16_000


@dataclass(frozen=True)
class Pool:
    """ids [tokens], and where its documents start."""

    ids: Ids
    starts: npt.NDArray[np.int64]
    num_bytes: int

    def window(self, k: int, tokens: int, aligned: bool) -> Ids:
        """Window k: tokens + 1 ids, so that inputs and targets can be cut from it."""
        point = (k * GOLDEN) % 1.0
        if aligned:
            usable = self.starts[self.starts < len(self.ids) - tokens]
            start = int(usable[int(point * len(usable))])
        else:
            start = int(point * (len(self.ids) - tokens))
        return self.ids[start : start + tokens + 1]


def pool_of(tokenizer: Tokenizer, documents: Iterable[str]) -> Pool:
    """Encode documents and join them, each followed by <|endoftext|>."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = list(documents)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    lengths = np.array([0] + [len(ids) + 1 for ids in encoded], dtype=np.int64)
    ids = np.concatenate([np.array([*ids, end], dtype=np.uint16) for ids in encoded])
    return Pool(ids, np.cumsum(lengths)[:-1], sum(len(text.encode()) for text in texts))


def prepare(folder: Path) -> None:
    """Split the library, train the tokenizer and write the pools to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = corpus.split(corpus.read_library())
    library = [source.text for source in train if not source.is_test]
    tests = [source.text for source in train if source.is_test]
    functions = [text for source in train if not source.is_test for text in corpus.functions(source)]
    Random(0).shuffle(functions)
    chats = [dialogue.text() for dialogue in dialogues(0, NUM_DIALOGUES)]
    tokenizer = train_tokenizer([*library, *tests[::2], *chats[:2000]])
    tokenizer.save(str(folder / "tokenizer.json"))
    parts = {
        "library": library,
        "tests": tests,
        "functions": functions,
        "dialogues": chats,
        "held_out": [source.text for source in held_out if not source.is_test],
        "held_out_tests": [source.text for source in held_out if source.is_test],
    }
    summary = {}
    for name, texts in parts.items():
        pool = pool_of(tokenizer, texts)
        np.savez(folder / f"{name}.npz", ids=pool.ids, starts=pool.starts, num_bytes=np.array(pool.num_bytes))
        summary[name] = {"documents": len(texts), "bytes": pool.num_bytes, "tokens": len(pool.ids)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def load_pool(folder: Path, name: str) -> Pool:
    """A pool that `prepare` wrote."""
    with np.load(folder / f"{name}.npz") as file:
        return Pool(file["ids"], file["starts"], int(file["num_bytes"]))


class Batches:
    """Batches of (inputs, targets), each [rows, tokens]; `counts` is its whole state."""

    def __init__(self, pools: dict[str, Pool], seed: int = 0) -> None:
        self.pools = pools
        self.seed = seed
        self.counts = dict.fromkeys(pools, 0)

    def next(self, step: int, rows: int, tokens: int, shares: Shares) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        rng = Random(f"batch {self.seed} {step}")
        names = rng.choices(list(shares), list(shares.values()), k=rows)
        windows = []
        for name in names:
            windows.append(self.pools[name].window(self.counts[name], tokens, name in ALIGNED))
            self.counts[name] += 1
        ids = torch.from_numpy(np.stack(windows).astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
