"""The peer of the end-to-end part: transformers' `generate` on the same shape, device and dtype."""

from __future__ import annotations

import gc
import time
from importlib.util import find_spec
from typing import Any

import torch

PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 64
DRY_TOKENS = 8
OTHERS = ("vllm", "sglang", "xformers")


def measure(
    config: dict[str, Any], device: str, dtype: torch.dtype, streams: int
) -> dict[str, Any]:
    """Greedy tokens a second of a static batch of equal lengths: nothing is padded."""
    import transformers

    fields = {name: value for name, value in config.items() if name != "architectures"}
    prompt, output = (DRY_TOKENS, DRY_TOKENS) if device == "cpu" else (PROMPT_TOKENS, OUTPUT_TOKENS)
    with torch.device(device):
        model_config = transformers.LlamaConfig(**fields)
        make: Any = transformers.AutoModelForCausalLM.from_config
        model = make(model_config, dtype=dtype).eval()
        prompts = torch.randint(3, config["vocab_size"], (streams, prompt))
    try:
        _generate(model, prompts, 2)  # warm up
        began = time.perf_counter()
        tokens = _generate(model, prompts, output)
        seconds = time.perf_counter() - began
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()
    facts = {"prompt_tokens": prompt, "output_tokens": output, "version": transformers.__version__}
    return {"tokens_per_s": tokens / seconds} | facts


def absent() -> list[dict[str, Any]]:
    """A row for each peer that is not installed here, so that its absence is on record."""
    return [
        {"name": name, "status": "skipped", "error": "not installed on this machine"}
        for name in OTHERS
        if find_spec(name) is None
    ]


@torch.inference_mode()
def _generate(model: Any, prompts: torch.Tensor, output_tokens: int) -> int:
    """Generate one greedy batch; returns how many tokens came out, once they are on the host."""
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=output_tokens,
        max_new_tokens=output_tokens,
        pad_token_id=0,
    )
    return int(made[:, prompts.shape[1] :].cpu().numel())
