"""Would the exact tests notice? Small wrong versions of the policy, each of which a bounded random driver must catch.

A mutant is a method in which a piece of its source is replaced. If the code has moved on and the piece is gone, the
test says so; write the mutant anew for what the code has become.
"""

import inspect
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from embedllm.blocks import BlockPool
from embedllm.scheduler import Scheduler
from embedllm.sequence import Sequence
from embedllm.testing import BlockMemory, Runner
from tests.engine.policy import random_life
from tests.unit.test_blocks import pool_life

NUM_LIVES = 240


@dataclass
class Mutant:
    name: str
    method: Callable[..., Any]
    right: str
    wrong: str
    life: Callable[[int], Counter] = random_life

    def apply(self, patch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(self.method))
        assert source.count(self.right) == 1, f"{self.method.__qualname__} no longer reads {self.right!r}: adapt it"
        module = sys.modules[self.method.__module__]
        names: dict[str, Any] = {}
        exec(source.replace(self.right, self.wrong), vars(module), names)
        owner, name = self.method.__qualname__.split(".")
        patch.setattr(getattr(module, owner), name, names[name])


MUTANTS = [
    # What is computed.
    Mutant("the sampled token counts as computed", Scheduler.commit, "+ num_accepted", "+ len(tokens)"),
    Mutant("rejected drafts stay computed", Scheduler.commit, "num_known + num_accepted", "entry.num_tokens"),
    Mutant("forced tokens count as computed", Scheduler.commit, "if entry.num_draft and tokens", "if tokens"),
    Mutant("rejected drafts keep their blocks", Scheduler.commit, "if entry.num_draft:", "if False:"),
    Mutant("positions are shifted", Sequence.entry, "start=start,", "start=start + 1,"),
    Mutant("a chunk ends one token early", Sequence.entry, "end = start + num_tokens", "end = start + num_tokens - 1"),
    Mutant("a known token is a guess", Sequence.entry, "[UNKNOWN] * (num_tokens", "[0] * (num_tokens"),
    Mutant("logits for a chunk that ends early", Sequence.entry, "if end >= num_known else 0", ""),
    Mutant(
        "two results are swapped", Scheduler.commit, "zip(plan.entries, sampled,", "zip(plan.entries, sampled[::-1],"
    ),
    Mutant("a draft is not checked", Runner._verify, "accepted[-1] != entry.tokens", "0 > entry.tokens"),
    Mutant("UNKNOWN is read from another row", BlockMemory.write, "self.last[entry.row]", "self.last[entry.row - 1]"),
    Mutant("it speaks on after its end", Sequence.append, "if self.finish_reason is not None:", "if False:"),
    Mutant("one token too many", Sequence.append, ">= self.max_tokens", "> self.max_tokens"),
    Mutant("EOS does not end it", Sequence.append, "if token in self.eos_ids:", "if False:"),
    # What is in flight.
    Mutant("the epoch stays", Sequence.forget, "self.epoch += 1", "pass"),
    Mutant("stale results are taken", Scheduler._land, "sequence.epoch != entry.epoch", "False"),
    Mutant("rollback keeps the blocks", Scheduler.rollback, "self._trim(sequence)", "pass"),
    Mutant("rollback frees what is still in flight", Scheduler._trim, " + sequence.num_in_flight", ""),
    Mutant("a copy is made at every launch", Scheduler._launch, "and not sequence.num_in_flight", ""),
    # Who holds what.
    Mutant("no copy on write", Scheduler._launch, "copies.append(sequence.copy)", "pass"),
    Mutant("a fork writes into its parent's block", Scheduler._bear_forks, "[:num_whole]", "[: num_whole + 1]"),
    Mutant("the source of a copy is freed early", Scheduler._bear_forks, "self.pool.share([source])", "pass"),
    Mutant("the source of a copy is never freed", Scheduler.commit, "self.pool.release(sequence.copy[:1])", "pass"),
    Mutant("a fork skips its last prompt token", Scheduler._bear_forks, "parent.num_prompt - 1", "parent.num_prompt"),
    Mutant("blocks are freed under the others", Scheduler._bear_forks, "self.pool.share(whole)", "pass"),
    Mutant("blocks are never freed", Scheduler._leave, "self.pool.release(sequence.blocks)", "pass"),
    Mutant("a stale block table after preemption", Sequence.forget, 'self.blocks = array("i")', "pass"),
    Mutant("what was in flight stays so", Sequence.forget, "self.num_in_flight = self.num_sampling = 0", "0"),
    Mutant("rows are shared", Scheduler._enter, "self.free_rows.pop()", "self.free_rows[-1]"),
    Mutant("rows are lost", Scheduler._leave, "self.free_rows.append(sequence.row)", "pass"),
    Mutant("a block too few", Scheduler._grant, "blocks_for(end) -", "blocks_for(end - 1) -"),
    # What is found by content.
    Mutant("found without its salt", Scheduler._admit, "pool.find(sequence.tokens[:-1], sequence.salt)", "FIND_ANY"),
    Mutant("the last token comes from the cache", Scheduler._admit, "sequence.tokens[:-1]", "sequence.tokens"),
    Mutant("wrong positions after a hit", Scheduler._admit, "len(blocks) * self.limits.block_size", "len(blocks)"),
    Mutant("hits are not shared", Scheduler._admit, "pool.share(blocks)", "pass"),
    Mutant(
        "cached before it is computed",
        Scheduler._cache_full_blocks,
        "sequence.num_computed, len(sequence.tokens)",
        "len(sequence.tokens), 10**6",
    ),
    Mutant("cached at launch", Scheduler._launch, "entries.append(entry)", "CACHE_AT_LAUNCH"),
    Mutant("cached without what comes before", Scheduler._cache_full_blocks, "sequence.chain, tokens", "None, tokens"),
    Mutant("cached as the tokens beside it", Scheduler._cache_full_blocks, "(i + 1) * size]", "(i + 1) * size + 1]"),
    Mutant(
        "a node is known by its block", BlockPool.cache, "self._next_node += 1", "self._next_node = block", pool_life
    ),
    Mutant("an idle block is shared and evicted", BlockPool.share, "del self._idle[block]", "pass"),
    Mutant("an evicted block is still found", BlockPool.allocate, "self._uncache(block)", "pass"),
    Mutant("a cached block is free", BlockPool._retire, "self._idle[block] = None", "self._free.append(block)"),
    Mutant("a reset leaves idle blocks idle", BlockPool.reset_cache, "self._retire(block)", "pass"),
    # Who goes first.
    Mutant("the budget is endless", Scheduler._share_catching_up, "budget -= share", "pass"),
    Mutant("drafts ignore the budget", Scheduler._add_drafts, "slots, budget)", "slots)"),
    Mutant("drafts go past the end", Scheduler._add_drafts, "sequence.max_tokens - sequence.num_output - 1", "99"),
    Mutant("drafts ignore the memory", Scheduler._add_drafts, "slots, budget)", "budget)"),
    Mutant("the first is preempted", Scheduler._grant, "self.running[-1]", "self.running[0]"),
    Mutant(
        "arrival does not matter", Scheduler._wait, "bisect.insort(self.waiting, sequence, key=_BY_ORDER)", "LAST_FIRST"
    ),
    Mutant("preemption has no bound", Scheduler._admit, ">= MAX_PREEMPTIONS:", "> 99:"),
    Mutant("admission ignores the memory", Scheduler._admit, "needed + reserved + headroom >", "0 >"),
    Mutant("the unborn are forgotten", Scheduler.finish, "self._wait(fork)", "pass"),
]
LONG = {
    "FIND_ANY": "next((found for salt in (sequence.salt, None, 'a')"
    " if (found := pool.find(sequence.tokens[:-1], salt))[0]), ([], sequence.salt))",
    "CACHE_AT_LAUNCH": "entries.append(entry); sequence.num_computed += share;"
    " self._cache_full_blocks(sequence); sequence.num_computed -= share",
    "LAST_FIRST": "self.waiting.insert(0, sequence)",
}


def lives(life: Callable[[int], Counter] = random_life) -> Counter:
    return sum((life(seed) for seed in range(NUM_LIVES)), Counter())


@pytest.mark.slow
def test_the_code_as_it_is_passes() -> None:
    counts = lives()
    happened = ("preempt", "hit", "copy", "stale", "rollback", "accepted some", "abort unborn", "park running", "pin")
    assert not [name for name in happened if counts[name] < NUM_LIVES / 10], counts


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant.wrong = LONG.get(mutant.wrong, mutant.wrong)
    mutant.apply(monkeypatch)
    with pytest.raises((AssertionError, LookupError, OverflowError)) as caught:
        lives(mutant.life)
    print(f"{mutant.name}: {caught.value!r:.120}")
