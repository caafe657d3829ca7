# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron on a CPU beside packages whose kernels need CUDA."""

import os
import subprocess
import sys

import pytest

CODE = """
import importlib.util
from megatron_selfdistill.compat import cpu
from megatron.core.optimizer import Adam, clip_grads, optimizer
for taken in (Adam, clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl, optimizer.multi_tensor_scale_impl):
    print(taken.__module__)
print(importlib.util.find_spec("transformer_engine"))
"""


@pytest.mark.full
def test_the_optimizer_takes_no_kernel_of_transformer_engine_or_apex_on_a_cpu(tmp_path):
    for package in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise AssertionError('{package} is imported')\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["torch.optim.adamw", *["megatron.core.utils"] * 3, "None"]
