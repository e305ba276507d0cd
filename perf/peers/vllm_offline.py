"""vLLM's offline `LLM`, as a process that measures when told to.

    python perf/peers/vllm_offline.py '{"model": FOLDER, "dtype": ..., ...}'

The argument is the keywords of `vllm.LLM`. It makes the engine and prints {"version": ...}. Then
each line on its standard input, {"prompts": [[token id, ...], ...], "output_tokens": N}, makes it
answer all prompts at once, greedily, and print {"output_tokens": ..., "seconds": ...}.

It imports nothing of Millrace, because vLLM often lives in an environment of its own. Both of them
pin their torch. What vLLM itself prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO


def main() -> None:
    """Serve standard input to its end."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(**json.loads(sys.argv[1]))
    _say(answers, {"version": vllm.__version__})
    for line in sys.stdin:
        asked = json.loads(line)
        _say(answers, _measure(llm, asked["prompts"], asked["output_tokens"]))


def _measure(llm: Any, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0,
        min_tokens=output_tokens,
        max_tokens=output_tokens,
        ignore_eos=True,
        detokenize=False,
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    began = time.perf_counter()
    done = llm.generate(inputs, greedy, use_tqdm=False)
    seconds = time.perf_counter() - began
    made = sum(len(output.token_ids) for answer in done for output in answer.outputs)
    return {"output_tokens": made, "seconds": seconds}


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    main()
