"""The text monitor: what it draws is what the engine holds, within the size it was given, and it harms nothing."""

import io
import re
import threading
import time
from array import array
from xml.etree import ElementTree

import pytest

import embedllm
from embedllm import testing
from embedllm.monitor import Monitor
from embedllm.replay import RUNNING, SequenceState, State
from embedllm.text_picture import FREE, IDLE, LEVELS, PINNED, SHARED, pool_lines

SGR = re.compile(r"\x1b\[[0-9;]*m")


def view(sequence_id: int, blocks: list[int], num_computed: int) -> SequenceState:
    return SequenceState(
        sequence_id, RUNNING, 8, num_computed - 8, 64, num_computed=num_computed, blocks=array("i", blocks)
    )


def moment(
    num_blocks: int, sequences: tuple[SequenceState, ...], idle: tuple[int, ...] = (), pinned: tuple[int, ...] = ()
) -> State:
    state = State(num_blocks, 16)
    state.sequences = {sequence.id: sequence for sequence in sequences}
    state.pins = {1: array("i", pinned)}
    for block in [*pinned, *(block for sequence in sequences for block in sequence.blocks)]:
        state.refs[block] += 1
    for block in idle:
        state.node[block] = 1 + block
    return state


def test_every_kind_of_block_has_its_character() -> None:
    shown = moment(10, (view(0, [0, 1, 2], 40), view(1, [0, 1, 4], 33)), idle=(5, 6), pinned=(7,))
    assert pool_lines(shown, 10, 1, ansi=False) == [SHARED * 2 + "a" + FREE + "b" + IDLE * 2 + PINNED + FREE * 2]


def test_height_of_a_block_is_its_fill() -> None:
    shown = moment(4, (view(3, [0, 1, 2], 16 + 8 + 0),))
    line = SGR.sub("", pool_lines(shown, 4, 1, ansi=True)[0])
    assert line == LEVELS[7] + LEVELS[3] + LEVELS[0] + FREE


def test_a_large_pool_is_drawn_in_groups() -> None:
    shown = moment(1_000, (view(0, list(range(100)), 1_600),), idle=(999,))
    lines = pool_lines(shown, 10, 2, ansi=False)
    assert lines == ["aa" + FREE * 8, FREE * 9 + IDLE]
    assert "".join(pool_lines(shown, 7, 3, ansi=False)) == "aaa" + FREE * 17 + IDLE  # 48 blocks each, the last has 40


@pytest.fixture
def busy() -> embedllm.LLM:
    with embedllm.LLM(
        testing.ScriptedModel(lambda prompt: [1] * 400, delay=0.002), num_kv_blocks=300, max_num_seqs=4
    ) as llm:
        yield llm


@pytest.mark.parametrize(("width", "height"), [(40, 6), (80, 24), (133, 50)])
@pytest.mark.parametrize("ansi", [False, True])
def test_frame_keeps_its_size(busy: embedllm.LLM, width: int, height: int, ansi: bool) -> None:
    handles = [busy.submit([1] * 50, max_tokens=300) for _ in range(9)]
    monitor = busy.monitor()
    while not busy.stats().num_requests_running:
        time.sleep(0.001)
    for _ in range(2):
        frame = monitor.frame(width, height, ansi)
        assert ("\x1b" in frame) is ansi
        lines = SGR.sub("", frame).split("\n")
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
    assert lines[0].startswith("running 4 · waiting 5")
    assert len(handles) == 9


def test_picture_agrees_with_the_stats(busy: embedllm.LLM) -> None:
    handle = busy.submit([1] * 40, max_tokens=200, n=2)
    monitor = busy.monitor()
    while handle.num_tokens < 20:
        time.sleep(0.001)
    shown = monitor.look()
    held = {block for sequence in shown.state.running for block in sequence.blocks}
    assert len(held) == round(shown.stats.kv_cache_usage * shown.stats.num_kv_blocks) > 0
    assert {sequence.state for sequence in shown.state.sequences.values()} == {RUNNING} and len(shown.running) == 2
    assert SHARED in monitor.draw(shown)  # the two samples share the prompt
    assert "2 blocks" not in monitor.draw(shown).split("\n")[0]


def test_pins_are_drawn(busy: embedllm.LLM) -> None:
    with busy.cache.pin([1] * 64):
        assert str(busy.monitor()).count(PINNED) == 4 + 1  # and once in the legend
    assert str(busy.monitor()).count(PINNED) == 1


def test_too_small_a_frame_is_refused(busy: embedllm.LLM) -> None:
    with pytest.raises(embedllm.errors.InvalidRequest, match="39 columns by 5 lines: a picture needs 40 by 6"):
        busy.monitor().frame(39, 5)


def test_a_still_picture_is_one_document_without_script_or_links(busy: embedllm.LLM) -> None:
    with busy.cache.pin([2] * 64):
        handles = [busy.submit([1] * 50, max_tokens=300, n=2) for _ in range(3)]
        while busy.stats().num_requests_running < 4:
            time.sleep(0.001)
        root = ElementTree.fromstring(busy.monitor().to_svg())
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags == {"svg", "title", "desc", "defs", "pattern", "rect", "path", "circle", "text"}
    names = {name for element in root.iter() for name in element.attrib}
    assert not {name for name in names if "href" in name or name.startswith("on")}
    words = "".join(root.itertext())
    assert "running 4" in words and "sequence 3" in words and len(handles) == 3


def test_show_prints_frames_and_ends(busy: embedllm.LLM) -> None:
    out = io.StringIO()
    busy.monitor().show(seconds=0.05, hz=50, file=out)
    assert 2 <= out.getvalue().count("running 0") <= 5
    assert "\x1b" not in out.getvalue()


def test_show_ends_when_the_llm_is_closed() -> None:
    llm = embedllm.LLM(testing.HashLM())
    out = io.StringIO()
    watching = threading.Thread(target=llm.monitor().show, kwargs={"hz": 60, "file": out})
    watching.start()
    while not out.getvalue():
        time.sleep(0.001)
    llm.close()
    watching.join(5)
    assert not watching.is_alive()


def test_show_draws_over_the_last_frame_on_a_terminal(busy: embedllm.LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return 1

    monkeypatch.setattr("os.get_terminal_size", lambda fd: __import__("os").terminal_size((80, 24)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    busy.monitor().show(seconds=0.03, hz=50, file=out)
    text = out.getvalue()
    assert text.startswith("\x1b[?25l") and text.endswith("\x1b[?25h")
    num_lines = len(busy.monitor().frame(79, 23).split("\n"))
    assert f"\x1b[{num_lines}F" in text


def test_watching_changes_no_token(busy: embedllm.LLM) -> None:
    model = testing.HashLM()
    with embedllm.LLM(model, num_kv_blocks=64) as llm:
        monitor = llm.monitor()
        assert isinstance(monitor, Monitor)
        prompts = [[i, 2, 3] for i in range(8)]
        handles = [llm.submit(prompt, max_tokens=40) for prompt in prompts]
        while not all(handle.done for handle in handles):
            monitor.frame()
        assert [h.tokens for h in handles] == [model.expected(prompt, 40) for prompt in prompts]
