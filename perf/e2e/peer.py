"""The peer beside the engine: transformers' `generate` on the same shape, device and dtype."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import torch

from millrace.perf.e2e.drive import Scale
from millrace.perf.e2e.row import recorded
from millrace.perf.kernels.session import Session, Skip

OTHERS = {
    "vllm": "measured by its own part (--only vllm)",
    "sglang": "not driven",
}


def measure_peer(session: Session, scale: Scale, name: str, streams: int) -> None:
    """One row: greedy tokens a second of a static batch of equal lengths, so nothing is padded."""
    with recorded(session, "transformers", f"{name}, {streams} at once") as row:
        row.metric = "tokens/s"
        row.facts = _measure(scale, scale.shapes[name], streams)
        row.value = row.facts.pop("tokens_per_s")


def record_absent(session: Session) -> None:
    """A row for each engine that is not measured here, so that its absence is on record."""
    for name, otherwise in OTHERS.items():
        with recorded(session, name, "as a peer"):
            raise Skip("not installed on this machine" if find_spec(name) is None else otherwise)


def _measure(scale: Scale, config: dict[str, Any], streams: int) -> dict[str, Any]:
    import transformers

    fields = {name: value for name, value in config.items() if name != "architectures"}
    with torch.device(scale.settings["device"]):
        model_config = transformers.LlamaConfig(**fields)
        make: Any = transformers.AutoModelForCausalLM.from_config
        model = make(model_config, dtype=scale.dtype).eval()
        prompts = torch.randint(3, config["vocab_size"], (streams, scale.prompt_tokens))
    _generate(model, prompts, 2)  # warm up
    began = time.perf_counter()
    tokens = _generate(model, prompts, scale.peer_output_tokens)
    rate = tokens / (time.perf_counter() - began)
    facts = {"prompt_tokens": scale.prompt_tokens, "output_tokens": scale.peer_output_tokens}
    return {"tokens_per_s": rate, **facts, "version": transformers.__version__}


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
