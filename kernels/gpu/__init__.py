"""Triton kernels for Hopper: one function a kernel, with the signature and the meaning of its torch reference."""
