"""The last layer and the draw in one: hidden rows to token ids, logits never written.

    logits   = round(x @ head^T)                 in the dtype of x, as the layer alone rounds them
    token    = argmax(logits / temperature + g)  g the noise of `rng.py`; without g if greedy

For rows that ask for a temperature (or greedy) and for nothing else: no filter, no edit of the
logits, no logprobs. Such a row has the token that `sampling.py` draws from the same logits, since
the argmax of a row is the best of its tiles' best, and the noise knows only (seed, position, id):
what FlashSampling (2026) saves, without its dependence on the tile. Ties, NaN and -inf are treated
as there.

x [R, K], head [V, K]; R rows, each with a slot and the absolute position that is being drawn.
"""

from torch import Tensor

from millrace.kernels.matmul_fused import Fusion, InputNorm, linear_fused_reference
from millrace.kernels.sampling import SampledTokens, SlotSampling, sample_reference


def draw_from_hidden_reference(
    x: Tensor,
    head: Tensor,
    slots: Tensor,
    positions: Tensor,
    params: SlotSampling,
    norm: InputNorm | None = None,
) -> SampledTokens:
    """The definition: the layer, then the sampler. slots i64[R], positions i64[R]."""
    logits = linear_fused_reference(x, head, Fusion(norm=norm)).y
    return sample_reference(logits, slots, positions, params)
