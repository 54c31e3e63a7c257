"""Tensors in, tensors out: the torch reference of every kernel, which is also the CPU path."""
