"""The picture of the KV cache in a real browser, without a notebook: a page, and a model that is none of Jupyter's.

Each file of the view's tests names the fixtures that it takes from here.
"""

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from embedllm import wire
from embedllm.events import COPY, EVICT, PREEMPT, STEP
from embedllm.replay import State
from embedllm.view import module
from tests.notebook.recorded import Recording, run

SIZE = {"width": 1280, "height": 1200}
# A model as the widget standard has it, and a page that can see what the module keeps to itself.
SETTING = """async ([source, traits]) => {
  const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  window.inside = await import(url);
  window.heard = {};
  window.sent = [];
  window.model = {
    get: (name) => traits[name], set: (name, value) => { traits[name] = value; model.emit(`change:${name}`); },
    save_changes() {}, send: (content) => sent.push(content),
    on: (name, call) => (heard[name] ??= []).push(call),
    off: (name, call) => { heard[name] = (heard[name] ?? []).filter((other) => other !== call); },
    emit: (name, ...values) => (heard[name] ?? []).forEach((call) => call(...values)),
  };
  window.ends = [await inside.default.initialize({ model })];
  window.show = async (given = model) => {
    const el = document.createElement("div");
    document.body.prepend(el); // where it is in sight
    ends.push(await inside.default.render({ model: given, el }));
    const view = [...[...inside.sessions].at(-1).views].at(-1);
    while (!view.visible) await new Promise(requestAnimationFrame);
  };
  window.feed = (messages) => {
    for (const text of messages) {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      model.emit("msg:custom", { t: "b" }, [new DataView(bytes.buffer)]);
    }
  };
  window.tell = (content) => model.emit("msg:custom", content, []);
  window.player = () => [...inside.sessions][0].player;
  window.frames = (root = document.querySelector(".ekv")) => Number(root.dataset.frames);
}"""
INSIDE = "\nexport { sessions, OPS, orderOf, bracketsOf, tourStops };"
PIXEL = """([x, y]) => {
  const canvas = document.querySelector("[aria-label='Pool of KV blocks']"), box = canvas.getBoundingClientRect();
  const image = canvas.getContext("2d").getImageData(Math.round(x - box.left), Math.round(y - box.top), 1, 1);
  return [...image.data.slice(0, 3)];
}"""
BLUE, GREEN, ORANGE = [0, 114, 178], [0, 158, 115], [230, 159, 0]


@pytest.fixture(scope="module")
def recording() -> Recording:
    """240 steps with shared prefixes, forks, copies, eviction and preemption, in a pool of 64 blocks."""
    found = run(3, 240, resizing=False)
    assert all(found.counts.get(name) for name in (PREEMPT, EVICT, COPY)), found.counts
    return found


@pytest.fixture(scope="module")
def last(recording: Recording) -> State:
    """What is so at the end of the recording, by Python's replay."""
    state: State | None = None
    for message in wire.decode_all(b"".join(recording.messages)):
        if message.state is not None:
            state = message.state
        else:
            assert state is not None
            state.apply(message.events)
    assert state is not None
    return state


def timed(messages: list[bytes], interval: int) -> list[bytes]:
    """The same with a step every `interval` microseconds."""
    found = []
    for number, message in enumerate(wire.decode_all(b"".join(messages)), 1):
        if message.state is not None:
            message.state.time = message.state.step * interval
            found.append(wire.encode_keyframe(message.state, number))
        else:
            events = [(*e[:4], e[1] * interval) if e[0] == STEP else e for e in message.events]
            found.append(wire.encode_events(events, number, 0))
    return found


class Shown:
    """One page with a view. Whatever the page complains of fails the test."""

    def __init__(self, page: Any, traits: dict[str, object]) -> None:
        self.page, self.complaints = page, list[str]()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith("blob:") else self.complaints.append(asked.url))
        page.evaluate(SETTING, [module() + INSIDE, {"info": {"model": "toy"}, "closed": False, **traits}])
        self.js("show()")

    def js(self, expression: str, argument: object = None) -> Any:
        return self.page.evaluate(expression, argument)

    def feed(self, messages: list[bytes]) -> None:
        self.js("feed", [base64.b64encode(message).decode() for message in messages])
        self.settle()

    def settle(self) -> None:
        """Waits until everything asked for is drawn."""
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def wait(self, condition: str) -> None:
        self.page.wait_for_function(condition, timeout=20_000)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()
        self.settle()

    @property
    def step(self) -> int:
        return int(self.js("document.querySelector('.ekv').dataset.step"))

    @property
    def digest(self) -> int:
        return int(self.js("player().state.digest()"))

    @property
    def card(self) -> str:
        return str(self.page.locator(".ekv-card").inner_text())

    def squares(self, every: int = 1) -> dict[int, tuple[float, float]]:
        """Where blocks lie: their ids, as the tooltip names them, and the middle of their squares in the page."""
        box = self.page.get_by_role("img", name="Pool of KV blocks").bounding_box()
        found: dict[int, tuple[float, float]] = {}
        for row in range(int(box["height"] // 32)):
            for column in range(0, int((box["width"] - 44) // 32), every):
                x, y = box["x"] + 44 + 32 * column + 14.5, box["y"] + 3 + 32 * row + 14.5
                self.page.mouse.move(x, y)
                self.settle()
                if self.page.locator(".ekv-card").is_visible():
                    found[int(self.card.split()[1])] = (x, y)
        return found


@pytest.fixture
def show(browser: Any) -> Iterator[Any]:
    """show(traits, **what the browser emulates) -> Shown."""
    opened: list[tuple[Any, Shown]] = []

    def open_page(traits: dict[str, object] | None = None, **emulated: Any) -> Shown:
        context = browser.new_context(**{"viewport": SIZE, **emulated})
        page = context.new_page()
        page.goto("about:blank")
        opened.append((context, Shown(page, traits or {})))
        return opened[-1][1]

    yield open_page
    complaints = [complaint for _, shown in opened for complaint in shown.complaints]
    for context, _ in opened:
        context.close()
    assert not complaints
