"""All matrix products of a model in their fused forms: its layers', and its head's with the draw.

`fuse` is called once, when the weights are on the device. `linear_choice.py` says which form of a
layer runs; this file says it of the head (`lm_head.py`): up to `draw_rows` rows of x, hidden rows
become tokens with no logits in between. That is the MAX_ROWS of the head's row `lm_head_draw` in
configs.json: the most rows with which it was faster there than the layer and the sampler. Where
nothing was measured it is 0. Up to as many rows the logits, where somebody wants to see them, come
from the decode product, which has the bits that the draw is made from: so a row draws the same
token whether or not a neighbour asked for logprobs.

All products share one workspace, which holds the partial sums of one launch. That is right because
they run on one stream: captured graphs are replayed on the stream of the eager steps, steps ahead
are queued behind one another, and with dependent launch a kernel waits for the one in front before
it writes. It is allocated here, before anything is captured, and never again. Its tickets are zero
after every launch that ended; one that did not end has taken the process's CUDA context with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from millrace.kernels.configs import LaunchConfig, launch_config
from millrace.kernels.linear_choice import FusedLinear, LinearChoice, choose_linear, fused_linear
from millrace.kernels.lm_head_triton import draw_from_hidden
from millrace.kernels.matmul_plan import MAX_ROWS, weight_key
from millrace.kernels.matmul_triton import Workspace
from millrace.kernels.sampling import SampledTokens, SlotSampling

NOT_MEASURED = LaunchConfig(num_warps=4, num_stages=1, constants={"MAX_ROWS": 0})


@dataclass(frozen=True, slots=True)
class FusedHead:
    """The last layer [V, E]: logits of any number of rows, and tokens of a few."""

    linear: FusedLinear
    draw_rows: int

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [R, V] of x [R, E]."""
        return self.linear(x).y

    def draw(
        self, x: Tensor, slots: Tensor, positions: Tensor, params: SlotSampling
    ) -> SampledTokens:
        """As `lm_head.draw_from_hidden_reference`, of at most `draw_rows` rows."""
        head, config = self.linear.weight, self.linear.decode
        return draw_from_hidden(x, head, slots, positions, params, config=config)


@dataclass(frozen=True, slots=True)
class FusedModel:
    """A model's products, in the order of the weights that `fuse` was given."""

    linears: list[FusedLinear]
    head: FusedHead


def fuse(weights: Sequence[Tensor], head: Tensor, deterministic: bool = False) -> FusedModel:
    """The products of `weights` [N, K] and of the `head` [V, E], all on one device."""
    workspace = Workspace.for_weights([*weights, head])
    linears = [fused_linear(weight, workspace, deterministic) for weight in weights]
    return FusedModel(linears, _head(head, workspace, deterministic))


def _head(weight: Tensor, workspace: Workspace, deterministic: bool) -> FusedHead:
    measured = launch_config("lm_head_draw", weight_key(weight), weight.device, NOT_MEASURED)
    draw_rows = min(measured.constants["MAX_ROWS"], MAX_ROWS)
    choice = choose_linear(weight, deterministic)
    if draw_rows and not deterministic:  # logits and draw take the same sums
        choice = LinearChoice(gemv_rows=0, decode_rows=draw_rows, persistent=False)
    linear = fused_linear(weight, workspace, deterministic)
    return FusedHead(replace(linear, choice=choice), draw_rows)
