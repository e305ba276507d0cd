"""Invariants: what must hold between any two calls of a Scheduler's methods.

The simulation calls `check` after every step, the engine's loop when it is idle. It reads private
state, changes nothing, and costs O(state).
"""

from __future__ import annotations

from collections import Counter

from millrace.scheduler.prefix_cache import ROOT
from millrace.scheduler.request import NO_SLOT, Request
from millrace.scheduler.scheduler import Scheduler


class InvariantViolated(AssertionError):
    """The scheduler's state contradicts itself; the text says where."""


def check(scheduler: Scheduler) -> None:
    """Raise InvariantViolated unless every slot, block and live request is accounted for."""
    _check_slots(scheduler)
    _check_waiting(scheduler)
    _check_closing(scheduler)
    _check_block_conservation(scheduler)
    _check_cache(scheduler)
    for request in _owners(scheduler):
        _check_table(scheduler, request)
        if not request.is_closing:
            _check_progress(scheduler, request)


def _require(holds: bool, violation: str) -> None:
    if not holds:
        raise InvariantViolated(violation)


def _owners(scheduler: Scheduler) -> list[Request]:
    """Requests that own a slot, closing ones included."""
    return [request for request in scheduler._request_of_slot if request is not None]


def _check_slots(scheduler: Scheduler) -> None:
    """A slot is free or has one owner, and the owner has one role."""
    owned = {s for s, request in enumerate(scheduler._request_of_slot) if request is not None}
    slots = sorted([*scheduler._free_slots, *owned])
    _require(slots == list(range(len(scheduler._request_of_slot))), f"slots free or owned: {slots}")
    released = scheduler._released
    _require(len(set(released)) == len(released), f"released twice: {released}")
    decoding = set(scheduler._decodes.nonzero()[0].tolist())
    prefilling = set(scheduler._prefilling)
    _require(not decoding & prefilling, f"slots in two roles: {decoding & prefilling}")
    _require(decoding | prefilling <= owned, f"roles {decoding | prefilling}, owned {owned}")
    for slot in owned:
        request = scheduler._request_of_slot[slot]
        assert request is not None, "owned slots have a request"
        _require(request.slot == slot, f"slot {slot} is owned by a request of slot {request.slot}")
        _require(not request.is_queued, f"request {request.id} is in slot {slot} and in the queue")
        if slot in prefilling:
            _require(scheduler._prefilling[slot] is request, f"slot {slot} prefills another's")
        if request.is_closing:
            _require(slot not in decoding | prefilling, f"closing slot {slot} is still planned")
        else:
            is_live = scheduler.requests.get(request.id) is request and request.finish is None
            _require(is_live, f"slot {slot} belongs to request {request.id}, which has ended")


def _check_waiting(scheduler: Scheduler) -> None:
    """A live request without a slot waits in one place, and the counts say so."""
    queued = list(scheduler.policy)
    following = [
        request
        for leader, followers in scheduler._followers.items()
        if leader in scheduler.requests
        for request in followers
        if request.finish is None
    ]
    waiting = [request for request in scheduler.requests.values() if request.slot == NO_SLOT]
    placed = sorted(request.id for request in queued + following)
    expected = sorted(request.id for request in waiting)
    _require(placed == expected, f"in the queue or behind a leader: {placed}, wait: {expected}")
    _require(all(r.is_queued for r in queued), "in the queue, but not marked so")
    _require(not any(r.is_queued for r in following), "behind a leader, but marked as queued")
    _require(all(not r.blocks for r in waiting), "a waiting request holds blocks")
    _require(scheduler.num_waiting == len(waiting), f"num_waiting is {scheduler.num_waiting}")
    tokens = sum(len(request.prompt) for request in waiting)
    _require(scheduler.waiting_tokens == tokens, f"waiting_tokens is not {tokens}")


def _check_closing(scheduler: Scheduler) -> None:
    """Closing requests wait for a launched step, and their blocks are counted as coming."""
    closing = [request for last in scheduler._closing.values() for request in last]
    owners = [request for request in _owners(scheduler) if request.is_closing]
    ids, expected = sorted(map(id, closing)), sorted(map(id, owners))
    _require(ids == expected, "closing requests and those that await their last step differ")
    for step, requests in scheduler._closing.items():
        _require(step > scheduler._applied, f"step {step} is applied, its closing requests remain")
        slots = [request.slot for request in requests]
        is_last = all(scheduler._last_step[slot] == step for slot in slots)
        _require(is_last, f"slots {slots} close with step {step}, not with their last one")
    coming = sum(len(request.blocks) for request in closing)
    _require(scheduler._coming_blocks == coming, f"{coming} blocks are coming")


def _check_block_conservation(scheduler: Scheduler) -> None:
    """free + idle + referenced = all, each block in one of the three, refs = tables holding it."""
    pool, cache = scheduler.pool, scheduler.cache
    held = Counter(block for request in _owners(scheduler) for block in request.blocks)
    wrong = {b: (refs, held[b]) for b, refs in enumerate(pool.refs) if refs != held[b]}
    _require(not wrong, f"block: (refs, tables that hold it): {wrong}")
    idle = [cache._nodes[node].block for node in cache._idle]
    blocks = sorted([*pool._free, *idle, *held])
    _require(blocks == list(range(pool.num_blocks)), f"blocks free, idle or held: {blocks}")
    _require(pool.num_referenced == len(held), f"num_referenced is {pool.num_referenced}")
    cached_and_free = set(pool._free) & cache._node_of_block.keys()
    _require(not cached_and_free, f"cached blocks on the free list: {cached_and_free}")


def _check_cache(scheduler: Scheduler) -> None:
    """Nodes, keys and blocks map one to one; parents are cached and rest after their children."""
    cache = scheduler.cache
    ids = {(node.parent, node.key): node_id for node_id, node in cache._nodes.items()}
    _require(ids == cache._ids, "the index differs from its nodes")
    blocks = {node.block: node_id for node_id, node in cache._nodes.items()}
    _require(blocks == cache._node_of_block, "the nodes' blocks differ from the blocks' nodes")
    age = {node_id: age for age, node_id in enumerate(cache._idle)}
    for node_id, node in cache._nodes.items():
        is_idle = scheduler.pool.refs[node.block] == 0
        _require((node_id in age) == is_idle, f"cached block {node.block}: idle is not {is_idle}")
        if node.parent == ROOT:
            continue
        _require(node.parent in cache._nodes, f"cached block {node.block} has no cached parent")
        if node.parent in age:
            _require(is_idle, f"block {node.block} is referenced, its parent is not")
            in_order = age[node_id] < age[node.parent]
            _require(in_order, f"block {node.block} would be evicted after its parent")


def _check_table(scheduler: Scheduler, request: Request) -> None:
    """Its cached blocks are a prefix of the table, hold its own tokens, and are never written."""
    cache, size = scheduler.cache, scheduler.limits.block_size
    _require(len(set(request.blocks)) == len(request.blocks), f"request {request.id}: block twice")
    length = int(scheduler._length[request.slot])
    _require(length <= len(request.blocks) * size, f"request {request.id}: past its last block")
    tokens, parent, is_cached = request.known_tokens(), ROOT, True
    first_private = min(length, len(tokens)) // size
    for index, block in enumerate(request.blocks):
        where = f"request {request.id}, block {index} of its table"
        node_id = cache._node_of_block.get(block)
        if node_id is None:
            is_cached = False
            _require(scheduler.pool.refs[block] == 1, f"{where}: shared, but not cached")
            continue
        _require(is_cached, f"{where}: cached behind a private block")
        _require(index < first_private, f"{where}: cached before it is full")
        node = cache._nodes[node_id]
        key = tokens[index * size : (index + 1) * size].tobytes()
        _require((node.parent, node.key) == (parent, key), f"{where}: cached as other tokens")
        parent = node_id


def _check_progress(scheduler: Scheduler, request: Request) -> None:
    """Lengths, blocks and tokens of a request that is planned, or planned to its end, agree."""
    slot, where = request.slot, f"request {request.id}"
    length = int(scheduler._length[slot])
    if slot in scheduler._prefilling:
        _require(request.num_computed == length, f"{where}: computed {length} tokens")
        _require(length < request.num_known, f"{where}: prefills all of its tokens again")
        held = scheduler._blocks_for(request.num_known)
    else:
        end = request.max_length - 1  # the last token's KV is never computed
        is_right = (length < end) if scheduler._decodes[slot] else (length == end)
        _require(is_right, f"{where}: decoding {length} of {end} tokens")
        in_flight = length + 1 - request.num_known
        launched = scheduler._step - scheduler._applied
        _require(0 <= in_flight <= launched, f"{where}: {in_flight} tokens in flight")
        held = scheduler._blocks_for(length)
    _require(len(request.blocks) == held, f"{where}: {len(request.blocks)} blocks, not {held}")
