"""Captured steps with a device that is not there: a replay runs what was captured again, on the same tensors.

The model is a real decoder on the interpreted kernels, so padding, tables and ids from the device are what a card would
see. What only a card can show (that capturing works at all) is in tests/gpu.
"""

from array import array
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from embedllm import ops
from embedllm.graphs import DecodeGraphs
from embedllm.plan_types import UNKNOWN, Entry, Plan
from embedllm.runner import Runner
from tests.kernels.test_triton_model import BLOCK, MODELS, make

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


class Again:
    """Captures by remembering what to run."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self.error: Exception | None = None

    def __call__(self, run: Callable[[], None]) -> "Again.Step":
        if self.error is not None:
            raise self.error
        run()
        self.num_captured += 1
        return Again.Step(self, run)

    class Step:
        def __init__(self, owner: "Again", run: Callable[[], None]) -> None:
            self._owner, self._run = owner, run

        def replay(self) -> None:
            self._owner.num_replayed += 1
            self._run()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "on_gpu", lambda device: True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def part(row: int, start: int, tokens: list[int], blocks: list[int], logits: int = 1) -> Entry:
    return Entry(row, 0, row, start, tokens, 0, logits, array("i", blocks))


TABLES = [[7, 2, 11, 4], [5, 30, 8], [1, 9, 3, 6]]
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3, 5, 8, 9, 7]]


def decode(runner: Runner, num_steps: int, ahead: bool = False) -> list[Tensor]:
    """Three prompts of different lengths and some steps of decoding; each token is the likeliest."""
    entries = [part(row, 0, prompt, TABLES[row]) for row, prompt in enumerate(PROMPTS)]
    found = [runner(Plan(0, entries)).logits.clone()]
    for step in range(num_steps):
        ids = found[-1].argmax(1)
        runner.remember([0, 1, 2], ids)
        known = [UNKNOWN] * 3 if ahead else ids.tolist()
        entries = [part(row, len(PROMPTS[row]) + step, [known[row]], TABLES[row]) for row in range(3)]
        found.append(runner(Plan(step + 1, entries)).logits.clone())
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("ahead", [False, True], ids=["known ids", "ids from the device"])
def test_a_replay_computes_what_the_plan_says(name: str, ahead: bool) -> None:
    expected = decode(make(MODELS[name]), 5)
    runner, capture = make(MODELS[name]), Again()
    runner.capture(capture)
    found = decode(runner, 5, ahead)
    assert (capture.num_captured, capture.num_replayed) == (1, 4), "the second step of a size is captured and replayed"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_padding_writes_nothing() -> None:
    """Three sequences run in a step of four: no block but theirs is touched."""
    runner = make(MODELS["llama"])
    runner.capture(Again())
    decode(runner, 4)
    blocks = runner.kv_cache.blocks
    held = {block for table in TABLES for block in table}
    for block in range(len(blocks)):
        assert block in held or blocks[block].isnan().all(), f"block {block} was written"


def test_what_is_no_uniform_decode_runs_as_it_comes() -> None:
    runner, capture = make(MODELS["llama"]), Again()
    runner.capture(capture)
    decode(runner, 2)
    replayed = capture.num_replayed
    runner(Plan(9, [part(0, 8, [1], TABLES[0]), part(1, 3, [1, 2], TABLES[1])]))  # a chunk beside
    runner(Plan(9, [part(0, 8, [1], TABLES[0], logits=0)]))  # nobody wants its logits
    asks = part(0, 8, [1], TABLES[0])
    asks.wants_hidden = True
    runner(Plan(9, [asks]))
    assert capture.num_replayed == replayed


def test_each_size_is_captured_once() -> None:
    runner, capture = make(MODELS["llama"]), Again()
    runner.capture(capture)
    decode(runner, 1)
    for _ in range(3):
        for rows in ([0], [0, 1], [0, 1, 2]):  # sizes 1, 2 and 4
            runner(Plan(1, [part(row, len(PROMPTS[row]), [3], TABLES[row]) for row in rows]))
    assert capture.num_captured == 3


def test_where_capturing_fails_steps_run_uncaptured(caplog: pytest.LogCaptureFixture) -> None:
    expected = decode(make(MODELS["llama"]), 4)
    runner, capture = make(MODELS["llama"]), Again()
    runner.capture(capture)
    capture.error = RuntimeError("operation not permitted when stream is capturing")
    found = decode(runner, 4)
    assert "could not be captured" in caplog.text
    capture.error = None
    decode(runner, 3)
    assert capture.num_captured == 0, "it is not tried again"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_closing_drops_what_was_captured() -> None:
    runner = make(MODELS["llama"])
    runner.capture(Again())
    decode(runner, 3)
    graphs = runner._graphs
    assert isinstance(graphs, DecodeGraphs) and len(graphs) == 1
    runner.close()
    assert len(graphs) == 0 and runner._graphs is None


def test_a_copy_is_made_before_the_replay() -> None:
    """A fork's block is a copy of its parent's: the step that writes to it sees the parent's tokens."""
    runner = make(MODELS["llama"])
    runner.capture(Again())
    decode(runner, 2)
    entry = part(0, 6, [4], [7, 2, 11])
    expected = runner(Plan(1, [entry])).logits.clone()
    copied = part(0, 6, [4], [7, 31, 11])
    runner.kv_cache.blocks[31] = torch.nan
    assert BLOCK == 4
    found = runner(Plan(2, [copied], [(2, 31)])).logits
    torch.testing.assert_close(found, expected)
