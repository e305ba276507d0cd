from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.weights.checkpoint import take
from millrace.engine.weights.gguf import CHUNK, GGUFCheckpoint

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 16, 80, 2
EMBEDDING = "model.embed_tokens.weight"

# ------------------------------------------------------------------ whole models


def hf_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a small model, named and shaped as transformers has them."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (FFN, HIDDEN),
        "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    if arch in ("qwen2", "llama"):  # Llama may have biases too, and llama.cpp permutes those
        layer["self_attn.q_proj.bias"] = (q,)
        layer |= {"self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if arch == "qwen3":
        layer |= {"self_attn.q_norm.weight": (HEAD_DIM,), "self_attn.k_norm.weight": (HEAD_DIM,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for index in range(LAYERS):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def converted(arch: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names by the gguf package's own map, rows as llama.cpp's convert_hf_to_gguf.py permutes."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
    out = {}
    for name, tensor in tensors.items():
        heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else None
        if arch == "llama" and heads is not None:
            halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        out[gguf_name] = tensor
    return out


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_converted_model_comes_back_as_it_was(arch: str, write_gguf) -> None:
    random = np.random.default_rng(1)
    original = {
        name: random.standard_normal(shape, np.float32) for name, shape in hf_shapes(arch).items()
    }
    checkpoint = GGUFCheckpoint(write_gguf(arch=arch, tensors=converted(arch, original)))

    assert sorted(checkpoint.names()) == sorted(original)
    for name, expected in original.items():
        assert checkpoint.shape(name) == expected.shape
        loaded = take(checkpoint, name, expected.shape)
        assert loaded.is_contiguous()
        np.testing.assert_array_equal(loaded.numpy(), expected, err_msg=name)


def test_generation_config_has_the_special_tokens(write_gguf) -> None:
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    checkpoint = GGUFCheckpoint(write_gguf(metadata=ids))
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert checkpoint.config["eos_token_id"] == 2


def test_llama3_factors_are_config_not_a_tensor(write_gguf) -> None:
    turns = 8192 * 10000.0 ** (-np.arange(8) / 8) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    tensors = {
        "token_embd.weight": np.ones((80, 64), np.float32),
        "output_norm.weight": np.ones(64, np.float32),
        "rope_freqs.weight": (1 / ((1 - smooth) / 16 + smooth)).astype(np.float32),
    }
    checkpoint = GGUFCheckpoint(write_gguf(tensors=tensors))
    assert checkpoint.config["rope_scaling"]["rope_type"] == "llama3"
    assert checkpoint.config["rope_scaling"]["factor"] == 16.0
    assert sorted(checkpoint.names()) == [EMBEDDING, "model.norm.weight"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("blk.0.ffn_gate_exps.weight", UnsupportedModel),
        ("blk.0.attn_qkv.weight", UnsupportedModel),
        ("blk.0.attn_q.scale", UnsupportedModel),
        ("v.patch_embd.weight", UnsupportedModel),
        ("blk.2.attn_q.weight", WeightsError),
        ("blk.00.attn_q.weight", WeightsError),
    ],
)
def test_a_tensor_that_would_be_ignored_is_refused_by_name(name, error, write_gguf) -> None:
    vector = np.ones(64, np.float32)
    tensors = {
        "token_embd.weight": np.ones((8, 64), np.float32),
        name: vector,
        "output.weight": vector,
    }
    with pytest.raises(error, match=name.replace(".", r"\.")):
        GGUFCheckpoint(write_gguf(tensors=tensors))


def test_query_rows_that_are_not_whole_heads_are_refused_by_name(write_gguf) -> None:
    tensors = {
        "token_embd.weight": np.ones((8, 64), np.float32),
        "blk.0.attn_q.weight": np.ones((60, 64), np.float32),
    }
    checkpoint = GGUFCheckpoint(write_gguf(tensors=tensors))
    with pytest.raises(WeightsError, match=r"layers\.0\.self_attn\.q_proj\.weight has 60 rows"):
        checkpoint.load("model.layers.0.self_attn.q_proj.weight")


def test_a_missing_tensor_is_named(write_gguf) -> None:
    checkpoint = GGUFCheckpoint(write_gguf())
    for read in (checkpoint.load, checkpoint.shape):
        with pytest.raises(WeightsError, match=r"lm_head\.weight is missing"):
            read("lm_head.weight")


# ------------------------------------------------------------------ encodings


def load_one(write_gguf, data: np.ndarray, kind: Kind | None = None) -> torch.Tensor:
    tensor = data if kind is None else (data, kind)
    tensors = {"token_embd.weight": tensor, "output_norm.weight": np.ones(2, np.float32)}
    return GGUFCheckpoint(write_gguf(tensors=tensors)).load(EMBEDDING)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F32, torch.float32), (Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)],
)
def test_floats_keep_their_dtype_and_bits(kind: Kind, dtype: torch.dtype, write_gguf) -> None:
    values = np.random.default_rng(2).standard_normal((48, 64), np.float32)
    loaded = load_one(write_gguf, gguf.quants.quantize(values, kind), kind)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, torch.from_numpy(values).to(dtype))


# The largest error of each encoding, as a share of its block's largest value or range: half a step,
# a whole one where the two ends of the range are not alike (Q4_0, Q5_0); and fp16 scales.
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        (Kind.Q8_0, 0.5 / 127 + 1e-3),
        (Kind.Q4_0, 1 / 8 + 1e-3),
        (Kind.Q4_1, 1 / 15 + 2e-3),
        (Kind.Q5_0, 1 / 16 + 1e-3),
        (Kind.Q5_1, 1 / 31 + 2e-3),
    ],
)
def test_quantised_blocks_come_back_within_their_step(kind: Kind, share, write_gguf) -> None:
    values = np.random.default_rng(3).standard_normal((48, 64), np.float32)
    loaded = load_one(write_gguf, gguf.quants.quantize(values, kind), kind)
    assert loaded.dtype == torch.float32
    assert loaded.shape == (48, 64)
    error = np.abs(loaded.numpy() - values).reshape(-1, 32).max(axis=1)
    assert (error <= share * np.abs(values).reshape(-1, 32).max(axis=1)).all()


def random_blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random bits with finite fp16 scales, wherever in a block those are."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(4).integers(0, 256, (rows * columns // block, size), np.uint8)
    scales = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}
    for offset in scales.get(kind, (208,) if kind is Kind.Q6_K else (0,)):
        data[:, offset : offset + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind",
    [Kind.Q8_0, Kind.IQ4_NL, Kind.IQ4_XS, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K],
)
def test_chunks_meet_without_a_seam(kind: Kind, write_gguf) -> None:
    rows = CHUNK // 256 + 5  # one whole chunk and a short one
    data = random_blocks(kind, rows, 256)
    loaded = load_one(write_gguf, data, kind)
    np.testing.assert_array_equal(loaded.numpy(), gguf.quants.dequantize(data, kind))


def q4_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q4_K of ggml-quants.c, one block of 256."""
    d, dmin = (float(x) for x in block[:4].view(np.float16))
    scales, quants = [int(x) for x in block[4:16]], [int(x) for x in block[16:]]
    out = []
    for index in range(8):
        if index < 4:
            scale, low = scales[index] & 63, scales[index + 4] & 63
        else:
            scale = (scales[index + 4] & 15) | ((scales[index - 4] >> 6) << 4)
            low = (scales[index + 4] >> 4) | ((scales[index] >> 6) << 4)
        for byte in quants[index // 2 * 32 :][:32]:
            out.append(d * scale * (byte >> 4 if index % 2 else byte & 15) - dmin * low)
    return out


def q6_k(block: np.ndarray) -> list[float]:
    """dequantize_row_q6_K of ggml-quants.c, one block of 256."""
    low, high = [int(x) for x in block[:128]], [int(x) for x in block[128:192]]
    scales, d = block[192:208].view(np.int8), float(block[208:].view(np.float16)[0])
    out = []
    for half in range(2):
        for quarter in range(4):
            for lane in range(32):
                byte = low[half * 64 + quarter % 2 * 32 + lane]
                nibble = byte & 15 if quarter < 2 else byte >> 4
                top = high[half * 32 + lane] >> (2 * quarter) & 3
                scale = int(scales[half * 8 + quarter * 2 + lane // 16])
                out.append(d * scale * ((nibble | top << 4) - 32))
    return out


@pytest.mark.parametrize(("kind", "formula"), [(Kind.Q4_K, q4_k), (Kind.Q6_K, q6_k)])
def test_k_quants_follow_the_formula_of_ggml(kind: Kind, formula, write_gguf) -> None:
    data = random_blocks(kind, 3, 512)
    loaded = load_one(write_gguf, data, kind)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    expected = np.array([formula(block) for block in data.reshape(-1, size)]).reshape(3, 512)
    np.testing.assert_allclose(loaded.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Kind.IQ2_XXS, Kind.TQ1_0, Kind.I32, Kind.F64])
def test_other_encodings_are_refused_by_tensor_and_type(kind: Kind, write_gguf) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    dtype = {Kind.I32: np.int32, Kind.F64: np.float64}.get(kind)
    data = np.zeros((2, size), np.uint8) if dtype is None else np.zeros((2, block), dtype)
    with pytest.raises(UnsupportedModel, match=rf"token_embd\.weight has type {kind.name}"):
        load_one(write_gguf, data, kind)
