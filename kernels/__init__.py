"""Triton kernels of the DeepSeek-R1 family, their plain torch twins, and the layer that chooses by device."""

__version__ = "0.1.0"
