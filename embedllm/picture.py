"""One moment of the KV cache as a still picture, for notebooks that are committed and pages that run no script.

Owns the drawing. Knows a State and nothing alive. Invariant: it has no script, no link and no text but numbers, and is
readable on white and on black.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from embedllm.replay import RUNNING, SequenceState, State

WIDTH, MARGIN = 760, 12
COLUMNS, MAX_CELLS = 64, 1_024
CELL = (WIDTH - 2 * MARGIN) / COLUMNS
MAX_ROWS = 24  # sequences that get a row
ROW, BOX, LABEL = 22, 26, 184  # pixels: height of a row, width of a block in it, room for what stands before it
HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
INK, LINE, SHARED = "#7d7d7d", "#9a9a9a", "#F0E442"
STYLE = f"font:12px system-ui,sans-serif;fill:{INK}"
HATCH = (
    '<defs><pattern id="embedllm-idle" width="4" height="4" patternUnits="userSpaceOnUse" '
    f'patternTransform="rotate(45)"><rect width="1.5" height="4" fill="{LINE}"/></pattern></defs>'
)


def draw(state: State) -> str:
    """The pool, block 0 first, and the block tables of the first sequences, as an SVG document."""
    rows = sorted(state.sequences.values(), key=lambda s: (s.state != RUNNING, s.id))
    cells = -(-state.num_blocks // _group(state))
    grid = 44 + -(-cells // COLUMNS) * CELL
    height = grid + 34 + ROW * (min(len(rows), MAX_ROWS) + (len(rows) > MAX_ROWS)) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
        f'height="{height:.0f}" role="img" style="{STYLE}">',
        f"<title>KV cache at step {state.step}</title><desc>{headline(state)}</desc>",
        HATCH,
        _text(MARGIN, 24, headline(state), weight=600),
        *_pool(state),
        *_legend(state, grid + 16),
        *_tables(state, rows, grid + 34),
        "</svg>",
    ]
    return "\n".join(parts)


def headline(state: State) -> str:
    """The moment in one line of plain text."""
    running = len(state.running)
    parts = [
        f"step {state.step:,}",
        f"KV {state.num_used / max(1, state.num_blocks):.0%} of {state.num_blocks:,} blocks",
        f"{state.num_idle:,} cached",
        f"waste {state.waste:.1%}",
        f"running {running}",
        f"waiting {len(state.sequences) - running}",
        f"prefix hits {state.totals.hits:,}/{state.totals.queries:,}",
    ]
    return " · ".join(parts)


def _group(state: State) -> int:
    """Blocks that one cell of the grid stands for."""
    return max(1, -(-state.num_blocks // MAX_CELLS))


def _colour(sequence_id: int) -> str:
    return HUES[sequence_id % len(HUES)]


def _pool(state: State) -> Iterator[str]:
    group, filled = _group(state), state.filled()
    owner = {block: s.id for s in state.sequences.values() for block in s.blocks}
    pinned = {block for blocks in state.pins.values() for block in blocks}
    for cell in range(-(-state.num_blocks // group)):
        blocks = range(cell * group, min((cell + 1) * group, state.num_blocks))
        x, y = MARGIN + cell % COLUMNS * CELL, 38 + cell // COLUMNS * CELL
        yield _rect(x, y, CELL - 1, "none", LINE, 'stroke-opacity=".45"')
        used = [block for block in blocks if state.refs[block]]
        if used:
            share = sum(filled.get(block, 0) for block in used) / (len(blocks) * state.block_size)
            colour = Counter(_colour(owner[block]) for block in used if block in owner).most_common(1)
            height = max(1.5, (CELL - 1) * share)
            yield _rect(x, y + CELL - 1 - height, CELL - 1, colour[0][0] if colour else INK, "none", "", height)
        elif any(state.node[block] for block in blocks):
            yield _rect(x, y, CELL - 1, "url(#embedllm-idle)", "none", "")
        if any(state.refs[block] > 1 for block in used):
            yield f'<path d="M{x + CELL - 6:.1f} {y:.1f}h5v5z" fill="{SHARED}" stroke="{INK}" stroke-width=".5"/>'
        if not pinned.isdisjoint(blocks):
            yield f'<circle cx="{x + 3:.1f}" cy="{y + 3:.1f}" r="2" fill="#fff" stroke="{INK}"/>'


def _legend(state: State, y: float) -> Iterator[str]:
    group = _group(state)
    marks = [
        ("none", LINE, "free"),
        (HUES[0], "none", "in use, filled so far"),
        ("url(#embedllm-idle)", LINE, "cached"),
    ]
    x = float(MARGIN)
    for fill, stroke, word in marks:
        yield _rect(x, y - 9, 10, fill, stroke, "")
        yield _text(x + 15, y, word)
        x += 27 + 6.6 * len(word)
    yield f'<path d="M{x + 4:.1f} {y - 9:.1f}h6v6z" fill="{SHARED}" stroke="{INK}" stroke-width=".5"/>'
    yield _text(x + 15, y, "shared")
    yield f'<circle cx="{x + 70:.1f}" cy="{y - 4:.1f}" r="2.5" fill="#fff" stroke="{INK}"/>'
    yield _text(x + 78, y, "pinned")
    if group > 1:
        yield _text(WIDTH - MARGIN, y, f"a cell is {group} blocks", anchor="end")


def _tables(state: State, rows: list[SequenceState], top: float) -> Iterator[str]:
    room = int((WIDTH - LABEL - MARGIN) // BOX)
    for place, sequence in enumerate(rows[:MAX_ROWS]):
        y = top + place * ROW
        what = f"{sequence.num_prompt}+{sequence.num_output}" if sequence.state == RUNNING else "waits"
        yield _text(MARGIN, y + 13, f"sequence {sequence.id}")
        yield _text(LABEL - 8, y + 13, what, anchor="end")
        shown = list(sequence.blocks[: room if len(sequence.blocks) <= room else room - 1])
        for i, block in enumerate(shown):
            x, fill = LABEL + i * BOX, min(1.0, (sequence.num_computed - i * state.block_size) / state.block_size)
            yield _rect(x, y, BOX - 3, _colour(sequence.id), "none", 'fill-opacity=".35"', ROW - 5, (BOX - 3) * fill)
            yield _rect(x, y, BOX - 3, "none", _colour(sequence.id), "", ROW - 5)
            yield _text(x + (BOX - 3) / 2, y + 12, str(block), anchor="middle", size=10)
            if state.refs[block] > 1:
                yield f'<path d="M{x + BOX - 9:.1f} {y:.1f}h6v6z" fill="{SHARED}" stroke="{INK}" stroke-width=".5"/>'
        if len(shown) < len(sequence.blocks):
            yield _text(LABEL + len(shown) * BOX, y + 13, f"+{len(sequence.blocks) - len(shown)}")
    if len(rows) > MAX_ROWS:
        yield _text(MARGIN, top + MAX_ROWS * ROW + 13, f"and {len(rows) - MAX_ROWS:,} more")


def _rect(
    x: float, y: float, width: float, fill: str, stroke: str, more: str, height: float = 0, part: float | None = None
) -> str:
    """A box; as high as it is wide where no height is given, and `part` of it wide."""
    size = f'width="{width if part is None else part:.1f}" height="{height or width:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="1.5" fill="{fill}" stroke="{stroke}" {more}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: int = 400, size: int = 12) -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{text}</text>'
