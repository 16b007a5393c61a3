"""Triton kernels of the DeepSeek-R1 family, their plain torch twins, and the layer that chooses by device."""

__version__ = "0.1.0"

ROW_TILE = 8
"""Rows of a matrix product in deterministic mode. Measured (torch 2.13, MKL): four and more rows agree."""
