"""How the picture of the KV cache looks under each theme, begins and ends, asks the kernel, and what it costs."""

import base64
import json
import random
from typing import Any

import pytest

from embedllm import wire
from embedllm.events import QUEUE
from embedllm.replay import State
from tests.notebook import page
from tests.notebook.page import BLUE, GREEN, ORANGE
from tests.notebook.recorded import Recording

recording, last, show = page.recording, page.last, page.show  # fixtures

# ---- looks ----------------------------------------------------------------------------------------------------------


def test_dark_and_light_and_the_notebooks_own_theme(show: Any, recording: Recording) -> None:
    background = "getComputedStyle(document.querySelector('.ekv')).backgroundColor"
    light, dark = show(), show(color_scheme="dark")
    for shown in (light, dark):
        shown.feed(recording.messages)
    assert (
        light.js(background) == "rgb(255, 255, 255)" and light.js("document.querySelector('.ekv').dataset.dark") == "0"
    )
    assert dark.js(background) == "rgb(21, 24, 28)" and dark.js("document.querySelector('.ekv').dataset.dark") == "1"
    canvas = "document.querySelector(\"[aria-label='Pool of KV blocks']\").toDataURL()"
    before = light.js(canvas)
    light.js(
        "() => { document.body.style.setProperty('--jp-layout-color0', '#101010');"
        " document.body.style.setProperty('--jp-ui-font-color0', '#ffffff'); }"
    )
    light.wait("document.querySelector('.ekv').dataset.dark === '1'")
    light.settle()
    assert light.js(background) == "rgb(16, 16, 16)" and light.js(canvas) != before


@pytest.mark.parametrize("width", [600, 700, 1280])
def test_nothing_sticks_out(show: Any, recording: Recording, width: int) -> None:
    shown = show(viewport={"width": width, "height": 900})
    shown.feed(recording.messages)
    shown.click("if it were contiguous")
    shown.click("guided tour of this recording")
    sticking = shown.js("""() => { const root = document.querySelector(".ekv").getBoundingClientRect();
      return [...document.querySelectorAll(".ekv > *:not(style), .ekv section, .ekv canvas, .ekv button, .ekv dd")]
        .filter((node) => !node.closest(".ekv-scroll, [hidden], .ekv-unseen"))
        .filter((node) => node.getBoundingClientRect().right > root.right)
        .map((node) => node.outerHTML.slice(0, 80)); }""")
    assert sticking == []
    cut = shown.js("""() => [...document.querySelectorAll(".ekv-figure dd, .ekv-figure dt")]
      .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.textContent)""")
    assert cut == []


def test_forced_colours_leave_patterns(show: Any, recording: Recording) -> None:
    shown = show(forced_colors="active")
    shown.feed(recording.messages)
    wanted = shown.js("""() => { const context = document.createElement("canvas").getContext("2d");
      for (const colour of ["Canvas", "Highlight"]) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
      return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)]; }""")
    colours = shown.js("""() => { const canvas = document.querySelector("[aria-label='Pool of KV blocks']");
      const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const pixels = new Uint32Array(image.data.buffer);
      return [...new Set(pixels)].map((p) => [p & 255, p >> 8 & 255, p >> 16 & 255]); }""")
    assert wanted in colours
    assert BLUE not in colours and GREEN not in colours and ORANGE not in colours
    assert not shown.js("matchMedia('(prefers-reduced-motion: reduce)').matches")


def test_reduced_motion_marks_nothing_while_live(show: Any) -> None:
    """A copy that just happened is signed on the layer above the pool: live only where motion is welcome."""
    state = State(8, 4)
    events: list[tuple[object, ...]] = [("step", 1, 0, 0, 40), (QUEUE, 1, 4, 4), ("allocate", 2), ("copy", 2, 5)]
    messages = [wire.encode_keyframe(state, 1), wire.encode_events(events, 2, 40)]
    marks = "[...document.querySelector('.ekv-over').getContext('2d').getImageData(0, 0, 600, 100).data].some(Boolean)"
    lively, calm = show(), show(reduced_motion="reduce")
    for shown in (lively, calm):
        shown.feed(messages)
    assert lively.js(marks) and not calm.js(marks)
    calm.click("pause the view")
    assert calm.js(marks)  # a still picture may say what changed


# ---- life -----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(show: Any, recording: Recording) -> None:
    shown = show()
    client = shown.page.context.new_cdp_session(shown.page)

    def listeners() -> list[str]:
        found = []
        for target in ("window", "document", "document.body"):
            handle = client.send("Runtime.evaluate", {"expression": target})["result"]["objectId"]
            answer = client.send("DOMDebugger.getEventListeners", {"objectId": handle})
            found += [f"{target} {one['type']}" for one in answer["listeners"]]
        return sorted(found)

    shown.js("show()")
    shown.feed(recording.messages)
    assert "document visibilitychange" in listeners()
    shown.js("window.roots = [...document.querySelectorAll('.ekv')]; window.drawn = () => roots.map(frames)")
    for end in (2, 1):
        shown.js(f"ends[{end}]()")
    assert shown.js("document.querySelectorAll('.ekv').length") == 0
    assert listeners() == []
    assert shown.js("heard['msg:custom'].length") == 1  # the session stays for views to come
    before = shown.js("drawn()")
    shown.js("tell({t: 'stats'})")
    shown.settle()
    assert shown.js("drawn()") == before
    shown.js("ends[0]()")
    assert shown.js("Object.values(heard).every((calls) => calls.length === 0)")
    assert shown.js("inside.sessions.size") == 0


def test_views_of_one_model_show_one_recording(show: Any, recording: Recording) -> None:
    """A host may hand each view its own proxy of the model; what came before the view is there all the same."""
    shown = show()
    shown.feed(recording.messages)
    shown.js("show({ ...model })")
    shown.settle()
    assert shown.js("inside.sessions.size") == 1
    steps = shown.js("[...document.querySelectorAll('.ekv')].map((root) => root.dataset.step)")
    assert steps == [str(recording.steps[-1])] * 2


def test_hidden_view_draws_nothing(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages[:50])
    shown.js("document.querySelector('.ekv').style.marginTop = '9000px'")
    shown.wait("!inside.sessions.values().next().value.views.values().next().value.visible")
    shown.settle()
    before = shown.js("frames()")
    shown.feed(recording.messages[50:])
    assert shown.js("frames()") == before
    assert shown.digest == recording.digests[-1]  # it took everything in
    shown.js("document.querySelector('.ekv').style.marginTop = '0'")
    shown.wait(f"document.querySelector('.ekv').dataset.step === '{recording.steps[-1]}'")
    assert shown.js("frames()") > before


def test_a_burst_is_drawn_once(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages[:20])
    before = shown.js("frames()")
    shown.feed(recording.messages[20:])
    assert 1 <= shown.js("frames()") - before <= 2
    assert shown.step == recording.steps[-1]


def test_gap_asks_for_a_keyframe_once(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages[:10] + recording.messages[12:40])
    assert [sent for sent in shown.js("sent") if sent["t"] == "sync"] == [
        {"t": "sync"}
    ]  # at the start; then not again at once
    assert shown.digest == recording.digests[9]
    state = State(16, 4)
    state.step = recording.steps[-1] + 5
    shown.feed([wire.encode_keyframe(state, 500)])
    assert shown.digest == state.digest() and shown.step == state.step


def test_late_view_begins_with_the_last_keyframe(show: Any, recording: Recording) -> None:
    shown = show()
    numbers = list(recording.messages[0])
    shown.js("(bytes) => model.set('keyframe', new DataView(Uint8Array.from(bytes).buffer))", numbers)
    shown.settle()
    assert shown.digest == recording.digests[0]


def test_newer_and_broken_messages_are_said(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages[:3])
    newer = bytearray(recording.messages[3])
    newer[4] = 2
    shown.feed([bytes(newer)])
    assert "made by a newer embedllm" in shown.page.locator(".ekv-note").inner_text()
    assert shown.digest == recording.digests[2]
    shown.feed(recording.messages[3:4])
    assert not shown.page.locator(".ekv-note").is_visible()
    shown.feed([recording.messages[4][:-4]])
    assert "could not be read" in shown.page.locator(".ekv-note").inner_text()
    assert shown.digest == recording.digests[3]


def test_closed_recording_can_still_be_looked_at(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    shown.js("model.set('closed', true)")
    shown.settle()
    assert "closed" in shown.page.locator(".ekv-badge").inner_text()
    assert not shown.page.get_by_role("group", name="engine").is_visible()
    shown.page.get_by_role("slider").focus()
    shown.press("Home")
    assert shown.digest == recording.at_step[shown.step] and shown.step < recording.steps[-1]


def test_static_recording_asks_nothing_of_a_kernel(show: Any, recording: Recording) -> None:
    shown = show({"static": True, "closed": True})
    shown.feed(recording.messages)
    assert shown.js("sent") == []
    assert "recorded" in shown.page.locator(".ekv-badge").inner_text()
    assert shown.page.get_by_role("button", name="engine").count() == 0
    shown.page.get_by_role("img", name="Pool of KV blocks").focus()
    shown.press("ArrowRight", "Enter")
    assert not shown.page.get_by_role("button", name="show the tokens").is_visible()


# ---- questions to the kernel ---------------------------------------------------------------------------------------


def test_engine_controls_say_when_they_wait(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    group = shown.page.get_by_role("group", name="engine")
    shown.click("engine: pause")
    assert shown.js("sent").count({"t": "engine", "do": "pause"}) == 1
    assert "queued: a cell is running" in group.inner_text()
    shown.js("tell({t: 'done', of: {t: 'engine', do: 'pause'}})")
    shown.settle()
    assert "queued" not in group.inner_text() and "the engine is paused" in group.inner_text()
    sequence = shown.js("inside.orderOf(player().state)[0].id")
    shown.click(f"engine: cancel sequence {sequence}")
    assert shown.js("sent").count({"t": "cancel", "sequence": sequence}) == 1
    shown.js("tell({t: 'done', of: {t: 'cancel'}, error: 'the engine is closed'})")
    shown.settle()
    assert "the engine is closed" in group.inner_text()


def test_stop_only_where_the_host_can(show: Any, recording: Recording) -> None:
    shown = show()
    assert shown.page.get_by_role("button", name="stop the running cell").count() == 0
    shown.js("() => { window.stopped = 0; model.widget_manager = { kernel: { interrupt: () => { stopped++; } } }; }")
    shown.js("ends.pop()()")
    shown.js("show()")
    shown.feed(recording.messages[:3])
    shown.click("stop the running cell")
    assert shown.js("stopped") == 1
    # A host that forbids even looking has no button, and a view all the same.
    shown.js("Object.defineProperty(model, 'widget_manager', { get() { throw new Error('no'); } })")
    shown.js("ends.pop()()")
    shown.js("show()")
    shown.settle()
    assert shown.page.get_by_role("button", name="stop the running cell").count() == 0


def test_hostile_text_stays_text(show: Any, recording: Recording) -> None:
    attack = '<img src=x onerror="window.owned=1"><script>window.owned=2</script><b>bold</b> \u202e http://x.invalid'
    shown = show({"info": {"model": attack, "device": attack, "dtype": attack}})
    shown.feed(recording.messages)
    shown.page.get_by_role("img", name="Pool of KV blocks").focus()
    shown.press("ArrowRight", "Enter")
    shown.click("show the tokens of this block as text")
    assert shown.js("sent").count({"t": "text", "block": 0}) == 1
    shown.js("(text) => tell({t: 'text', block: 0, text})", attack)
    shown.js("(text) => tell({t: 'done', of: {t: 'cancel'}, error: text})", attack)
    shown.settle()
    assert shown.page.locator(".ekv-text").text_content() == attack
    assert shown.js("document.querySelectorAll('.ekv img, .ekv script, .ekv b:not(.ekv-seq b), .ekv a').length") == 0
    assert shown.js("window.owned") is None


def test_acknowledges_what_is_seen(show: Any, recording: Recording) -> None:
    shown = show()
    shown.settle()
    shown.feed(recording.messages[:1])
    number = int.from_bytes(recording.messages[0][12:16], "little")
    assert {"t": "ack", "n": number} in shown.js("sent")


# ---- cost -----------------------------------------------------------------------------------------------------------


def busy_pool(num_blocks: int, num_sequences: int, num_steps: int, num_changes: int) -> list[bytes]:
    """A keyframe, a message that fills the pool, and one per step in which some blocks change hands."""
    r = random.Random(1)
    state = State(num_blocks, 16)
    each = num_blocks * 3 // 4 // num_sequences
    events: list[tuple[object, ...]] = [("step", 1, num_sequences, num_sequences, 1)]
    for s in range(num_sequences):
        blocks = range(s * each, (s + 1) * each)
        events += [(QUEUE, s, 16 * each - 9, 64), *(("allocate", block) for block in blocks)]
        events += [("table", s, *blocks), ("admit", s, s, 0), ("commit", s, 16 * each - 9, 1)]
    spare = range(num_sequences * each, num_blocks)
    for block in spare:
        events += [("allocate", block), ("cache", block, block + 1), ("idle", block)]
    messages = [wire.encode_keyframe(state, 1), wire.encode_events(events, 2, 1)]
    for step in range(2, num_steps + 2):
        change: list[tuple[object, ...]] = [("step", step, 1, 1, step * 30_000)]
        for block in r.sample(spare, num_changes):
            change += [("evict", block, 1), ("allocate", block), ("cache", block, block + 1), ("idle", block)]
        messages.append(wire.encode_events(change, step + 1, step * 30_000))
    return messages


@pytest.mark.serial
def test_a_large_pool_is_drawn_in_time(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [base64.b64encode(message).decode() for message in busy_pool(65_536, 64, 60, 100)]
    shown = show()
    shown.js("feed", messages[:2])
    shown.settle()
    times: dict[str, list[list[float]]] = {}
    for mode in ("state", "sequence", "age"):
        shown.click(f"colour by {mode}")
        times[mode] = []
        for message in messages[2:22] if mode == "state" else messages[22:42] if mode == "sequence" else messages[42:]:
            shown.js("feed", [message])
            shown.settle()
            data = json.loads(shown.js("JSON.stringify(document.querySelector('.ekv').dataset)"))
            times[mode].append([float(data["poolMs"]), float(data["drawMs"])])
    medians = {
        mode: [sorted(column)[len(column) // 2] for column in zip(*rows, strict=True)] for mode, rows in times.items()
    }
    with capsys.disabled():
        text = ", ".join(f"{mode} {pool:.1f} ({all_:.1f} all of the view)" for mode, (pool, all_) in medians.items())
        print(f"\n65,536 blocks, ms per frame, medians: {text}")
    assert medians["state"][0] < 15 and medians["sequence"][0] < 15 and medians["age"][0] < 15


@pytest.mark.slow
@pytest.mark.serial
def test_memory_stays_flat(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """10 minutes at 10 messages a second: 3,000 messages, then 3,000 more. The history is bounded, so the heap is."""
    messages = busy_pool(512, 16, 6_000, 12)
    shown = show()
    shown.js("() => { player().maxBytes = 2 ** 20; }")  # a history that is full before the first half is over
    client = shown.page.context.new_cdp_session(shown.page)
    sizes = []
    for begin in (0, 3_000):
        for at in range(begin, begin + 3_000, 100):
            shown.feed(messages[at : at + 100])
        shown.settle()
        client.send("HeapProfiler.collectGarbage")
        usage = client.send("Runtime.getHeapUsage")
        sizes.append(usage["usedSize"] + usage.get("backingStorageSize", 0))
    assert shown.step == 5_999
    with capsys.disabled():
        print(f"\nheap after 3,000 messages {sizes[0] / 1e6:.1f} MB, after 6,000 {sizes[1] / 1e6:.1f} MB")
    assert sizes[1] < 1.2 * sizes[0]
