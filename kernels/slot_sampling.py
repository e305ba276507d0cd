"""Sampling parameters as the kernels read them: dense tensors on the device, indexed by slot.

`SlotValues` is one request's parameters on the host, checked; `SlotSampling.write` puts them into
a slot. `sampling.py` says what each parameter does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from millrace.kernels.checks import expect
from millrace.kernels.token_mask import ALL, mask_of, words_of

MAX_STOP_IDS = 80
NO_ID = -1
"""Pads a slot's stop ids."""
SEED_BITS = 64
NO_FILTERS, HEAD_FILTERS, RARE_FILTERS = 0, 1, 2
"""What a row's filters are: top-k, top-p and min-p cut a head off; the others are rare."""
NO_LOGPROBS, RAW_LOGPROBS, PROCESSED_LOGPROBS = 0, 1, 2
"""What a drawn token is scored by: nothing, the model's logits, or those it was drawn from."""
SCALARS = (
    *("temperature", "top_k", "top_p", "min_p"),
    *("temperature_last", "top_n_sigma", "typical_p", "xtc_probability", "xtc_threshold"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs"),
)
"""The columns of `SlotSampling.scalars`: a kernel finds all numbers of a slot in one row."""
FLAG_OF = {
    "bias": "has_bias",
    "allowed": "has_bans",
    "prompt_seen": "has_penalties",
    "output_counts": "has_penalties",
}
"""Tables over the vocabulary: a slot's row is read only where its flag is set, else it is stale."""


def _column(name: str) -> property:
    """A parameter by slot, f32[S]: a view of its column."""
    i_column = SCALARS.index(name)

    def column(self: "SlotSampling") -> Tensor:
        return self.scalars[:, i_column]

    return property(column)


@dataclass(frozen=True)
class SlotValues:
    """What one request asks of the sampler. The defaults are neutral: greedy, nothing edited.

    A repetition penalty applies to the prompt and the output, the other two to the output alone.
    `stop_ids` are banned at positions below `min_position`. `bias` is added to the logits, and
    -inf bans. With `allowed_ids` every other token is banned. A ban outweighs any bias.
    `prompt_ids` and `output_ids` are the tokens known so far, read only if a penalty is on; a
    request that returns after preemption brings its output along. ValueError names the value and
    its limit.
    """

    temperature: float = 0.0  # 0 = greedy
    temperature_last: bool = False  # filters look at temperature 1
    top_n_sigma: float = 0.0  # 0 = off
    top_k: int = 0  # 0 = off
    typical_p: float = 1.0  # 1 = off
    top_p: float = 1.0  # 1 = off
    min_p: float = 0.0  # 0 = off
    xtc_probability: float = 0.0  # 0 = off
    xtc_threshold: float = 0.1
    repetition_penalty: float = 1.0  # 1 = off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int = NO_LOGPROBS  # RAW_LOGPROBS or PROCESSED_LOGPROBS
    seed: int = 0  # taken modulo 2^64
    stop_ids: Sequence[int] = ()
    min_position: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed_ids: Sequence[int] | None = None
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        inf = math.inf
        _check("temperature", self.temperature, 0 <= self.temperature < inf, "finite, >= 0")
        _check("top_n_sigma", self.top_n_sigma, 0 <= self.top_n_sigma < inf, "finite, >= 0")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0")
        for name in ("typical_p", "top_p"):
            _check(name, getattr(self, name), 0 < getattr(self, name) <= 1, "in (0, 1]")
        for name in ("min_p", "xtc_probability", "xtc_threshold"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0 < penalty < inf, "finite, > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), math.isfinite(getattr(self, name)), "finite")
        kinds = (NO_LOGPROBS, RAW_LOGPROBS, PROCESSED_LOGPROBS)
        _check("logprobs", self.logprobs, self.logprobs in kinds, "0, 1 or 2")
        stops = len(self.stop_ids)
        _check("stop_ids", f"{stops} ids", stops <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} ids")
        for token_id, value in self.bias.items():
            _check(f"bias[{token_id}]", value, value < inf, "a number below +inf")

    @property
    def has_bias(self) -> bool:
        return any(value > -math.inf for value in self.bias.values())

    @property
    def has_bans(self) -> bool:
        return self.allowed_ids is not None or -math.inf in self.bias.values()

    @property
    def filter_kind(self) -> int:
        rare = self.top_n_sigma > 0 or self.typical_p < 1 or self.xtc_probability > 0
        head = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        if rare or (head and self.temperature_last):
            return RARE_FILTERS
        return HEAD_FILTERS if head else NO_FILTERS

    @property
    def has_penalties(self) -> bool:
        additive = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1 or any(additive)


@dataclass
class SlotSampling:
    """Sampling parameters of S slots over a vocabulary of V, all on one device."""

    scalars: Tensor  # f32[S, len(SCALARS)]; each column also goes by its name
    filter_kind: Tensor  # i8[S], NO_FILTERS, HEAD_FILTERS or RARE_FILTERS
    seed: Tensor  # i64[S]
    bias: Tensor  # f32[S, V], finite, added to the logits; read where has_bias
    has_bias: Tensor  # bool[S]
    allowed: Tensor  # i32[S, words_of(V)], see `token_mask.py`; others are banned; where has_bans
    has_bans: Tensor  # bool[S]
    prompt_seen: Tensor  # bool[S, V]; read where has_penalties
    output_counts: Tensor  # i32[S, V]; read where has_penalties
    has_penalties: Tensor  # bool[S]
    stop_ids: Tensor  # i32[S, MAX_STOP_IDS], padded with NO_ID
    min_position: Tensor  # i64[S]; stop ids are banned at positions below it

    @classmethod
    def zeros(cls, slots: int, vocab: int, device: torch.device | str = "cpu") -> "SlotSampling":
        """Neutral parameters for every slot."""

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((slots, *shape), value, dtype=dtype, device=device)

        neutral = [float(getattr(SlotValues, name)) for name in SCALARS]
        return cls(
            scalars=torch.tensor(neutral, dtype=torch.float32, device=device).repeat(slots, 1),
            filter_kind=full(NO_FILTERS, torch.int8),
            seed=full(0, torch.int64),
            bias=full(0, torch.float32, vocab),
            has_bias=full(False, torch.bool),
            allowed=full(ALL, torch.int32, words_of(vocab)),
            has_bans=full(False, torch.bool),
            prompt_seen=full(False, torch.bool, vocab),
            output_counts=full(0, torch.int32, vocab),
            has_penalties=full(False, torch.bool),
            stop_ids=full(NO_ID, torch.int32, MAX_STOP_IDS),
            min_position=full(0, torch.int64),
        )

    def __post_init__(self) -> None:
        slots, vocab = self.bias.shape
        expect("scalars", self.scalars, (slots, len(SCALARS)), torch.float32)
        expect("filter_kind", self.filter_kind, (slots,), torch.int8)
        for name in ("has_bias", "has_bans", "has_penalties"):
            expect(name, getattr(self, name), (slots,), torch.bool)
        for name in ("seed", "min_position"):
            expect(name, getattr(self, name), (slots,), torch.int64)
        expect("bias", self.bias, (slots, vocab), torch.float32)
        expect("allowed", self.allowed, (slots, words_of(vocab)), torch.int32)
        expect("prompt_seen", self.prompt_seen, (slots, vocab), torch.bool)
        expect("output_counts", self.output_counts, (slots, vocab), torch.int32)
        expect("stop_ids", self.stop_ids, (slots, MAX_STOP_IDS), torch.int32)

    temperature, temperature_last = _column("temperature"), _column("temperature_last")
    top_n_sigma, top_k = _column("top_n_sigma"), _column("top_k")
    typical_p, top_p, min_p = _column("typical_p"), _column("top_p"), _column("min_p")
    xtc_probability, xtc_threshold = _column("xtc_probability"), _column("xtc_threshold")
    repetition_penalty = _column("repetition_penalty")
    presence_penalty = _column("presence_penalty")
    frequency_penalty, logprobs = _column("frequency_penalty"), _column("logprobs")

    @property
    def slots(self) -> int:
        return self.bias.shape[0]

    @property
    def vocab(self) -> int:
        return self.bias.shape[1]

    @property
    def device(self) -> torch.device:
        return self.bias.device

    def write(self, slot: int, values: SlotValues) -> None:
        """Give `slot` these values. ValueError where an id is not below V."""
        self._check_ids(values)
        row = [float(getattr(values, name)) for name in SCALARS]
        row[SCALARS.index("top_k")] = min(values.top_k, self.vocab)
        self.scalars[slot] = self._tensor(row, torch.float32)
        self.filter_kind[slot] = values.filter_kind
        self.min_position[slot] = values.min_position
        self.seed[slot] = _as_int64(values.seed)
        padding = [NO_ID] * (MAX_STOP_IDS - len(values.stop_ids))
        self.stop_ids[slot] = self._tensor([*values.stop_ids, *padding], torch.int32)
        for flag in set(FLAG_OF.values()):
            getattr(self, flag)[slot] = getattr(values, flag)
        if values.has_bias:
            self._write_bias(self.bias[slot], values.bias)
        if values.has_bans:
            self.allowed[slot] = self._mask_of(values)
        if values.has_penalties:
            self._write_history(slot, values)

    def record(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count sampled tokens as output: slots i64[R], each at most once, token_ids i64[R]."""
        self.output_counts[slots, token_ids] += 1

    def _write_bias(self, row: Tensor, bias: Mapping[int, float]) -> None:
        finite = {token_id: value for token_id, value in bias.items() if value > -math.inf}
        row.zero_()
        ids = self._tensor(list(finite), torch.int64)
        row[ids] = self._tensor(list(finite.values()), torch.float32)

    def _mask_of(self, values: SlotValues) -> Tensor:
        banned = [token_id for token_id, value in values.bias.items() if value == -math.inf]
        words = ~mask_of(self._tensor(banned, torch.int64), self.vocab)
        if values.allowed_ids is not None:
            words &= mask_of(self._tensor(values.allowed_ids, torch.int64), self.vocab)
        return words

    def _write_history(self, slot: int, values: SlotValues) -> None:
        self.prompt_seen[slot] = False
        self.prompt_seen[slot, self._tensor(values.prompt_ids, torch.int64)] = True
        output = self._tensor(values.output_ids, torch.int64)
        self.output_counts[slot] = torch.bincount(output, minlength=self.vocab)

    def _check_ids(self, values: SlotValues) -> None:
        for name in ("stop_ids", "bias", "allowed_ids", "prompt_ids", "output_ids"):
            ids = getattr(values, name) or ()
            _check(name, f"id {max(ids, default=0)}", max(ids, default=0) < self.vocab, self._limit)
            _check(name, f"id {min(ids, default=0)}", min(ids, default=0) >= 0, self._limit)

    @property
    def _limit(self) -> str:
        return f"ids in [0, {self.vocab})"

    def _tensor(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _as_int64(seed: int) -> int:
    """The signed integer with the same low 64 bits."""
    seed %= 1 << SEED_BITS
    return seed - (1 << SEED_BITS) if seed >> (SEED_BITS - 1) else seed


def _check(name: str, value: object, fits: bool, limit: str) -> None:
    if not fits:
        raise ValueError(f"{name}: expected {limit}, got {value}")
