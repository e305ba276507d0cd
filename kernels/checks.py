"""Validation at the kernel boundary: one error message for every launcher.

Launchers check what they are given once, before any pointer is formed. Values inside index tensors
are the scheduler's to guarantee: reading them here would make the host wait for the device.
"""

import torch
from torch import Tensor

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...] = FLOATING_DTYPES,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None matches any size) and dtype."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    sizes = tensor.shape
    if len(sizes) == len(shape) and tensor.dtype in dtypes:
        for want, got in zip(shape, sizes, strict=True):  # a plain loop: this runs in every layer
            if want != got and want is not None:
                break
        else:
            return
    wanted = ", ".join("*" if size is None else str(size) for size in shape)
    names = " | ".join(str(d).removeprefix("torch.") for d in dtypes)
    got_dtype = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(f"{name}: expected [{wanted}] of {names}, got {list(sizes)} of {got_dtype}")


def expect_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` is contiguous (kernels address it as one flat array)."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}"
            f" for shape {list(tensor.shape)}"
        )
