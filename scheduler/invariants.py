"""Invariants: what must hold between any two calls of a Scheduler's methods.

The simulation calls `check` after every step, the engine's loop when it is idle. It reads private
state, changes nothing, and costs O(state).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from millrace.scheduler.prefix_cache import Node, PrefixCache
from millrace.scheduler.request import NO_SLOT, Request
from millrace.scheduler.scheduler import Scheduler
from millrace.scheduler.window import blocks_for


class InvariantViolated(AssertionError):
    """The scheduler's state contradicts itself; the text says where."""


def check(scheduler: Scheduler) -> None:
    """Raise InvariantViolated unless every slot, block and live request is accounted for."""
    _check_slots(scheduler)
    _check_waiting(scheduler)
    _check_closing(scheduler)
    _check_block_conservation(scheduler)
    _check_cache(scheduler)
    _check_host(scheduler)
    keys = _keys(scheduler.cache)
    for request in _owners(scheduler):
        _check_table(scheduler, request, keys)
        if not request.is_closing:
            _check_progress(scheduler, request)


def _require(holds: bool, violation: str) -> None:
    if not holds:
        raise InvariantViolated(violation)


def _owners(scheduler: Scheduler) -> list[Request]:
    """Requests that own a slot, closing ones included."""
    return [request for request in scheduler._slots.requests if request is not None]


def _check_slots(scheduler: Scheduler) -> None:
    """A slot is free or has one owner, and the owner has one role."""
    owned = {s for s, request in enumerate(scheduler._slots.requests) if request is not None}
    slots = sorted([*scheduler._slots.free, *owned])
    _require(slots == list(range(len(scheduler._slots.requests))), f"slots free or owned: {slots}")
    released = scheduler._released
    _require(len(set(released)) == len(released), f"released twice: {released}")
    decoding = set(scheduler._slots.streams().nonzero()[0].tolist())
    prefilling = set(scheduler._prefilling)
    _require(not decoding & prefilling, f"slots in two roles: {decoding & prefilling}")
    _require(decoding | prefilling <= owned, f"roles {decoding | prefilling}, owned {owned}")
    for slot in owned:
        request = scheduler._slots.requests[slot]
        assert request is not None, "owned slots have a request"
        _require(request.slot == slot, f"slot {slot} is owned by a request of slot {request.slot}")
        is_live = request.finish is None
        _require(scheduler._slots.is_live[slot] == is_live, f"slot {slot}: live is not {is_live}")
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
        is_last = all(scheduler._decodes.last_step(slot) == step for slot in slots)
        _require(is_last, f"slots {slots} close with step {step}, not with their last one")
    coming = sum(len(scheduler.blocks_of(request)) for request in closing)
    _require(scheduler._coming_blocks == coming, f"{coming} blocks are coming")


def _check_block_conservation(scheduler: Scheduler) -> None:
    """free + idle + referenced = all, each block in one of the three, refs = tables holding it."""
    pool, cache = scheduler.pool, scheduler.cache
    tables = [scheduler.blocks_of(request).tolist() for request in _owners(scheduler)]
    held = Counter(block for table in tables for block in table)
    wrong = {b: (refs, held[b]) for b, refs in enumerate(pool.refs.tolist()) if refs != held[b]}
    _require(not wrong, f"block: (refs, tables that hold it): {wrong}")
    free = pool._free[: pool._num_free].tolist()
    blocks = sorted([*free, *cache._idle, *held])
    _require(blocks == list(range(pool.num_blocks)), f"blocks free, idle or held: {blocks}")
    _require(pool.num_referenced == len(held), f"num_referenced is {pool.num_referenced}")
    cached_and_free = [block for block in free if cache._is_cached[block]]
    _require(not cached_and_free, f"cached blocks on the free list: {cached_and_free}")


def _check_cache(scheduler: Scheduler) -> None:
    """Keys and blocks map one to one; parents are cached and rest after their children."""
    cache = scheduler.cache
    keys = _keys(cache)
    marked = np.flatnonzero(cache._is_cached).tolist()
    _require(marked == sorted(keys), f"marked as cached: {marked}, in the index: {sorted(keys)}")
    age = {block: age for age, block in enumerate(cache._idle)}
    for block, (parent, _) in keys.items():
        is_idle = scheduler.pool.refs[block] == 0
        _require((block in age) == is_idle, f"cached block {block}: idle is not {is_idle}")
        if isinstance(parent, str):
            continue
        _require(parent in keys, f"cached block {block} has no cached parent")
        if parent in age:
            _require(is_idle, f"block {block} is referenced, its parent is not")
            in_order = age[block] < age[parent]
            _require(in_order, f"block {block} would be evicted after its parent")


def _check_host(scheduler: Scheduler) -> None:
    """A host block is free, or belongs to one request that has yielded and waits."""
    host = scheduler._tables.host
    swapped = [request for request in scheduler.requests.values() if request.swapped is not None]
    places = [place for request in swapped if request.swapped for place in request.swapped.places]
    blocks = sorted([*host._free, *places])
    _require(blocks == list(range(host.num_blocks)), f"host blocks free or held: {blocks}")
    for request in swapped:
        waits = request.slot == NO_SLOT and request.num_preemptions > 0
        _require(waits, f"request {request.id} is swapped out, and has not yielded")
    pending = {place for _, place in host.swap_outs}
    _require(pending <= set(places), f"host blocks {pending - set(places)} are written for nobody")


def _keys(cache: PrefixCache) -> dict[int, tuple[Node, bytes]]:
    """Each cached block's parent and tokens, by its edge or as a tail; no two are the same."""
    keys, size = {}, cache._block_bytes
    for key, edge in cache._edges.items():
        where = f"edge {list(edge.blocks)}"
        _require(0 < len(edge.blocks) <= cache.longest_edge, f"{where}: so many blocks")
        _require(key == edge.key == (key[0], edge.tokens[:size]), f"{where}: another's key")
        parent = key[0]
        for place, block in enumerate(edge.blocks):
            _require(cache._edge[block] is edge, f"{where}: {block} is thought to be elsewhere")
            keys[block] = (parent, edge.tokens[place * size : (place + 1) * size])
            parent = block
    num_on_edges = sum(len(edge.blocks) for edge in cache._edges.values())
    _require(len(keys) == num_on_edges, "a block is on two edges")
    tails = {parent: block for block, (parent, _) in cache._tail_key.items()}
    _require(tails == cache._tails, "tails and blocks differ")
    _require(not keys.keys() & cache._tail_key.keys(), "a tail is on an edge")
    keys |= cache._tail_key
    _require(len(set(keys.values())) == len(keys), "two blocks have one key")
    return keys


def _check_table(
    scheduler: Scheduler, request: Request, keys: dict[int, tuple[Node, bytes]]
) -> None:
    """Its cached blocks are a prefix of the table, hold its own tokens, and are never written."""
    cache, size, slots = scheduler.cache, scheduler.limits.block_size, scheduler._slots
    table, chain = scheduler.blocks_of(request).tolist(), slots.chains[request.slot]
    _require(len(set(table)) == len(table), f"request {request.id}: block twice")
    length = int(slots.computed[request.slot])
    first, end = int(slots.num_gone[request.slot]), slots.end_block(request.slot)
    _require(length <= end * size, f"request {request.id}: past its last block")
    has_none = chain.num_blocks == 0 and chain.is_closed
    _require(first == 0 or has_none, f"request {request.id}: its chain is broken off")
    tokens = slots.tokens(request.slot)
    parent: Node = request.tenant
    first_private = min(length, len(tokens)) // size
    is_cached = [bool(cache._is_cached[block]) for block in table]
    _require(sum(is_cached) == chain.num_blocks, f"request {request.id}: {chain}, cached otherwise")
    for index, block in enumerate(table):
        where = f"request {request.id}, block {index} of its table"
        if index >= chain.num_blocks:
            _require(not is_cached[index], f"{where}: cached behind a private block")
            _require(scheduler.pool.refs[block] == 1, f"{where}: shared, but not cached")
            continue
        _require(index < first_private, f"{where}: cached before it is full")
        key = (parent, tokens[index * size : (index + 1) * size].tobytes())
        _require(keys[block] == key, f"{where}: cached as other tokens")
        parent = block


def _check_progress(scheduler: Scheduler, request: Request) -> None:
    """Lengths, blocks and tokens of a request that is planned, or planned to its end, agree."""
    slot, where = request.slot, f"request {request.id}"
    length = int(scheduler._slots.computed[slot])
    if slot in scheduler._prefilling:
        _require(request.num_computed == length, f"{where}: computed {length} tokens")
        _require(length < request.num_known, f"{where}: prefills all of its tokens again")
        most = scheduler._tables.to_begin(request.num_known)
    elif request.lookahead:
        return _check_drafts(scheduler, request)
    else:
        end = request.max_length - 1  # the last token's KV is never computed
        is_right = (length < end) if scheduler._slots.decodes[slot] else (length == end)
        _require(is_right, f"{where}: decoding {length} of {end} tokens")
        in_flight = length + 1 - len(scheduler._slots.tokens(slot))
        launched = scheduler._step - scheduler._applied
        _require(0 <= in_flight <= launched, f"{where}: {in_flight} tokens in flight")
        most = blocks_for(length, scheduler.limits.block_size)
    _check_held(scheduler, request, length, most, most)


def _check_held(scheduler: Scheduler, request: Request, length: int, least: int, most: int) -> None:
    """It holds all that is read from here on, and nothing ahead."""
    window = scheduler._tables.window
    where, held = f"request {request.id}", len(scheduler.blocks_of(request))
    if window is None:
        _require(least <= held <= most, f"{where}: {held} blocks, not {least} to {most}")
        return
    _require(held <= most, f"{where}: {held} blocks, more than {most}")
    first = int(scheduler._slots.num_gone[request.slot])
    _require(first <= window.first_needed(length), f"{where}: block {first} is needed, and gone")


def _check_drafts(scheduler: Scheduler, request: Request) -> None:
    """The same of one that drafts: how many of the tokens in flight it keeps is not known yet."""
    slot, where, slots = request.slot, f"request {request.id}", scheduler._slots
    length, end = int(slots.computed[slot]), request.max_length - 1
    is_in_flight = any(slot in drafts[:, 0] for drafts in scheduler._drafts.values())
    is_ready = bool(slots.speculates[slot])
    _require(not slots.decodes[slot], f"{where}: drafts, and decodes")
    _require(is_ready != (is_in_flight or length == end), f"{where}: {is_ready=}, {is_in_flight=}")
    in_flight = length + 1 - len(slots.tokens(slot))
    launched = scheduler._step - scheduler._applied
    _require(0 <= in_flight <= launched + request.lookahead, f"{where}: {in_flight} in flight")
    size = scheduler.limits.block_size
    most = blocks_for(min(length + request.lookahead, end), size)
    _check_held(scheduler, request, length, blocks_for(length, size), most)
