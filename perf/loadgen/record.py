"""Record: one request as its client saw it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from millrace.v1 import inference_pb2 as pb

OK = "OK"


@dataclass(slots=True)
class Record:
    """Times are seconds of time.perf_counter(); `row` makes them relative to the run's start."""

    request_id: str
    intended_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: str = OK  # name of the gRPC status that ended it
    message: str = ""  # of that status
    token_times_s: list[list[float]] = field(default_factory=list)  # arrivals, by output
    token_ids: list[list[int]] = field(default_factory=list)  # likewise
    tenant: str = ""
    usage: pb.Usage | None = None  # as the server counted; None: it never came to that

    @property
    def ok(self) -> bool:
        """It ended as it should, with as many tokens as the server says."""
        return self.status == OK and self.usage is not None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def ttft_s(self) -> float | None:
        firsts = [times[0] for times in self.token_times_s if times]
        return min(firsts) - self.intended_s if firsts else None

    @property
    def e2el_s(self) -> float:
        return self.ended_s - self.intended_s

    @property
    def gaps_s(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for times in self.token_times_s for a, b in pairwise(times)]

    @property
    def tpot_s(self) -> list[float]:
        """Time per output token after the first, one value for each output that has two tokens."""
        return [(t[-1] - t[0]) / (len(t) - 1) for t in self.token_times_s if len(t) > 1]

    def take(self, response: pb.GenerateResponse) -> None:
        """Note what came just now."""
        now_s = time.perf_counter()
        for output in response.outputs:
            while len(self.token_ids) <= output.index:
                self.token_ids.append([])
                self.token_times_s.append([])
            self.token_ids[output.index] += output.token_ids
            self.token_times_s[output.index] += [now_s] * len(output.token_ids)
        if response.HasField("summary"):
            self.usage = response.summary.usage

    def end(self, status: str = OK, message: str = "") -> None:
        """Note the end; a count of tokens that differs from the server's is a failure."""
        self.ended_s = time.perf_counter()
        self.status, self.message = status, message
        if self.usage is not None and self.usage.output_tokens != self.num_tokens:
            self.status = "DATA_LOSS"
            self.message = f"{self.num_tokens} tokens came of {self.usage.output_tokens}"

    def row(self, start_s: float) -> dict[str, Any]:
        """For a file: all that was measured, in seconds after the run's start."""
        return {
            "id": self.request_id,
            "intended_s": self.intended_s - start_s,
            "sent_s": self.sent_s - start_s,
            "ended_s": self.ended_s - start_s,
            "token_times_s": [[t - start_s for t in times] for times in self.token_times_s],
            "tenant": self.tenant,
            "status": self.status,
            "prompt_tokens": self.usage.prompt_tokens if self.usage else None,
            "output_tokens": self.num_tokens,
        }
