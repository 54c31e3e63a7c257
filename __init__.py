"""Braid serves DeepSeek-V3-family models from an elastic Ray cluster; attention and experts are different workers."""
