"""The decoder against transformers, in fp32, on random tiny models of every family."""

import pytest
import torch

from millrace.engine.config import EngineConfig
from millrace.engine.core.build import build_core
from millrace.engine.core.messages import NewRequest, StepOutput
from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.models.decoder import Decoder
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.models.registry import model_config
from millrace.engine.sampling_params import SamplingParams
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.engine.weights.locate import ModelLocation
from millrace.kernels.attention import AttentionBatch
from millrace.kernels.dispatch import operations
from millrace.kernels.rope import RopeScaling, yarn_attention_factor

BLOCK_SIZE = 16
CPU = torch.device("cpu")


def load(path):
    checkpoint = open_checkpoint(path)
    config = model_config(checkpoint.config, checkpoint.generation_config)
    ops = operations(CPU)
    return Decoder(config, checkpoint, ops, torch.float32, CPU, max_context=512)


def empty_cache(decoder, num_blocks):
    config = decoder.config
    shape = (num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    cache = KVCache.allocate(config.num_layers, shape, torch.float32, CPU)
    for tensor in cache.keys + cache.values:
        tensor.fill_(torch.nan)  # whatever is read before it is written shows
    return cache


def chunk_batch(token_ids, start, blocks):
    """One row: `token_ids` at positions start.. of a sequence in `blocks`."""
    positions = torch.arange(start, start + len(token_ids))
    table = torch.tensor([blocks], dtype=torch.int32)
    rows = table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    end = start + len(token_ids)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        write_index=rows,
        attention=AttentionBatch(
            block_table=table,
            slots=torch.tensor([0]),
            query_start=torch.tensor([0, len(token_ids)], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=len(token_ids),
            max_context_len=end,
            num_decodes=0,
        ),
    )


@pytest.mark.parametrize("chunks", [[40], [1, 15, 17, 7], [16, 16, 8]], ids=str)
def test_logits_equal_transformers_whatever_the_chunks(tiny_model, chunks):
    decoder = load(tiny_model.path)
    prompt = torch.randint(3, 199, (sum(chunks),), generator=torch.Generator().manual_seed(1))
    cache, blocks, logits, start = empty_cache(decoder, 8), [5, 2, 7], [], 0
    with torch.inference_mode():
        for length in chunks:
            batch = chunk_batch(prompt[start : start + length], start, blocks)
            logits.append(decoder.logits(decoder.forward(batch, cache)))
            start += length
        expected = tiny_model.reference(prompt[None]).logits[0]
    torch.testing.assert_close(torch.cat(logits), expected, atol=2e-4, rtol=2e-4)


def test_greedy_tokens_equal_transformers_in_one_mixed_batch(tiny_model):
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 199, (n,), generator=generator) for n in (1, 5, 16, 33, 90)]
    config = EngineConfig(device="cpu", dtype="float32", max_running=4, max_step_tokens=24)
    core, _ = build_core(config, ModelLocation(tiny_model.path, "tiny", "folder"))
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0)
        ids = prompt.to(torch.int32).numpy().tobytes()
        core.handle(NewRequest(index, ids, params, 20, [2], 0.0))
    got = {index: [] for index in range(len(prompts))}
    while not core.is_idle:
        for message in core.step():
            if isinstance(message, StepOutput):
                for delta in message.deltas:
                    got[delta.id] += delta.token_ids
    for index, prompt in enumerate(prompts):
        with torch.inference_mode():
            expected = tiny_model.reference.generate(
                prompt[None], max_new_tokens=20, do_sample=False
            )[0, len(prompt) :]
        assert got[index] == expected.tolist()


def test_unknown_architecture_is_named():
    with pytest.raises(UnsupportedModel, match=r"GPTNeoForCausalLM.*LlamaForCausalLM"):
        model_config({"architectures": ["GPTNeoForCausalLM"]}, {})


def test_missing_config_key_is_named():
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModel, match="num_attention_heads"):
        model_config(config | {"hidden_size": 8}, {})


def test_rope_that_is_not_implemented_is_refused(tiny_model):
    checkpoint = open_checkpoint(tiny_model.path)
    config = checkpoint.config | {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match="longrope"):
        model_config(config, {})


def test_yarn_is_read_with_its_defaults_and_stretches_the_context(tiny_llama):
    config = open_checkpoint(tiny_llama.path).config  # 512 positions
    yarn = {"rope_type": "yarn", "factor": 4.0}
    read = model_config(config | {"rope_parameters": yarn}, {})
    assert read.rope_scaling == RopeScaling(
        "yarn", 4.0, original_max_position=512, attention_factor=yarn_attention_factor(4.0)
    )
    assert read.max_context == 2048
    chosen = {
        "original_max_position_embeddings": 64,
        "attention_factor": 1.5,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
    }
    read = model_config(config | {"rope_parameters": yarn | chosen}, {})
    assert read.rope_scaling == RopeScaling(
        "yarn",
        4.0,
        original_max_position=64,
        attention_factor=1.5,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
    )
    assert read.max_context == 512


def test_mis_shaped_tensor_is_named(tiny_model):
    checkpoint = open_checkpoint(tiny_model.path)
    checkpoint.config["intermediate_size"] += 16
    config = model_config(checkpoint.config, {})
    with pytest.raises(WeightsError, match=r"gate_proj.*80.*96"):
        Decoder(config, checkpoint, operations(CPU), torch.float32, CPU, max_context=64)
