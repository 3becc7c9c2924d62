"""One moment of the KV cache as lines of text, for terminals and logs.

Owns the drawing. Knows a State and nothing alive. Invariant: it is as wide and as high as asked for, or less, and
without `ansi` it is plain text.
"""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from embedllm.replay import RUNNING, SequenceState, State

STATES = ("waiting", "running", "parked")
FREE, IDLE, SHARED, PINNED = "·", "░", "▓", "◆"
LEVELS = "▁▂▃▄▅▆▇█"  # a private block by how full it is
LETTERS = "abcdefghijklmnopqrstuvwxyz"
COLOURS = (39, 208, 41, 170, 220, 45, 203, 112, 141, 214, 87, 168)  # of the 256-colour palette, far apart
PLAIN, DIM, BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"


def colour_of(sequence_id: int) -> str:
    """The escape sequence of a sequence's colour."""
    return f"\x1b[38;5;{COLOURS[sequence_id % len(COLOURS)]}m"


def letter_of(sequence_id: int) -> str:
    """The letter that stands for a sequence where there is no colour."""
    return LETTERS[sequence_id % len(LETTERS)]


def paint(text: str, colour: str, ansi: bool) -> str:
    return f"{colour}{text}{PLAIN}" if ansi and text else text


def _per_cell(num_blocks: int, width: int, rows: int) -> int:
    return -(-num_blocks // (width * rows))


def pool_lines(state: State, width: int, rows: int, ansi: bool) -> list[str]:
    """The pool, block 0 first: one character per block, or per group of neighbours where there are too many."""
    num_blocks, size = state.num_blocks, state.block_size
    group = _per_cell(num_blocks, width, rows)
    filled = state.filled()
    pinned = {block for blocks in state.pins.values() for block in blocks}
    holders: dict[int, list[int]] = {}  # block -> ids of the sequences that hold it
    for sequence in state.sequences.values():
        for block in sequence.blocks:
            holders.setdefault(block, []).append(sequence.id)
    used: dict[int, list[int]] = {}
    for block in sorted(filled):
        used.setdefault(block // group, []).append(block)
    idle = {block // group for block, node in enumerate(state.node) if node and not state.refs[block]}
    cells: list[tuple[str, str]] = []  # (character, colour)
    for cell in range(-(-num_blocks // group)):
        blocks = used.get(cell)
        if blocks is None:
            cells.append((IDLE if cell in idle else FREE, DIM))
            continue
        in_cell = min(group, num_blocks - cell * group)
        share = sum(filled[block] for block in blocks) / (in_cell * size)
        who = Counter(_holder(block, holders, pinned) for block in blocks).most_common(1)[0][0]
        cells.append(_used_cell(who, share, ansi))
    return [_runs(cells[start : start + width], ansi) for start in range(0, len(cells), width)]


def _runs(cells: list[tuple[str, str]], ansi: bool) -> str:
    """One line; neighbours of one colour share its escape sequence."""
    runs = groupby(cells, key=lambda cell: cell[1])
    return "".join(paint("".join(char for char, _ in run), colour, ansi) for colour, run in runs)


def _holder(block: int, holders: dict[int, list[int]], pinned: set[int]) -> int | str:
    """Who holds a block that is in use: one sequence's id, or the character for several or for a pin."""
    if block in pinned:
        return PINNED
    ids = holders[block]
    return ids[0] if len(ids) == 1 else SHARED


def _used_cell(who: int | str, share: float, ansi: bool) -> tuple[str, str]:
    if isinstance(who, str):
        return who, BOLD
    return LEVELS[max(0, min(7, round(share * 8) - 1))] if ansi else letter_of(who), colour_of(who)


def legend(state: State, width: int, rows: int, ansi: bool) -> str:
    """What the characters of the pool mean, and how many blocks one stands for."""
    group = _per_cell(state.num_blocks, width, rows)
    private = f"{LEVELS[2]}{LEVELS[7]} in use, by fill" if ansi else "a-z in use"
    what = [f"{FREE} free", f"{IDLE} cached", private, f"{SHARED} shared", f"{PINNED} pinned"]
    what.append(f"each {'a block' if group == 1 else f'{group} blocks'} of {state.block_size} tokens")
    while len("  ".join(what)) > width:
        what.pop()
    return paint("  ".join(what), DIM, ansi)


def sequence_lines(state: State, width: int, room: int, ansi: bool) -> list[str]:
    """One line per sequence, as many as there is room for: those that run first."""
    listed = sorted(state.sequences.values(), key=lambda sequence: (sequence.state != RUNNING, sequence.id))
    shown = listed if len(listed) <= room else listed[: max(0, room - 1)]
    lines = [_sequence_line(sequence, width, ansi) for sequence in shown]
    if len(shown) < len(listed) and room > 0:
        lines.append(paint(f"… and {len(listed) - len(shown)} more", DIM, ansi))
    return lines


def _sequence_line(sequence: SequenceState, width: int, ansi: bool) -> str:
    colour = colour_of(sequence.id)
    name = f"{'■' if ansi else letter_of(sequence.id)} {sequence.id:>4}"
    cached = f" ({sequence.num_cached} cached)" if sequence.num_cached else ""
    tokens = f"{sequence.num_output:>4}/{sequence.max_tokens} tokens"
    counts = f"{tokens}  prompt {sequence.num_prompt}{cached}  {len(sequence.blocks)} blocks"
    if sequence.state != RUNNING:
        return paint(f"{name}  {STATES[sequence.state]} {counts}"[:width], DIM, ansi)
    bar_width = max(4, min(24, width - len(name) - len(counts) - 4))
    bar = progress_bar(sequence, bar_width)
    counts = counts[: max(0, width - len(name) - bar_width - 4)]
    return f"{paint(name, colour, ansi)}  {paint(bar, colour, ansi)}  {counts}"


def progress_bar(sequence: SequenceState, width: int) -> str:
    """Computed tokens of all it may become: its prompt as ▒, its output as █."""
    total = sequence.num_prompt + sequence.max_tokens
    prompt = round(width * min(sequence.num_computed, sequence.num_prompt) / total)
    output = round(width * max(0, sequence.num_computed - sequence.num_prompt) / total)
    return ("▒" * prompt + "█" * output).ljust(width, "·")[:width]
