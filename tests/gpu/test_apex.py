# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""NVIDIA apex's kernel that adds weight gradients to main_grad, built from its three sources, in training steps.

The variable APEX_SOURCE names apex's repository, where apex is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from children import Ranks

from tests.gpu import cases, layout_steps

MODULE = "fused_weight_gradient_mlp_cuda"
ENDINGS = ("dense.cpp", "dense_cuda.cu", "dense_16bit_prec_cuda.cu")


def missing() -> str:
    """Return why the kernel cannot be had here; empty where it can."""
    if importlib.util.find_spec(MODULE) is not None:
        return ""
    absent = [str(path) for path in sources() if not path.exists()]
    if absent:
        return f"apex is not installed, and the directory APEX_SOURCE lacks {', '.join(absent)}"
    if (
        shutil.which("nvcc") is None
        and not Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
    ):
        return "nvcc, which compiles apex's kernel, is neither on PATH nor in CUDA_HOME"
    return ""


def sources() -> list[Path]:
    directory = Path(os.environ.get("APEX_SOURCE", ""), "csrc", "megatron")
    return [directory / f"fused_weight_gradient_{ending}" for ending in ENDINGS]


@pytest.fixture(scope="module")
def with_kernel(tmp_path_factory, on_gpu):
    if not on_gpu or missing():
        pytest.skip(missing() if on_gpu else "apex's kernel needs an NVIDIA GPU")
    directory = tmp_path_factory.mktemp("apex")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)  # the path of its children, too
        ranks = Ranks(1, ["transformer_engine"])
        ranks.run(build, directory)
        yield ranks
        ranks.close()


def build(rank: int, directory: Path) -> None:
    """Build the kernel into ``directory`` unless it is installed; import it."""
    if importlib.util.find_spec(MODULE) is None:
        from torch.utils.cpp_extension import load

        common = sources()[0].parents[1]  # type_shim.h, which the sources include
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ".".join(map(str, torch.cuda.get_device_capability())))
        flags = {"extra_include_paths": [str(common)], "extra_cuda_cflags": ["-O3"], "verbose": True}
        load(MODULE, list(map(str, sources())), build_directory=str(directory), **flags)
        sys.path.insert(0, str(directory))
    importlib.import_module(MODULE)


@pytest.mark.parametrize("name", cases.FUSED_WGRAD)
def test_a_training_step_with_the_kernel_equals_that_of_one_cpu_rank(name, with_kernel, reference, tmp_path, keeps):
    one = cases.FUSED_WGRAD[name]
    layout_steps.check(one, with_kernel, reference, tmp_path / "store", keeps, backend="staged", on_gpu=True)
