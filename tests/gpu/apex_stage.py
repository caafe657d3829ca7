# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: NVIDIA apex's kernel that adds weight gradients to main_grad, built from its three sources, in training steps.

python -m tests.gpu.apex_stage [SOURCES]       apex's repository; default: the environment's APEX_SOURCE
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from tests.gpu import cases
from tests.gpu.results import Figure, Outcome, held

MODULE = "fused_weight_gradient_mlp_cuda"
SOURCES = (
    "fused_weight_gradient_dense.cpp",
    "fused_weight_gradient_dense_cuda.cu",
    "fused_weight_gradient_dense_16bit_prec_cuda.cu",
)
"""Below csrc/megatron of apex's repository."""


def main(source: str | None) -> int:
    with tempfile.TemporaryDirectory(prefix="selfdistill_apex_") as directory:
        why = missing(source)
        if why or not held("apex's kernel against a product", partial(built, source, Path(directory))):
            for name in ("apex's kernel against a product", *(f"apex: {name}" for name in cases.FUSED_WGRAD)):
                if why:
                    held(name, lambda: Outcome(not_done=why))
            return 0 if why else 1
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([directory, os.environ["PYTHONPATH"]])}
        command = [sys.executable, "-m", "tests.gpu.layout_stage", "apex", "staged"]
        return subprocess.run(command, env=environment).returncode


def missing(source: str | None) -> str:
    """Return why the kernel cannot be had here; empty where it can."""
    if not torch.cuda.is_available():
        return "apex's kernel needs an NVIDIA GPU, and this is a CPU"
    if importlib.util.find_spec(MODULE) is not None:
        return ""
    if source is None:
        return "apex is not installed, and neither APEX_SOURCE nor --apex-source names its sources"
    directory = Path(source) / "csrc" / "megatron"
    absent = [name for name in SOURCES if not (directory / name).exists()]
    if absent:
        return f"expected apex's sources in {directory}, which lacks {', '.join(absent)}"
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if shutil.which("nvcc") is None and not Path(home, "bin", "nvcc").exists():
        return "nvcc, which compiles apex's kernel, is neither on PATH nor in CUDA_HOME"
    return ""


def built(source: str | None, directory: Path) -> Outcome:
    """Build the kernel into ``directory`` unless it is installed, and compare one product that it adds up."""
    if importlib.util.find_spec(MODULE) is None:
        from torch.utils.cpp_extension import load

        assert source is not None
        common = Path(source) / "csrc"  # type_shim.h, which the sources include
        sources = [str(common / "megatron" / name) for name in SOURCES]
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
        load(
            MODULE,
            sources,
            build_directory=str(directory),
            extra_include_paths=[str(common)],
            extra_cuda_cflags=["-O3"],
            verbose=True,
        )
        sys.path.insert(0, str(directory))
    kernel = importlib.import_module(MODULE)
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, gradient = (torch.randn(512, n, generator=generator, device="cuda").bfloat16() for n in (256, 128))
    main_grad = torch.ones(128, 256, device="cuda")
    kernel.wgrad_gemm_accum_fp32(hidden, gradient, main_grad)
    expected = 1 + gradient.double().t() @ hidden.double()
    off = float((main_grad.double() - expected).norm() / expected.norm())
    return Outcome((Figure("weight gradient, relative difference", off, 1e-5),))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("APEX_SOURCE")))
