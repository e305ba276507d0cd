"""A suite that can't fail proves nothing: each of these bugs must be caught by the simulation.

They were seen, or nearly, in other engines' schedulers. A bug is a small change to one method's
source. When a method is rewritten, `plant` fails until the bug is planted anew.
"""

import __future__

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest

from millrace.perf.sim.world import simulate
from millrace.scheduler import speculation
from millrace.scheduler.block_pool import BlockPool
from millrace.scheduler.block_tables import BlockTables
from millrace.scheduler.deadline_first import EarliestDeadlineFirst
from millrace.scheduler.decode_set import DecodeSet
from millrace.scheduler.fair_share import FairShare
from millrace.scheduler.idle_blocks import IdleBlocks
from millrace.scheduler.policy import FirstComeFirstServed, Ordered
from millrace.scheduler.prefix_cache import PrefixCache
from millrace.scheduler.priority import PriorityWithAging
from millrace.scheduler.request_heap import RequestHeap
from millrace.scheduler.scheduler import Scheduler
from millrace.scheduler.slots import SlotTable
from millrace.scheduler.swap import HostPool
from millrace.scheduler.window import Window

MAX_SEEDS = 300  # as many as an ordinary run of the simulation goes through


@dataclass(frozen=True)
class Bug:
    owner: type | ModuleType
    method: str
    changes: dict[str, str]  # from what, each found once, to what
    first_seed: int = 0  # of a rare one: near the first world that shows it


BUGS = {
    # Blocks
    "a block is asked for one token late": Bug(
        Scheduler, "_plan_decodes", {"table.capacity)": "table.capacity + 1)"}
    ),
    "slot and blocks are freed while a step with them is in flight": Bug(
        Scheduler, "_leave_slot", {"if last_step > self._applied:": "if False:"}
    ),
    "hits are shared after other blocks were taken, which evicts them": Bug(
        BlockTables,
        "place",
        {
            "self._pool.share(hits)": "pass",
            "assert fresh is": "self._pool.share(hits)\n    assert fresh is",
        },
    ),
    "hits that are idle are counted as blocks to be had": Bug(
        BlockTables, "_is_room", {" - self._pool.num_idle(hits)": ""}
    ),
    "blocks are given back head first": Bug(
        BlockPool,
        "give_back",
        {"blocks[left == 0][::-1]": "blocks[left == 0]"},
    ),
    "a shared block is freed by its first owner": Bug(BlockPool, "give_back", {"[left == 0]": ""}),
    "a block that has come to rest again keeps its old place as well": Bug(
        IdleBlocks, "_still_idle", {"== since": "> 0"}
    ),
    "of blocks taken from the middle of a row the rest is lost": Bug(
        IdleBlocks, "pop_oldest", {"idle[missing:]": "idle[:0]"}
    ),
    # Prefix cache
    "a prompt that is cached whole leaves nothing to compute": Bug(
        BlockTables, "_cached_prefix", {"request.num_known - 1": "request.num_known"}
    ),
    "blocks not computed yet are cached": Bug(
        BlockTables, "_index", {"int(table.computed[slot]), self": "9999, self"}
    ),
    "a chain goes on behind another's block": Bug(
        PrefixCache,
        "insert",
        {"is not None:": "== -1:"},
    ),
    "prefixes match whatever comes before them": Bug(
        PrefixCache, "match", {"node = blocks[-1]": "pass"}
    ),
    "a prompt is computed by two requests at once": Bug(
        Scheduler, "_plan_chunk", {"self._tables.wrote(plan.step, request, chunk.start)": "pass"}
    ),
    "KV of lost steps is trusted": Bug(Scheduler, "abandon", {"self.pool.flush()": "pass"}),
    "tokens computed again count as hits": Bug(
        Scheduler, "_place", {"if request.num_preemptions == 0:": "if True:"}
    ),
    "an edge keeps the tokens of evicted blocks": Bug(
        PrefixCache, "_tokens_of", {"len(edge.tokens) > length": "False"}
    ),
    "only the first block of an edge is compared": Bug(
        PrefixCache, "match", {"data.startswith(on_edge, start)": "True"}
    ),
    "what goes on behind the middle of an edge is looked for at its end only": Bug(
        PrefixCache, "_next", {"place < len(edge.blocks) and": "False and"}
    ),
    "a tenant's prefixes are kept under another's name": Bug(
        BlockTables, "place", {"Chain(request.tenant,": 'Chain("a",'}
    ),
    # Copies
    "a block is copied that the same step computes": Bug(
        BlockTables, "_to_copy", {"self._written[pair[0]] < step": "True"}
    ),
    "a copy is trusted for a token more than there is": Bug(
        BlockTables, "_to_copy", {"return (source, saved)": "return (source, saved + 1)"}
    ),
    "a token that was drawn last is taken for computed": Bug(
        BlockTables, "leave", {"[: table.computed[slot]]": ""}
    ),
    "a leader's block is copied from the wrong place behind its window": Bug(
        BlockTables,
        "_in_leader",
        {"self._slots.num_gone[leader.slot] == 0": "True"},
        first_seed=400,
    ),
    "a tail that is replaced is lost": Bug(
        BlockPool, "keep_tail", {"displaced is not None": "False"}
    ),
    "a tail is copied whatever comes before it": Bug(
        PrefixCache, "partial", {"int(blocks[-1]) if len(blocks) else salt": "salt"}
    ),
    "an evicted tail can still be found": Bug(
        PrefixCache, "_forget", {"del self._tails[self._tail_key.pop(block)[0]]": "pass"}
    ),
    # Swapping
    "a request that ends while it is swapped out keeps its host blocks": Bug(
        Scheduler, "finish", {"self._tables.host.drop(request)": "pass"}
    ),
    "blocks are given to others before they are swapped out": Bug(
        HostPool,
        "swap_out",
        {
            "+= zip(kept, places, strict=True)": "= [*self.swap_outs, *zip(kept, places)]",
        },
    ),
    "more is taken for swapped in than was swapped out": Bug(
        HostPool,
        "swap_in",
        {"min(swapped.num_tokens, request.num_known - 1)": "request.num_known - 1"},
    ),
    "swapped blocks are used though those before them are gone": Bug(
        HostPool,
        "swap_in",
        {"swapped.first <= num_hits < end": "num_hits < end"},
        first_seed=700,
    ),
    "host copies of lost steps are trusted": Bug(
        Scheduler,
        "abandon",
        {"self._tables.host.lose(self.requests.values())": "pass"},
        first_seed=300,
    ),
    # Windows
    "a block goes back while the window still holds its last position": Bug(
        Window, "first_needed", {"- self.tokens + 1": "- self.tokens + 2"}
    ),
    "blocks go back that a chunk in flight reads": Bug(
        BlockTables, "slide", {"launched[0][1] if launched else position": "position"}
    ),
    "the beginning of a chain goes back before its end": Bug(
        BlockTables, "slide", {" and end >= chain.num_blocks": ""}
    ),
    "a window's blocks are indexed however far they are": Bug(
        BlockTables,
        "_index",
        {"min(int(table.computed[slot]), self._indexed_tokens)": "int(table.computed[slot])"},
    ),
    # Preemption
    "a preempted request forgets what it said": Bug(
        Scheduler,
        "_release",
        {"self._keep_outputs(request)": "request.outputs.clear()"},
    ),
    "coming blocks are ignored, and the whole batch is preempted": Bug(
        Scheduler, "_grow_one", {"self._coming_blocks > num_stalled": "False"}
    ),
    "the oldest yields": Bug(Ordered, "victim", {"max(": "min("}),
    "new requests take what the preempted gave up": Bug(
        Scheduler, "schedule", {"self.counters.preemptions == preemptions": "True"}
    ),
    "a preempted slot keeps the block it was to get": Bug(
        Scheduler, "_grow", {"[streams[plan.block_appends[:, 0]] != 0]": ""}
    ),
    # Ends
    "a request that has ended goes on drawing": Bug(
        Scheduler, "finish", {"self._slots.is_live[request.slot] = False": "pass"}
    ),
    "a request is planned past its last token": Bug(
        SlotTable, "occupy", {"= request.max_length - 1": "= request.max_length"}
    ),
    "an ended request stays in the decoding set": Bug(
        DecodeSet, "commit", {"self._told[plan.decode_leaves] = 0": "pass"}
    ),
    "a cancelled leader leaves its followers behind": Bug(
        Scheduler, "finish", {"self._free_followers(request)": "pass"}
    ),
    "a cancelled request is still counted as waiting": Bug(
        Scheduler, "finish", {"self._count_waiting(request, -1)": "pass"}
    ),
    "a request that failed is only passed over": Bug(
        Scheduler,
        "_fail",
        {"self.finish(self.request_at(slot).id, Finish.ERROR, now_s, error=error)": "pass"},
    ),
    # Several tokens a step
    "drafts that were wrong count as computed": Bug(
        speculation, "settle", {"_ = drafts.T": "length = drafts.T", "kept[slots]": "length"}
    ),
    "the token behind the right drafts counts as computed": Bug(
        speculation, "settle", {"kept[slots]": "kept[slots] + 1"}
    ),
    "who drafts is planned again before its result is known": Bug(
        speculation, "plan_drafts", {"table.speculates[slots] = 0": "pass"}
    ),
    "tokens behind a stop token are kept": Bug(
        speculation, "up_to_ends", {"is_end = result.stopped | ~result.ok": "is_end = ~result.ok"}
    ),
    "drafts go past a request's last token": Bug(
        speculation, "plan_drafts", {", table.end[slots] - start - 1)": ", 9)"}
    ),
    "drafts have no room in the block table": Bug(
        speculation, "plan_drafts", {"stop = np.minimum(stop, table.capacity[slots])": "pass"}
    ),
    "drafts are not taken from the budget": Bug(
        speculation, "plan_drafts", {"budget - before": "drafts"}
    ),
    "who was preempted with drafts in flight is planned again": Bug(
        Scheduler, "_settle_drafts", {"self._slots.speculates[request.slot] = 0": "pass"}
    ),
    "a tenant pays for one token a step": Bug(
        FairShare,
        "drew",
        {"slots, self._price[slots],": "np.unique(slots), self._price[np.unique(slots)],"},
    ),
    # Order and budget
    "decodes are not taken from the budget": Bug(
        Scheduler, "_prefill_budget", {" - num_streams": ""}
    ),
    "the last to come is served first": Bug(
        FirstComeFirstServed, "key", {"return request.arrival": "return -request.arrival"}
    ),
    "a class waits no longer than the others": Bug(
        PriorityWithAging, "key", {" + request.priority * self._aging_s": ""}
    ),
    "what is due last is first": Bug(
        EarliestDeadlineFirst, "key", {"else request.deadline_s": "else -request.deadline_s"}
    ),
    "requests are shed that could still make it": Bug(
        EarliestDeadlineFirst, "hopeless", {"now_s + self": "now_s + 2 * self"}
    ),
    "a tenant that begins to wait is not lifted": Bug(
        FairShare, "push", {"max(tenant.counter, self._start())": "tenant.counter - 1.0"}
    ),
    "the prompt is charged again after a preemption": Bug(
        FairShare, "pop", {"if request.num_preemptions == 0:": "if True:"}
    ),
    "output is free": Bug(FairShare, "drew", {"self._price[slots]": "0 * self._price[slots]"}),
    "a tenant out of date in the order goes first": Bug(
        FairShare, "_first", {"tenant.counter != counter": "False"}
    ),
    "the ended at the head of a queue are handed out": Bug(
        RequestHeap, "head", {"self._entries[0][2].finish is not None": "False"}
    ),
}


def plant(monkeypatch: pytest.MonkeyPatch, bug: Bug) -> None:
    """Compile the method's source with its changes, and put it in the method's place."""
    method: Callable[..., object] = getattr(bug.owner, bug.method)
    source = textwrap.dedent(inspect.getsource(method))
    for old, new in bug.changes.items():
        assert source.count(old) == 1, f"{bug.method} has changed: plant {old!r} anew"
        source = source.replace(old, new)
    code = compile(source, bug.method, "exec", __future__.annotations.compiler_flag)
    namespace: dict[str, Callable[..., object]] = {}
    exec(code, method.__globals__, namespace)
    monkeypatch.setattr(bug.owner, bug.method, namespace[bug.method])


@pytest.mark.parametrize("name", BUGS)
def test_the_simulation_catches(name, monkeypatch):
    plant(monkeypatch, BUGS[name])
    with pytest.raises((AssertionError, LookupError, ValueError)):
        first = BUGS[name].first_seed
        for seed in range(first, first + MAX_SEEDS):
            simulate(seed)


def test_a_change_that_is_none_is_not_caught(monkeypatch):
    """So it is the bugs that are caught, not the planting."""
    for bug in BUGS.values():
        with monkeypatch.context() as patch:
            plant(patch, Bug(bug.owner, bug.method, {old: old for old in bug.changes}))
            for seed in range(2):
                simulate(seed)
