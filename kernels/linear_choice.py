"""Which form of a fused linear layer runs, by the shape of its weight and what was measured there.

    rows of x          deterministic                    otherwise
    few                linear_decode                    linear_gemv, up to its MAX_ROWS
    up to 64           linear_decode                    linear_decode, up to its MAX_ROWS
    more               linear_persistent                the vendor's

MAX_ROWS is a constant in a form's row of configs.json: the most rows of x with which it was faster
than the vendor's library on that device, for that weight. Where nothing was measured it is 0, and
the vendor's serves all rows.

Deterministic: the Triton forms alone, which add in the same order whatever the rows. Otherwise the
number of rows may choose the form, as it does inside the vendor's library.

`fused_model.py` makes those of a whole model.
"""

import sys
from dataclasses import dataclass

from torch import Tensor

from millrace.kernels.configs import LaunchConfig
from millrace.kernels.gemv_triton import MAX_GEMV_ROWS, gemv_config, linear_gemv
from millrace.kernels.matmul_fused import PLAIN, Fusion, LinearOutput, linear_fused_vendor
from millrace.kernels.matmul_persistent_triton import linear_persistent, persistent_config
from millrace.kernels.matmul_plan import MAX_ROWS, decode_config
from millrace.kernels.matmul_triton import Workspace, linear_decode


@dataclass(frozen=True, slots=True)
class LinearChoice:
    """Rows of x up to gemv_rows go to the GEMV, up to decode_rows to the decode product."""

    gemv_rows: int
    decode_rows: int
    persistent: bool  # all others: the persistent product, else the vendor's


def choose_linear(weight: Tensor, deterministic: bool = False) -> LinearChoice:
    """The forms for a weight [N, K] on its device."""
    if deterministic:
        return LinearChoice(gemv_rows=0, decode_rows=MAX_ROWS, persistent=True)
    return LinearChoice(
        gemv_rows=min(_measured_rows(gemv_config(weight)), MAX_GEMV_ROWS),
        decode_rows=min(_measured_rows(decode_config(weight)), MAX_ROWS),
        persistent=False,
    )


def _measured_rows(config: LaunchConfig) -> int:
    return config.constants.get("MAX_ROWS", 0)


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A linear layer on the GPU, ready to call; `fused_linear` makes it once, at load."""

    weight: Tensor
    choice: LinearChoice
    workspace: Workspace
    gemv: LaunchConfig
    decode: LaunchConfig
    persistent: LaunchConfig

    @property
    def triton_rows(self) -> int:
        """Up to so many rows of x one Triton kernel does all; beyond, the vendor's and torch's."""
        if self.choice.persistent:
            return sys.maxsize
        return max(self.choice.gemv_rows, self.choice.decode_rows)

    def __call__(self, x: Tensor, fusion: Fusion = PLAIN) -> LinearOutput:
        """As `linear_fused_reference` of x [T, K]."""
        rows = x.shape[0]
        if rows <= self.choice.gemv_rows:
            return linear_gemv(x, self.weight, fusion, self.gemv)
        if rows <= self.choice.decode_rows:
            return linear_decode(x, self.weight, self.workspace, fusion, self.decode)
        if self.choice.persistent:
            return linear_persistent(x, self.weight, fusion, self.persistent, self.decode)
        return linear_fused_vendor(x, self.weight, fusion)


def fused_linear(weight: Tensor, workspace: Workspace, deterministic: bool = False) -> FusedLinear:
    """The layer of a weight [N, K]; `workspace` was made for all weights of the model."""
    return FusedLinear(
        weight=weight,
        choice=choose_linear(weight, deterministic),
        workspace=workspace,
        gemv=gemv_config(weight),
        decode=decode_config(weight),
        persistent=persistent_config(weight),
    )
