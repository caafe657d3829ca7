# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The claims about the loss's Triton kernels: compiled on a GPU, some of them also under compute-sanitizer.

On a CPU Triton's interpreter runs a few of them; tests/unit/kernels/test_kernels.py runs all.
"""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import children
import hidden_gpus
import pytest
from claims import claims

CLAIMS = claims()
"""Claim -> its file."""
OF_A_CPU = {
    "test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks": [pytest.mark.smoke],
    "test_solve_target_finds_what_the_loss_finds_bit_for_bit": [],
    "test_no_rows_and_rows_of_one_column_have_no_loss": [],
}
SANITIZED = (
    "test_the_first_pass_of_any_shape_equals_float64",
    "test_strided_rows_and_backward_in_place_give_the_same_bits",
    "test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks",
)
"""Claims about shapes, strides and parts, where a kernel would read or write beyond its rows."""
assert CLAIMS.keys() >= {*OF_A_CPU, *SANITIZED}, "a claim has another name"


def run(claim: str, on_gpu: bool, *launcher: str, **environment: str) -> tuple[int, str]:
    """Run the cases of a claim, but for those that have the mark ``full``; return pytest's status and output."""
    environment |= {"TRITON_INTERPRET": "0" if on_gpu else "1", hidden_gpus.SWITCH: "1" if on_gpu else "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"{CLAIMS[claim]}::{claim}"]
    return children.run([*launcher, *command], environment)


@pytest.fixture(scope="module")
def outcomes(request, on_gpu):
    """Return the outcome of each claim that is asked for and that this device can run; the claims run side by side."""
    named = (item.callspec.params["claim"] for item in request.session.items if "outcomes" in item.fixturenames)
    claims = [claim for claim in named if on_gpu or claim in OF_A_CPU]
    with ThreadPoolExecutor(min(12, os.cpu_count() or 1)) as pool:
        return dict(zip(claims, pool.map(lambda claim: run(claim, on_gpu), claims), strict=True))


@pytest.mark.parametrize("claim", [pytest.param(claim, marks=OF_A_CPU.get(claim, [])) for claim in CLAIMS])
def test_a_claim_holds(claim, outcomes):
    if claim not in outcomes:
        pytest.skip("Triton's interpreter takes minutes; tests/unit/kernels/test_kernels.py runs the claim")
    status, output = outcomes[claim]
    assert status == 0, output[-6000:]
    if " passed" not in output.splitlines()[-1]:
        pytest.skip(output[-500:])


@pytest.mark.parametrize("claim", SANITIZED)
def test_a_claim_makes_no_memory_error_under_compute_sanitizer(claim, on_gpu):
    if not on_gpu:
        pytest.skip("compute-sanitizer looks at kernels on a GPU")
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]  # CUDA's directory is often not on PATH
    path = os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes)])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        pytest.skip("compute-sanitizer, which comes with the CUDA toolkit, is not installed")
    options = ("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99")
    # The caching allocator hides reads beyond a tensor if they stay within its block.
    status, output = run(claim, on_gpu, tool, *options, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert status == 0, output[-6000:]
