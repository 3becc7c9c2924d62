"""The sampler with edits and draws on the interpreted kernels: the tokens of its way on the host."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import embedllm.sampler
from embedllm.choice import Choice
from embedllm.edits import pack_ids
from embedllm.params import SamplingParams
from embedllm.sampler import Sampler
from embedllm.structured.follower import Follower

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


ASKED = [
    SamplingParams(temperature=0.0, repetition_penalty=1.8, presence_penalty=0.5),
    SamplingParams(temperature=0.9, frequency_penalty=1.5, min_tokens=6, stop_token_ids=[3, 4]),
    SamplingParams(temperature=0.8, top_p=0.9, logit_bias={3: 4.0, 9: -4.0}),
    SamplingParams(temperature=1.0, allowed_token_ids=[1, 3, 5, 7, 40]),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, bad_words=["a"]),
    SamplingParams(
        temperature=0.7, frequency_penalty=1.0, logits_processor=lambda prompt, output, x: x.roll(len(output))
    ),
    SamplingParams(temperature=0.9, structured={"regex": "a"}, allowed_token_ids=range(30)),
    SamplingParams(temperature=0.0, structured={"regex": "a"}, logits_processor=lambda prompt, output, x: -x),
]


class Thirds(Follower):
    """A shape of which every third id is a part, other ones each time."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def fill(self, row: NDArray[np.int32]) -> None:
        row[:] = pack_ids(range(len(self._tokens) % 3, 41, 3), 41)


def sampled(sampler: Sampler, test_seed: int, lag: int) -> list[list[int]]:
    """Each row's output after 14 steps over 41 ids. With a lag, a step is launched before the last one is read."""
    generator = torch.Generator().manual_seed(test_seed)
    rows = [row for row, params in enumerate(ASKED) if not (lag and sampler.is_stepwise(params))]
    live = {row: [2, 3, 900] for row in rows}

    def bind() -> None:
        for row in rows:
            shape = Thirds(live[row]) if ASKED[row].structured else None
            sampler.bind(row, ASKED[row], live[row], 3, row, 0, [4], [[5], [7, 3], [3, 7]] if row == 5 else [], shape)

    def read(choice: Choice) -> None:
        for row, token in zip(rows, choice.read().tokens, strict=True):
            live[row].append(token)

    bind()
    flying: list[Choice] = []
    for step in range(14):
        if step == 9:  # as after a fault: nothing is in flight, and whatever was counted counts no more
            while flying:
                read(flying.pop(0))
            sampler.launch(torch.randn((len(rows), 41)), rows, [3 + step] * len(rows))
            bind()
        logits = torch.randn((len(ASKED), 41), generator=generator)[: len(rows)]
        flying.append(sampler.launch(logits, rows, [3 + step] * len(rows)))
        if len(flying) > lag:
            read(flying.pop(0))
    while flying:
        read(flying.pop(0))
    return [live[row][3:] for row in rows]


@pytest.mark.parametrize("lag", [0, 1])
def test_edits_where_the_logits_are(lag: int, monkeypatch: pytest.MonkeyPatch, test_seed: int) -> None:
    """Penalties count, and everything else is asked for, without the host: its tokens are those of the host's way."""
    expected = sampled(Sampler(len(ASKED), 41), test_seed, 0)
    monkeypatch.setattr(embedllm.sampler, "on_gpu", lambda device: True)
    sampler = Sampler(len(ASKED), 41)
    found = sampled(sampler, test_seed, lag)
    assert found == (expected[:5] if lag else expected)
    assert [sampler.is_stepwise(params) for params in ASKED] == [False] * 5 + [True] * 4
    for row in (7, 8):
        assert all(token % 3 == step % 3 for step, token in enumerate(expected[row])) and len(set(expected[row])) > 3
    assert max(expected[7]) < 30
    assert set(expected[3]) <= {1, 3, 5, 7, 40} and not {3, 4} & set(expected[1][:6]) and 5 not in expected[5]


def test_rows_that_need_the_host_keep_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a logits_processor does is done when the step is read, after everybody's next step may have been queued."""
    called: list[int] = []

    def look(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        called.append(len(output))
        return logits

    sampler = Sampler(3, 41)
    for row, params in enumerate(
        [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, logits_processor=look)]
    ):
        sampler.bind(row, params, [1, 2], 2, row, 0)
    logits = torch.randn((2, 41), generator=torch.Generator().manual_seed(1))
    choice = sampler.launch(logits, [0, 1])
    assert not called and choice.ids[0] == logits[0].argmax()
    assert choice.read().tokens[0] == int(logits[0].argmax()) and called == [0]
    choice = sampler.launch(logits, [0, 1])
    sampler.release(1)  # its request was cancelled meanwhile: nothing of its caller's runs any more
    assert choice.read().failures == {} and called == [0]
