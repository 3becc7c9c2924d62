"""What the picture of the KV cache shows, and how hands and ears get at it, in a real browser."""

from typing import Any

from embedllm import wire
from embedllm.events import COPY, PREEMPT, QUEUE
from embedllm.replay import State
from tests.notebook import page
from tests.notebook.page import BLUE, GREEN, ORANGE, PIXEL, timed
from tests.notebook.recorded import Recording

recording, last, show = page.recording, page.last, page.show  # fixtures

# ---- what is drawn ----------------------------------------------------------------------------------------------


def test_squares_show_what_the_engine_had(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    assert shown.digest == recording.digests[-1] == last.digest()
    partly = last.filled()
    seen = set()
    squares = shown.squares(every=3)
    assert len(squares) > 15
    for block, (x, y) in squares.items():
        colour = shown.js(PIXEL, [x, y + 11])  # near the bottom, where a square that holds anything is filled
        if last.refs[block] > 0 and partly.get(block, 4) > 0:
            expected = GREEN if last.refs[block] > 1 else BLUE
            assert colour == expected, block
            seen.add("shared" if last.refs[block] > 1 else "used")
        elif last.refs[block] == 0 and last.node[block]:
            row = [shown.js(PIXEL, [x + dx, y]) for dx in range(6)]
            assert ORANGE in row and any(other != ORANGE for other in row), block  # hatched: colour and gaps
            seen.add("idle")
    assert len(seen) >= 2
    shown.page.mouse.move(0, 0)


def test_figures_are_those_of_the_moment(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    figures = shown.page.locator(".ekv-figures").inner_text()
    free = sum(1 for refs, node in zip(last.refs, last.node, strict=True) if not refs and not node)
    assert f"{last.num_used} of {last.num_blocks}" in figures
    assert abs(float(figures.split("%")[0].split()[-1]) - 100 * last.num_used / last.num_blocks) <= 0.051
    assert f"Free\n{free} blocks" in figures.replace("\n ", " ")
    assert f"Running\n{len(last.running)}" in figures
    shown.js("tell({t: 'stats', time_to_first_token: {p50: 0.125, p99: 2.5}, queue_time: {p50: 0.004, p99: 0.03}})")
    shown.settle()
    figures = shown.page.locator(".ekv-figures").inner_text()
    assert "125 ms / 2.50 s" in figures and "4 ms / 30 ms" in figures
    titles = shown.js("[...document.querySelectorAll('.ekv-figure')].map((node) => node.title).join()")
    for name in ("kv_cache_usage", "prefix_cache_hits", "num_requests_running", "num_preemptions", "kv_cache_waste"):
        assert name in titles


def test_scrubbing_back_shows_what_was(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    pixels = "document.querySelector(\"[aria-label='Pool of KV blocks']\").toDataURL()"
    newest = shown.js(pixels)
    slider = shown.page.get_by_role("slider", name="Step shown")
    box = slider.bounding_box()
    shown.page.mouse.click(box["x"] + box["width"] * 0.4, box["y"] + 60)
    shown.settle()
    earlier = shown.step
    assert recording.steps[0] < earlier < recording.steps[-1]
    assert shown.digest == recording.at_step[earlier]
    assert shown.js(pixels) != newest
    shown.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert shown.step == earlier + 1 and shown.digest == recording.at_step[earlier + 1]
    shown.press("Shift+ArrowLeft")
    assert shown.step == earlier - 9 and shown.digest == recording.at_step[earlier - 9]
    assert slider.get_attribute("aria-valuenow") == str(earlier - 9)
    assert slider.get_attribute("aria-valuetext").startswith(f"step {earlier - 9} of {recording.steps[-1]}, ")
    shown.press("Home")
    assert shown.digest == recording.at_step[shown.step]
    shown.press("End")
    assert shown.step == recording.steps[-1] and shown.js(pixels) == newest


def test_paused_view_stays_while_messages_come(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages[:100])
    shown.click("pause the view")
    paused = shown.step
    shown.feed(recording.messages[100:])
    assert shown.step == paused and "paused" in shown.page.locator(".ekv-badge").inner_text()
    shown.click("go to the newest step")
    assert shown.step == recording.steps[-1] and "live" in shown.page.locator(".ekv-badge").inner_text()


def test_replay_runs_to_the_end(show: Any, recording: Recording) -> None:
    shown = show({"closed": True, "static": True})
    shown.feed(timed(recording.messages, 30_000))
    shown.click("play")
    assert shown.step < recording.steps[0] + 100 and "replay 1×" in shown.page.locator(".ekv-badge").inner_text()
    step, digest = shown.js("[player().state.step, player().state.digest()]")
    assert digest == recording.at_step[step]
    shown.page.get_by_label("speed of the replay").select_option("8")
    shown.wait(f"document.querySelector('.ekv').dataset.step === '{recording.steps[-1]}'")
    assert shown.digest == recording.digests[-1]


def test_pointing_lights_both_sides(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    owned = {block: s.id for s in last.running for block in s.blocks}
    block, (x, y) = next((block, at) for block, at in shown.squares(every=2).items() if block in owned)
    shown.page.mouse.move(0, 0)
    shown.settle()
    tables = "document.querySelector(\"[aria-label='Block tables of the sequences']\")"
    above = "document.querySelector('.ekv-over')"
    before = [shown.js(f"{canvas}.toDataURL()") for canvas in (tables, above)]
    shown.page.mouse.move(x, y)
    shown.settle()
    assert all(shown.js(f"{canvas}.toDataURL()") != old for canvas, old in zip((tables, above), before, strict=True))
    assert f"#{owned[block]} (its " in shown.card
    assert f"references\n{last.refs[block]}" in shown.card
    # and from a table's cell to the pool: its first row's first cell
    shown.page.mouse.move(0, 0)
    shown.settle()
    first = shown.js("inside.orderOf(player().state)[0]")
    box = shown.page.get_by_role("img", name="Block tables of the sequences").bounding_box()
    shown.page.mouse.move(box["x"] + 212, box["y"] + 36)
    shown.settle()
    assert shown.card.startswith(f"Block {first['blocks'][0]}")
    assert shown.js(f"{above}.toDataURL()") != before[1]


def test_a_cell_is_as_full_as_its_block(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    rows = shown.js("inside.orderOf(player().state)")
    # Left and right end of each cell in sight, below its corner: equal where the block is full.
    ends = shown.js(
        """(rows) => { const canvas = document.querySelector("[aria-label='Block tables of the sequences']");
      const context = canvas.getContext("2d");
      const at = (x, y) => [...context.getImageData(x, y, 1, 1).data.slice(0, 3)].join();
      return rows.slice(0, 9).map(({ blocks }, row) =>
        blocks.map((_, i) => [202 + 26 * i, 220 + 26 * i].map((x) => at(x, 22 + 30 * row + 22)))); }""",
        rows,
    )
    seen = set()
    for row, cells in zip(rows, ends, strict=False):
        for i, (left, right) in enumerate(cells):
            filled = min(last.block_size, max(0, row["numComputed"] - i * last.block_size))
            assert (left == right) == (filled in (0, last.block_size)), (row["id"], i)
            seen.add(filled in (0, last.block_size))
    assert seen == {True, False}


def test_rows_that_share_stand_together(show: Any) -> None:
    shown = show()
    rows = [{"blocks": blocks} for blocks in ([7, 8, 1], [7, 8, 2, 4], [7, 8, 2, 5], [9], [9], [])]
    found = shown.js("(rows) => inside.bracketsOf(rows)", rows)
    spans = {(one["from"], one["to"], one["start"], one["end"]) for one in found}
    assert spans == {(0, 3, 0, 2), (1, 3, 2, 3), (3, 5, 0, 1)}


def test_tour_stops_at_what_happened(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    titles = {stop["title"] for stop in shown.js("inside.tourStops(player().events(player().first, player().last))")}
    assert {"A sequence is preempted", "An old block is evicted", "A fork copies one block"} <= titles
    assert len(titles) <= 8
    shown.click("guided tour of this recording")
    region = shown.page.get_by_role("region", name="Guided tour")
    stops = [region.inner_text()]
    while shown.page.get_by_role("button", name="next stop").is_enabled():
        shown.click("next stop")
        stops.append(region.inner_text())
        assert f"step {shown.step:,}" in stops[-1]
        assert shown.digest == recording.at_step[shown.step]
    assert len(stops) == len(titles)
    # What never happened has no stop.
    quiet = [e for e in shown.js("player().events(player().first, player().last)") if e["name"] not in (PREEMPT, COPY)]
    titles = {stop["title"] for stop in shown.js("(events) => inside.tourStops(events)", quiet)}
    assert not titles & {"A sequence is preempted", "A fork copies one block", "It comes back"}


def test_contiguous_says_both_figures(show: Any, recording: Recording, last: State) -> None:
    shown = show()
    shown.feed(recording.messages)
    shown.click("if it were contiguous")
    words = shown.page.get_by_text("Filled: tokens.").inner_text()
    held = [s for s in last.sequences.values() if s.blocks]
    reserved = sum(-(-(s.num_prompt + s.max_tokens) // last.block_size) for s in held)
    assert f"{len(held)} sequences name {sum(len(s.blocks) for s in held)} blocks" in words
    assert f"would reserve {reserved}" in words
    running = last.running
    empty = 1 - sum(s.num_computed for s in running) / sum(s.num_prompt + s.max_tokens for s in running)
    named = shown.page.get_by_role("img", name="Paged beside contiguous").get_attribute("aria-label")
    paged, contiguous = (float(part.split()[-1]) for part in named.split("%")[:2])
    assert abs(paged - 100 * last.waste) <= 0.051 and abs(contiguous - 100 * empty) <= 0.051
    assert contiguous > paged


def test_colour_modes_differ_and_are_explained(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    pictures, legends = set(), set()
    for key in "12345":
        shown.press(key) if key != "1" else shown.page.get_by_role("slider").focus()
        pictures.add(shown.js("document.querySelector(\"[aria-label='Pool of KV blocks']\").toDataURL()"))
        legends.add(shown.page.locator(".ekv-legend").first.inner_text())
    assert len(pictures) == 5 and len(legends) == 5
    assert all("cached, evictable" in words and "evicted" in words for words in legends)


def test_rest_of_a_step_is_listed_too(show: Any) -> None:
    """What is planned for the next step comes before that step's own event, often in another message."""
    shown = show()
    messages = [wire.encode_keyframe(State(8, 4), 1), wire.encode_events([("step", 1, 0, 0, 40)], 2, 40)]
    shown.feed([*messages, wire.encode_events([(QUEUE, 1, 4, 4)], 3, 50)])
    shown.feed([wire.encode_events([("admit", 1, 0, 0)], 4, 50)])
    assert shown.page.get_by_role("list", name="Events recorded").inner_text().split("\n")[1::3] == ["queue", "admit"]


def test_events_are_listed_filtered_and_lead_there(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    events = shown.page.get_by_role("list", name="Events recorded")
    shown.page.get_by_label("Which events").select_option("everything")
    shown.page.get_by_label("Find in the events").fill("preempt")
    shown.settle()
    total = shown.js("player().events(player().first, player().last).filter((e) => e.name === 'preempt').length")
    assert total > 0 and shown.page.get_by_text(f"{total} listed").is_visible()
    item = events.get_by_role("listitem").first
    assert int(item.get_attribute("aria-setsize")) == total
    step = int(item.inner_text().split()[0].replace(",", ""))
    item.get_by_role("button").click()
    shown.settle()
    assert shown.step == step and shown.digest == recording.at_step[step]


# ---- hands and ears -----------------------------------------------------------------------------------------------


def test_keyboard_alone_is_enough(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    shown.js("window.leaked = []; document.body.addEventListener('keydown', (event) => leaked.push(event.key))")
    grid = shown.page.get_by_role("img", name="Pool of KV blocks")
    grid.focus()
    shown.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert shown.card.startswith("Block 2")
    columns = shown.js("Number(document.querySelector('.ekv-card').textContent.match(/Block (\\d+)/)[1])")
    shown.press("ArrowDown")
    below = shown.js("Number(document.querySelector('.ekv-card').textContent.match(/Block (\\d+)/)[1])")
    assert below > columns + 4
    shown.press("Enter")
    assert shown.page.get_by_role("button", name="unlock").is_visible()
    shown.press("Escape")
    assert not shown.page.get_by_role("button", name="unlock").is_visible()
    shown.press("2")
    assert shown.page.get_by_role("button", name="colour by sequence").get_attribute("aria-pressed") == "true"
    shown.press(" ")
    assert "paused" in shown.page.locator(".ekv-badge").inner_text()
    notable = shown.step
    shown.press("[")
    assert shown.step < notable
    shown.press("]", "?")
    assert shown.page.get_by_role("dialog", name="Keys").is_visible()
    shown.press("Escape")
    assert not shown.page.get_by_role("dialog", name="Keys").is_visible()
    assert shown.js("leaked") == []
    shown.press("Control+b")
    assert shown.js("leaked") == ["Control", "b"]  # shortcuts of the browser and the notebook still pass


def test_every_control_is_reached_by_tab(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    names = set()
    for _ in range(70):
        shown.page.keyboard.press("Tab")
        names.add(shown.js("document.activeElement.getAttribute('aria-label')"))
    for name in ("pause the view", "go to the newest step", "colour by fill", "Pool of KV blocks", "Step shown"):
        assert name in names
    assert {"Find in the events", "engine: pause", "engine: resume"} <= names


def test_accessible_tree(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    shown.page.get_by_role("slider").focus()
    shown.settle()
    tree = shown.page.locator(".ekv").aria_snapshot()
    for line in (
        'group "KV cache of toy"',
        'button "pause the view"',
        'button "one step back"',
        'combobox "speed of the replay"',
        'img "Pool of KV blocks"',
        'img "Block tables of the sequences"',
        'slider "Step shown"',
        'combobox "Which events"',
        'searchbox "Find in the events"',
        'group "engine"',
    ):
        assert line in tree, tree
    root = shown.page.locator(".ekv")
    assert root.get_attribute("data-lm-suppress-shortcuts") == "true"
    described = shown.js(
        "document.getElementById(document.querySelector('[aria-describedby]')"
        ".getAttribute('aria-describedby')).textContent"
    )
    assert f"Step {recording.steps[-1]}: " in described and "blocks in use" in described
    small = shown.js(
        "[...document.querySelectorAll('.ekv button, .ekv select, .ekv input')]"
        ".map((node) => [node.textContent, node.getBoundingClientRect()])"
        ".filter(([, box]) => box.width && (box.width < 24 || box.height < 24))"
    )
    assert small == []


def test_description_is_quiet_without_focus(show: Any, recording: Recording) -> None:
    shown = show()
    shown.feed(recording.messages)
    assert (
        shown.js(
            "document.getElementById(document.querySelector('[aria-describedby]')"
            ".getAttribute('aria-describedby')).textContent"
        )
        == ""
    )
