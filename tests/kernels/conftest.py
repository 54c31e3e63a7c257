"""Leaves out the tests of kernels that this machine's CPU cannot run; in test_native.py a part concerns any CPU."""

import torch

from braid.kernels import native

collect_ignore = [] if native.available(torch.float32) else ["test_native_attention.py", "test_native_rows.py"]
