"""A GGUF file as a Checkpoint: names, row order and encoding turned back into Hugging Face's.

llama.cpp's converter renames the tensors and, for the llama architecture alone, reorders the rows
of the query and key projections so that its rotary embedding finds the two halves of a pair side
by side. Both are undone here, and quantised blocks become float32 (formulas: `gguf.quants`, which
follows ggml-quants.c), so that nothing above needs to know where a tensor came from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from millrace.engine.errors import UnsupportedModel, WeightsError
from millrace.engine.weights.gguf_config import ROPE_FACTORS, read_config, special_tokens
from millrace.engine.weights.gguf_header import GGUFFile, TensorEntry, read_gguf

OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)", re.ASCII)
Kind = GGMLQuantizationType
FLOAT_KINDS = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
QUANTISED_KINDS = frozenset(
    {
        *(Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.IQ4_NL, Kind.IQ4_XS),
        *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    }
)
# Elements dequantised at once: temporaries then stay in the cache and the cost of a call vanishes.
# Measured 2 to 9 times as fast as `dequantize` on a whole tensor, which takes 16 rows at a time.
CHUNK = 2**17


class GGUFCheckpoint:
    """The Checkpoint of one .gguf file; see `checkpoint.py` for the contract."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises WeightsError or UnsupportedModel naming the file and the part."""
        self._file = read_gguf(path)
        _check_kinds(self._file)
        shapes = {name: entry.shape for name, entry in self._file.tensors.items()}
        factors = self._rope_factors()
        self.config: dict[str, Any] = read_config(self._file.metadata, shapes, factors, path)
        self.generation_config: dict[str, Any] = special_tokens(
            self._file.metadata, self.config["vocab_size"]
        )
        layers = self.config["num_hidden_layers"]
        self._gguf_name = {
            _hf_name(name, layers, path): name for name in shapes if name != ROPE_FACTORS
        }

    def names(self) -> list[str]:
        """Return all tensor names; Llama 3's RoPE factors are in the config, not among them."""
        return list(self._gguf_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of `name`; raises WeightsError if there is no such tensor."""
        return self._entry(name).shape

    def load(self, name: str) -> torch.Tensor:
        """Read `name`: F32, F16 and BF16 in their own dtype, all other encodings as float32."""
        entry = self._entry(name)
        tensor = _decode(self._file, entry)
        if self._file.metadata["general.architecture"] == "llama":
            if ".self_attn.q_proj." in name:
                return self._restore_rows(tensor, name, self.config["num_attention_heads"])
            if ".self_attn.k_proj." in name:
                return self._restore_rows(tensor, name, self.config["num_key_value_heads"])
        return tensor

    def _rope_factors(self) -> list[float] | None:
        entry = self._file.tensors.get(ROPE_FACTORS)
        return None if entry is None else _decode(self._file, entry).flatten().tolist()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._gguf_name:
            raise WeightsError(f"{self._file.path}: tensor {name} is missing")
        return self._file.tensors[self._gguf_name[name]]

    def _restore_rows(self, tensor: torch.Tensor, name: str, heads: int) -> torch.Tensor:
        """Undo `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py.

        That took each head's rows from [2 halves, D/2] to [D/2, 2]; weights and biases alike.
        """
        if tensor.shape[0] % (2 * heads):
            raise WeightsError(
                f"{self._file.path}: tensor {name} has {tensor.shape[0]} rows, not a multiple of "
                f"2 x {heads} heads"
            )
        pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)


def _hf_name(name: str, layers: int, path: Path) -> str:
    """Translate a name; a tensor that the decoder would ignore is an error, not a shrug."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    match = LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in LAYER_NAMES:
        raise UnsupportedModel(f"{path}: tensor {name} is not part of a model that Millrace runs")
    if str(int(match[1])) != match[1] or int(match[1]) >= layers:
        raise WeightsError(f"{path}: tensor {name} belongs to none of the {layers} layers")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"


def _check_kinds(file: GGUFFile) -> None:
    for name, entry in file.tensors.items():
        if entry.kind not in FLOAT_KINDS and entry.kind not in QUANTISED_KINDS:
            raise UnsupportedModel(
                f"{file.path}: tensor {name} has type {entry.kind.name}, which is not served"
            )


def _decode(file: GGUFFile, entry: TensorEntry) -> torch.Tensor:
    """Copy floats, dequantise all else."""
    stored = np.frombuffer(file.data, np.uint8, entry.size, entry.offset)
    if entry.kind in FLOAT_KINDS:
        return torch.from_numpy(stored.copy()).view(FLOAT_KINDS[entry.kind]).reshape(entry.shape)
    block, block_bytes = GGML_QUANT_SIZES[entry.kind]
    values = np.empty(entry.size // block_bytes * block, np.float32)
    for start in range(0, values.size, CHUNK):
        first, last = (index // block * block_bytes for index in (start, start + CHUNK))
        values[start : start + CHUNK] = dequantize(stored[None, first:last], entry.kind)[0]
    return torch.from_numpy(values).reshape(entry.shape)
