"""What a request leaves in the prefix cache whose prompt was computed by others, too."""

from dataclasses import replace

import numpy as np

from millrace.scheduler.admission import Accepted
from millrace.scheduler.invariants import check
from millrace.scheduler.plan import PrefillChunk, StepResult
from millrace.scheduler.request import Request
from millrace.scheduler.scheduler import Limits, Scheduler

PROMPT, ANSWER = list(range(8)), [50, 51, 52, 53, 54, 55, 56]
NUM_BLOCKS = 16
LIMITS = Limits(
    num_blocks=NUM_BLOCKS,
    block_size=4,
    max_running=4,
    max_step_tokens=16,
    max_waiting=8,
    max_waiting_tokens=1000,
)


def serve(
    scheduler: Scheduler, request_id: int, prompt: list[int], answer: list[int], **fields: bool
) -> list[PrefillChunk]:
    """One request, alone and to its end; returns the chunks of its prompt."""
    request = Request(request_id, np.asarray(prompt, np.int32), len(answer), **fields)
    assert scheduler.submit(request) == Accepted()
    chunks, coming = [], iter(answer)
    while (plan := scheduler.schedule(0.0)) is not None:
        check(scheduler)
        chunks += plan.prefill
        slots, token = np.asarray([request.slot]), np.asarray([next(coming)])
        no, yes = np.asarray([False]), np.asarray([True])
        scheduler.apply(StepResult(plan.step, slots, token, no, yes))
        check(scheduler)
    return chunks


def cached(scheduler: Scheduler, tokens: list[int]) -> list[int]:
    return scheduler.cache.match(np.asarray(tokens, np.int32)).tolist()


def test_an_answer_is_cached_behind_a_prompt_that_others_computed_too():
    """The first one's blocks stay, and the second's answer hangs below them."""
    scheduler = Scheduler(LIMITS)
    serve(scheduler, 0, PROMPT, [9])
    kept = cached(scheduler, PROMPT)
    (chunk,) = serve(scheduler, 1, PROMPT, ANSWER, read_cache=False)
    assert chunk.length == len(PROMPT), "it computes every position"
    assert len(scheduler.cache) == 4, "two blocks of the prompt, one of the answer, and its tail"
    (chunk,) = serve(scheduler, 2, [*PROMPT, *ANSWER, 7, 8], [9])
    assert chunk.start == 14, "all but the answer's last token, whose KV was never computed"
    assert cached(scheduler, PROMPT) == kept


def test_a_copy_of_what_is_cached_goes_back_whole():
    scheduler = Scheduler(LIMITS)
    for index in range(3):
        serve(scheduler, index, PROMPT, [9], read_cache=False)
    assert len(scheduler.cache) == len(cached(scheduler, PROMPT)) == 2
    assert scheduler.pool.num_available == NUM_BLOCKS


def test_without_a_prefix_cache_nothing_is_traded():
    scheduler = Scheduler(replace(LIMITS, prefix_caching=False))
    for index in range(2):
        serve(scheduler, index, PROMPT, ANSWER)
    assert len(scheduler.cache) == 0
