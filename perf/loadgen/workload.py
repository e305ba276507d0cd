"""What is sent and when: drawn from a seed before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millrace.v1 import inference_pb2 as pb


def random_ids(num_tokens: int, vocab_size: int, seed: Sequence[int]) -> list[int]:
    """Token ids in [0, vocab_size), distinct within a prompt where the vocabulary allows it."""
    draw = np.random.default_rng(seed)
    ids: list[int] = draw.choice(vocab_size, num_tokens, replace=num_tokens > vocab_size).tolist()
    return ids


def random_requests(
    count: int, prompt_tokens: int, output_tokens: int, vocab_size: int, seed: Sequence[int]
) -> list[pb.GenerateRequest]:
    """Greedy requests for exactly `output_tokens`, on prompts that share no prefix."""
    return [
        pb.GenerateRequest(
            request_id=f"load-{index}",
            prompt=pb.Prompt(
                token_ids=pb.TokenIds(ids=random_ids(prompt_tokens, vocab_size, [*seed, index]))
            ),
            sampling=pb.SamplingParams(temperature=0.0),
            stopping=pb.Stopping(max_tokens=output_tokens, ignore_eos=True),
        )
        for index in range(count)
    ]


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which each request is due: a Poisson process of `rate` per second.

    As it is drawn; the gaps are not rescaled to fit a duration, which would make them dependent.
    """
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, count)
    arrivals: list[float] = np.cumsum(gaps).tolist()
    return arrivals
