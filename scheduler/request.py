"""Request: the state of one sequence, from arrival to its one end.

State only: `scheduler.py` decides, `block_pool.py` owns the memory. The scheduler never looks into
`payload` (the engine keeps its sampling parameters there).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
import numpy.typing as npt

NO_SLOT = -1
NEVER = -1  # a step number before the first


class Finish(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token (decided on the device) or a stop string (by the front end)
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a request that has yielded left on the host."""

    first: int  # index in its table of the first block that is there
    places: list[int]  # host blocks, in the order of its table
    num_tokens: int  # whose KV these blocks and those before them held


@dataclass(eq=False, slots=True)
class Request:
    """One sequence.

    Its tokens, by position (all ranges half open):

        0            num_computed         num_known            max_length
        |  KV computed or  |   known, KV to be  |  not yet drawn   |
        |  being computed  |   computed         |                  |

    `schedule()` moves num_computed towards num_known; drawing a token moves num_known.
    """

    id: int
    prompt: npt.NDArray[np.int32]
    max_tokens: int  # output tokens, >= 1
    payload: object = None
    deadline_s: float | None = None  # monotonic time at which it ends
    leader: int | None = None  # sibling whose prompt KV this one waits for and shares
    arrived_s: float = 0.0
    priority: int = 0  # class; 0 is the most urgent
    tenant: str = ""  # whose request it is: tenants share no cached prefixes
    weight: float = 1.0  # of the tenant, > 0: its share compared with others'
    read_cache: bool = True  # False: compute every prompt position (their logits are wanted)
    lookahead: int = 0  # drafts of its next tokens that a step may check at once

    arrival: int = NEVER  # order of submission
    outputs: list[int] = field(default_factory=list)  # as of when it last left its slot
    slot: int = NO_SLOT
    num_computed: int = 0  # kept while it prefills; a decoding slot's count is the slot table's
    # Of its chunks whose steps may not be applied yet: step and first position; oldest first.
    launched: deque[tuple[int, int]] = field(default_factory=deque)
    is_queued: bool = False  # in the policy's queue (a follower of a leader is not, yet)
    is_closing: bool = False  # leaves its slot once the last launched step with it is applied
    cached_tokens: int = 0  # prompt tokens whose KV was reused at the first admission
    num_preemptions: int = 0
    swapped: Swapped | None = None
    scheduled_s: float = 0.0  # first given to the device; 0: never
    finish: Finish | None = None
    stop_token: int | None = None
    error: str = ""

    @property
    def num_known(self) -> int:
        """Tokens whose ids the host has seen. (While it decodes, the slot table knows of more.)"""
        return len(self.prompt) + len(self.outputs)

    @property
    def max_length(self) -> int:
        """Tokens of prompt and output at most."""
        return len(self.prompt) + self.max_tokens

    def known_tokens(self) -> npt.NDArray[np.int32]:
        """Prompt and outputs, int32 [num_known]."""
        if not self.outputs:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.outputs, np.int32)])
