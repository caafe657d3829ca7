# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron on a CPU beside packages whose kernels need CUDA."""

import os
import subprocess
import sys

import pytest

CODE = """
from megatron_selfdistill.compat import cpu
from megatron.core.optimizer import Adam, clip_grads, distrib_optimizer, optimizer
used = (clip_grads.multi_tensor_applier, clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl)
for taken in (Adam, distrib_optimizer.Adam, *used, optimizer.multi_tensor_applier, optimizer.multi_tensor_scale_impl):
    print(taken.__module__)
"""
KERNELS = """
FusedAdam = FusedSGD = multi_tensor_applier = multi_tensor_l2norm = multi_tensor_scale = object
"""


@pytest.mark.full
def test_the_optimizer_takes_no_kernel_of_apex_on_a_cpu(tmp_path):
    for package in ("apex", "apex/optimizers", "apex/multi_tensor_apply", "amp_C"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(KERNELS)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*["torch.optim.adamw"] * 2, *["megatron.core.utils"] * 5]
