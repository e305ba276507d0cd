"""The operations of the forward pass and of sampling: formula, Triton kernel, PyTorch reference.

Imports torch and triton alone; never engine or scheduler. `dispatch.py` picks an implementation.
"""

# A bare top-level `kernels` package (this folder, seen from the working directory) must look
# unrelated to the distribution of that name which transformers probes for.
__version__ = "0.0.0"
