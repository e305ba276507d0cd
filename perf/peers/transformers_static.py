"""transformers' static-batch `generate`, as a process that measures when told to.

    python -m millrace.perf.peers.transformers_static BATCH PROMPT OUTPUT THREADS DTYPE [MODEL]

PROMPT and OUTPUT are tokens; THREADS 0 leaves their number to torch. It loads the model and prints
"ready". Then each line on its standard input, two integers that seed the prompts, makes it generate
one batch and print {"output_tokens": ..., "seconds": ...}. All prompts have one length and all
outputs another, so nothing is padded: a static batch at its best.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

from millrace.engine.weights.locate import ModelLocation, resolve
from millrace.perf.loadgen.workload import random_ids


def main() -> None:
    batch, prompt_tokens, output_tokens, threads = map(int, sys.argv[1:5])
    if threads:
        torch.set_num_threads(threads)
    dtype: torch.dtype = getattr(torch, sys.argv[5])
    model = load(resolve(sys.argv[6] if len(sys.argv) > 6 else None), dtype)
    generate(model, batch, prompt_tokens, 2, [0, 0])  # warm up
    print("ready", flush=True)
    for line in sys.stdin:
        seed = [int(word) for word in line.split()]
        began = time.perf_counter()
        tokens = generate(model, batch, prompt_tokens, output_tokens, seed)
        seconds = time.perf_counter() - began
        print(json.dumps({"output_tokens": tokens, "seconds": seconds}), flush=True)


def load(location: ModelLocation, dtype: torch.dtype) -> Any:
    """The model in one dtype, its quantised weights (of GGUF) turned into such beforehand."""
    options: dict[str, Any] = {"dtype": dtype}
    folder = location.path
    if location.format == "gguf":
        folder = location.path.parent
        options["gguf_file"] = location.path.name
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()  # type: ignore[no-untyped-call]


@torch.inference_mode()
def generate(
    model: Any, batch: int, prompt_tokens: int, output_tokens: int, seed: list[int]
) -> int:
    """Generate one greedy batch; returns how many tokens came out."""
    vocab_size = model.config.vocab_size
    rows = [random_ids(prompt_tokens, vocab_size, [*seed, row]) for row in range(batch)]
    prompts = torch.tensor(rows)
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=output_tokens,
        max_new_tokens=output_tokens,
        pad_token_id=0,
    )
    return int(output[:, prompt_tokens:].numel())


if __name__ == "__main__":
    main()
