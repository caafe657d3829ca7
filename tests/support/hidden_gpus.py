# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The GPUs of the machine, hidden from all tests without the mark ``gpu``.

conftest.py hides the GPUs of pytest's process and of all its children.  A test that is marked ``gpu`` works in child
processes, which see the GPUs again.  A pytest process that is started with SELFDISTILL_TEST_GPU=1 sees them itself.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

VARIABLE = "CUDA_VISIBLE_DEVICES"
SWITCH = "SELFDISTILL_TEST_GPU"
_PACKAGES = (
    *("torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn", "flash-linear-attention"),
    *("apex", "vllm", "liger-kernel"),
)
_COUNT = """
import ctypes
driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
assert driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
print(count.value)
"""


def hide() -> str | None:
    """Hide the GPUs from this process, unless SELFDISTILL_TEST_GPU=1; return the former CUDA_VISIBLE_DEVICES."""
    before = os.environ.get(VARIABLE)
    if os.environ.get(SWITCH) != "1":
        os.environ[VARIABLE] = ""
    return before


@contextlib.contextmanager
def shown(visible: str | None) -> Iterator[None]:
    """Show the GPUs to processes that start inside, with ``visible`` as CUDA_VISIBLE_DEVICES (None: not set)."""
    before = {name: os.environ.get(name) for name in (VARIABLE, SWITCH)}
    _set({VARIABLE: visible, SWITCH: "1"})
    try:
        yield
    finally:
        _set(before)


@cache
def number(visible: str | None) -> int:
    """Return the number of GPUs, for which another process asks: one that has asked can no longer hide its GPUs."""
    import torch

    if torch.version.cuda is None:
        return 0
    with shown(visible):
        asked = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, timeout=60)
    return int(asked.stdout) if asked.returncode == 0 else 0


def described(on_gpu: bool) -> str:
    """Return the name of the GPU, which another process asks for, or CPU, and the versions of what computes here."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    name = subprocess.run(asked, capture_output=True, text=True).stdout.strip() if on_gpu else platform.machine()
    found = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return ", ".join([name or "no GPU", *(f"{package} {found[package]}" for package in _PACKAGES if package in found)])


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
