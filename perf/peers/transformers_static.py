"""transformers' static-batch `generate`, as a process that measures when told to.

    python -m millrace.perf.peers.transformers_static THREADS DTYPE [MODEL]

THREADS 0 leaves their number to torch. What it reads and prints is in process.py. All prompts have
one length and all outputs another, so nothing is padded: a static batch at its best.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

from millrace.engine.weights.locate import ModelLocation, resolve


def main() -> None:
    threads, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    if threads:
        torch.set_num_threads(threads)
    model = load(resolve(sys.argv[3] if len(sys.argv) > 3 else None), dtype)
    print(json.dumps({"version": transformers.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        tokens = generate(model, asked["prompts"], asked["output_tokens"])
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
def generate(model: Any, prompts: list[list[int]], output_tokens: int) -> int:
    """Generate one greedy batch; returns how many tokens came out."""
    batch = torch.tensor(prompts)
    output = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        do_sample=False,
        min_new_tokens=output_tokens,
        max_new_tokens=output_tokens,
        pad_token_id=0,
    )
    return int(output[:, batch.shape[1] :].numel())


if __name__ == "__main__":
    main()
