"""The decoder on the Triton kernels, in their interpreter: every product fused, six a layer.

TRITON_INTERPRET=1 python -m pytest tests/engine/models/test_interpreted.py
"""

import os
from collections import Counter

import pytest
import torch

from millrace.engine.models.decoder import Decoder
from millrace.engine.models.forward_batch import ForwardBatch, KVCache
from millrace.engine.models.registry import model_config
from millrace.engine.weights.checkpoint import open_checkpoint
from millrace.kernels.attention import AttentionBatch
from millrace.kernels.dispatch import operations

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
    # Masked lanes compute what is not written; NumPy, which plays the GPU here, warns of that.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CPU = torch.device("cpu")
BLOCK_SIZE = 16
LONG_CONTEXT = 300  # two splits of attention
FAMILIES = ["llama_with_biases", "qwen3", "qwen2"]  # biases; norms of q and k; a tied embedding
TOKENS = torch.tensor([7, 100, 33, 5])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, save_model):
    return save_model(request.param)


def load(path, deterministic):
    checkpoint = open_checkpoint(path)
    config = model_config(checkpoint.config, checkpoint.generation_config)
    ops = operations(CPU, "triton", deterministic)
    decoder = Decoder(config, checkpoint, ops, torch.float32, CPU, max_context=512)
    shape = (32, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    return decoder, KVCache.allocate(config.num_layers, shape, torch.float32, CPU)


def batch_of(token_ids, start, max_context=None):
    """One sequence in blocks 0, 1, ...: a decode if it is one token."""
    count, end = len(token_ids), start + len(token_ids)
    positions = torch.arange(start, end)
    return ForwardBatch(
        token_ids=token_ids,
        positions=positions,
        write_index=positions,
        attention=AttentionBatch(
            block_table=torch.arange(32, dtype=torch.int32)[None],
            slots=torch.tensor([0]),
            query_start=torch.tensor([0, count], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            max_query_len=count,
            max_context_len=max_context or end,
            num_decodes=int(count == 1),
        ),
    )


@pytest.mark.parametrize("deterministic", [True, False], ids=["fused chain", "plain chain"])
def test_a_chunk_and_a_decode_have_the_logits_of_transformers(model, deterministic):
    decoder, cache = load(model.path, deterministic)
    with torch.inference_mode():
        hidden = [decoder.forward(batch_of(TOKENS[:3], 0), cache)]
        hidden.append(decoder.forward(batch_of(TOKENS[3:], 3), cache))
        logits = decoder.logits(torch.cat(hidden))
        expected = model.reference(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


@pytest.fixture
def launches(monkeypatch):
    """Counts kernels by name."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counter, launch = Counter(), interpreter.GridExecutor.__call__

    def counted(self, *arguments, **options):
        counter[self.fn.__name__] += 1
        return launch(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return counter


def test_a_decode_step_launches_six_kernels_a_layer_and_two_norms(tiny_llama, launches):
    decoder, cache = load(tiny_llama.path, deterministic=True)
    decoder.forward(batch_of(TOKENS[:1], 0, LONG_CONTEXT), cache)
    layers = decoder.config.num_layers
    assert launches == {
        "decode_kernel": 4 * layers,
        "append_attention_kernel": layers,
        "merge_kernel": layers,
        "rms_norm_kernel": 2,
    }


def test_weights_exist_once(tiny_llama):
    """The fused products and the others read the same memory, gate and up row by row."""
    decoder, _ = load(tiny_llama.path, deterministic=True)
    fused, plain = decoder._fused.layers[1], decoder._plain.layers[1]
    for name in ("qkv", "output", "gate_up", "down"):
        addresses = {getattr(of, name).weight.data_ptr() for of in (fused, plain)}
        assert len(addresses) == 1
    raw = open_checkpoint(tiny_llama.path)
    up = raw.load("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(plain.gate_up.weight[1::2], up)


def test_all_products_share_one_workspace_that_steps_leave_ready(tiny_llama):
    decoder, cache = load(tiny_llama.path, deterministic=True)
    linears = [layer.down for layer in decoder._fused.layers] + [decoder._fused_head.linear]
    workspace = linears[0].workspace
    assert all(linear.workspace is workspace for linear in linears)
    decoder.forward(batch_of(TOKENS[:1], 0), cache)
    assert not workspace.tickets.any()
