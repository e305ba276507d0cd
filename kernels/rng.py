"""The noise of sampling: Philox4x32-10 turned into Gumbel variates, a pure function of its key.

Philox is the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2,
3" (2011): ten rounds scramble a 128-bit counter under a 64-bit key. The words here equal those of
`tl.philox` bit for bit, so the CPU and the GPU draw from the same noise.

Convention. The noise of (seed, position, token id) is one 32-bit word, and nothing else enters:
not the row, the batch, the vocabulary's size or the launch. A Philox call yields four words, so
tokens go in tiles of 4096 and one tile costs 1024 calls:

    key      = (seed's low 32 bits, seed's high 32 bits)
    counter  = ((id // 4096) * 1024 + id % 1024, position's low 32 bits, purpose, 0)
    word     = output number (id // 1024) % 4
    purpose  = 0 for the draw of a token, 1 for XTC's coin (word 0 of counter 0)

Example: token 5000 lies in tile 1, and 5000 % 4096 = 904 is below 1024, so its noise is word 0 of
counter (1024 + 5000 % 1024, ...) = (1928, position, 0, 0). Token 7000 shares the tile;
(7000 // 1024) % 4 = 2, so it takes word 2 of counter (1024 + 7000 % 1024, ...) = (1880, ...).

From word to Gumbel: u = (word + 0.5) / 2^32 in float32, at most 1 - 2^-24, so u is never 0 or 1,
and g = -log(-log1p(-u)). Winners of an argmax come from u near 0, where float32 is finest, so the
winning tail reaches 22.9; the textbook -log(-log(u)) would cap it near 16.
"""

import torch
from torch import Tensor

TILE = 4096
"""Tokens per tile of the vocabulary. Part of the convention: to change it changes every sample."""
WORDS = 4
CALLS_PER_TILE = TILE // WORDS
PURPOSE_DRAW = 0
PURPOSE_XTC = 1

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_2 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

WORD_SCALE = 2.0**-32
MAX_UNIFORM = 1.0 - 2.0**-24

_BLOCK_TOKENS = 1 << 18  # noise made at a time, so that temporaries stay in the cache


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words; shapes broadcast together.

    A product of two words wraps around in int64 when it passes 2^63, which costs nothing: its low
    half is exact, and the shift's sign bits fall to the mask.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product_0, product_2 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_2
        c0, c2 = ((product_2 >> 32) ^ c1 ^ k0) & MASK, ((product_0 >> 32) ^ c3 ^ k1) & MASK
        c1, c3 = product_2 & MASK, product_0 & MASK
        k0, k1 = (k0 + KEY_STEP_0) & MASK, (k1 + KEY_STEP_1) & MASK
    return c0, c1, c2, c3


def gumbel_noise_at(seeds: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    """Noise of single tokens: seeds i64[R], positions i64[R], ids i64[R, K] -> f32[R, K]."""
    _check_rows(seeds, positions)
    if ids.dim() != 2 or ids.shape[0] != seeds.shape[0]:
        raise ValueError(f"ids: expected [{seeds.shape[0]}, K], got {list(ids.shape)}")
    counters = (ids // TILE) * CALLS_PER_TILE + ids % CALLS_PER_TILE
    words = torch.stack(_philox_rows(seeds, positions, counters))
    which = (ids // CALLS_PER_TILE) % WORDS
    return _gumbel_(words.gather(0, which.unsqueeze(0)).squeeze(0).to(torch.float32))


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Noise of the whole vocabulary: seeds i64[R], positions i64[R] -> f32[R, vocab].

    Equal bit for bit to `gumbel_noise_at` of every id, at a quarter of the Philox calls.
    """
    _check_rows(seeds, positions)
    rows, tiles = seeds.shape[0], -(-vocab // TILE)
    counters = torch.arange(tiles * CALLS_PER_TILE, device=seeds.device)
    noise = torch.empty(rows, tiles, WORDS, CALLS_PER_TILE, device=seeds.device)
    few = max(1, _BLOCK_TOKENS // (tiles * TILE))
    for start in range(0, rows, few):
        part = slice(start, min(start + few, rows))
        words = _philox_rows(seeds[part], positions[part], counters)
        for i_word in range(WORDS):
            noise[part, :, i_word].copy_(words[i_word].view(-1, tiles, CALLS_PER_TILE))
        _gumbel_(noise[part])
    return noise.view(rows, tiles * TILE)[:, :vocab]


def xtc_coins(seeds: Tensor, positions: Tensor) -> Tensor:
    """The coin of each row: seeds i64[R], positions i64[R] -> f32[R], uniform in (0, 1)."""
    _check_rows(seeds, positions)
    zero = torch.zeros_like(seeds)
    counter = (zero, positions & MASK, zero + PURPOSE_XTC, zero)
    word = philox4x32(counter, (seeds & MASK, (seeds >> 32) & MASK))[0]
    return ((word.to(torch.float32) + 0.5) * WORD_SCALE).clamp(max=MAX_UNIFORM)


def _philox_rows(seeds: Tensor, positions: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    """The four words of counters i64[N] or i64[R, N] under each row's key: four i64[R, N].

    The rounds of `philox4x32`, on three buffers reused in place. c0 and c2 take the same steps, so
    they are the halves of one tensor `words`; `products` is what the round before left, as c1 and
    c3. A round swaps which half is which; the multipliers and the key's halves alternate to match,
    and ten rounds end in the order of the first.
    """
    shape, device = (2, seeds.shape[0], counters.shape[-1]), seeds.device
    buffers = [torch.empty(shape, dtype=torch.int64, device=device) for _ in range(3)]
    # Each with its halves, as slicing anew in every round would cost as much as the arithmetic.
    words, products, scratch = [(buffer, buffer[0], buffer[1]) for buffer in buffers]
    words[1].copy_(counters)
    words[2].fill_(PURPOSE_DRAW)
    products[1].copy_((positions & MASK).unsqueeze(1))
    products[2].zero_()
    multiplier = torch.tensor([MULTIPLIER_0, MULTIPLIER_2], device=device).view(2, 1, 1)
    multipliers = (multiplier, multiplier.flip(0)) * (ROUNDS // 2)
    for multiplier, key in zip(multipliers, _key_schedule(seeds), strict=True):
        words[0].mul_(multiplier)
        torch.bitwise_right_shift(words[0], 32, out=scratch[0])
        scratch[1].bitwise_xor_(products[2])
        scratch[2].bitwise_xor_(products[1])
        scratch[0].bitwise_xor_(key).bitwise_and_(MASK)
        words, products, scratch = scratch, words, products
    products[0].bitwise_and_(MASK)
    return words[1], products[1], words[2], products[2]


def _key_schedule(seeds: Tensor) -> tuple[Tensor, ...]:
    """For each round the key's halves, i64[2, R, 1], in the order of that round's results."""
    i_round = torch.arange(ROUNDS, device=seeds.device).unsqueeze(1)
    k0 = (seeds + i_round * KEY_STEP_0) & MASK
    k1 = ((seeds >> 32) + i_round * KEY_STEP_1) & MASK
    in_order = i_round % 2 == 1  # an even round's first half becomes c2, which takes k1
    return torch.stack((k0.where(in_order, k1), k1.where(in_order, k0)), 1).unsqueeze(-1).unbind(0)


def _gumbel_(words: Tensor) -> Tensor:
    """In place: float32 words -> g = -log(-log1p(-u)), u = (word + 0.5) / 2^32."""
    words.add_(0.5).mul_(-WORD_SCALE).clamp_(min=-MAX_UNIFORM)
    return words.log1p_().neg_().log_().neg_()


def _check_rows(seeds: Tensor, positions: Tensor) -> None:
    for name, value in (("seeds", seeds), ("positions", positions)):
        if value.dim() != 1 or value.dtype != torch.int64:
            raise ValueError(f"{name}: expected int64[R], got {value.dtype}{list(value.shape)}")
    if seeds.shape != positions.shape:
        raise ValueError(f"positions: expected [{seeds.shape[0]}], got {list(positions.shape)}")
