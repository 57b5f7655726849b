"""The device of the tests' random models and tokens: LAWS_DEVICE=pretend, cuda or cpu.

With "pretend" the laws ask whether the library makes a tensor on the wrong device: see
pretend_device.py. With "cuda" they run on a GPU.
"""

import os

import torch

NAME = os.environ.get("LAWS_DEVICE", "cpu")
if NAME == "pretend":
    import pretend_device  # noqa: F401 (registers it)
DEVICE = torch.device(NAME)
