# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The stages of ``make test-gpu``: in which order, with which limits, and which checks each must report."""

from __future__ import annotations

import argparse
import sys

from megatron_selfdistill.choices import FUSED_MODES
from megatron_selfdistill.instruments.selftest.node_test import PROOFS
from tests.gpu import cases
from tests.gpu.runner import Stage

SELF_TEST = tuple(PROOFS)
RUNS = (
    "teacher offloaded to host memory",
    "teachers fetched beside the student",
    "saving in the background and resuming",
    "guided sampling in process",
    "decoding from CUDA graphs",
    "memory against the plan",
)
COLOCATED = ("colocated engine: the trainer's own sampler", "colocated engine: vLLM")
CPU_CLAIMS = (
    "test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks",
    "test_solve_target_finds_what_the_loss_finds_bit_for_bit",
    "test_no_rows_and_rows_of_one_column_have_no_loss",
)
"""A few that Triton's interpreter runs in seconds; tests/unit/kernels/test_kernels.py runs all of them."""
CPU_PATIENCE = 6
"""How many times as long a stage may take on a CPU: it takes a minute on two idle cores, and CI's are not idle."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def chosen(options: argparse.Namespace) -> list[Stage]:
    """Return the stages for the device and the number of GPUs of the command line, or those that --only names.

    Raises: SystemExit where --only names a stage that does not exist.
    """
    on_gpu = options.device == "cuda"
    stages = _one(options, on_gpu) + (_eight(options) if options.gpus == 8 and on_gpu else [])
    known = [stage.name for stage in stages]
    if unknown := sorted(set(options.only or ()) - set(known)):
        raise SystemExit(f"--only names {', '.join(unknown)}; the stages are {', '.join(known)}")
    return [stage for stage in stages if not options.only or stage.name in options.only]


def _one(options: argparse.Namespace, on_gpu: bool) -> list[Stage]:
    """Return the stages of one device, those first whose answers matter most.

    On a GPU the first four take four minutes at most, and all of them less than ten; a CPU that others want too gets
    more.  The last ones need most of their time only with software that few environments have.
    """
    slower = 1 if on_gpu else CPU_PATIENCE
    environment = {} if on_gpu else NO_GPU
    apex = [str(options.apex_source)] if options.apex_source else []

    def stage(name: str, module: str, *arguments: str, limit_s: float, checks: list[str]) -> Stage:
        command = [sys.executable, "-m", f"tests.gpu.{module}", *arguments]
        return Stage(name, command, slower * limit_s, checks, environment)

    def steps(name: str, group: str, limit_s: float) -> Stage:
        names = list(cases.GROUPS[group] if on_gpu else cases.CPU_REDUCED[group])
        checks = [f"{group}: {one}" for one in names]
        return stage(name, "layout_stage", group, "staged", "--names", *names, limit_s=limit_s, checks=checks)

    claims = () if on_gpu else CPU_CLAIMS
    fused = [f"fused {mode} against float64" for mode in FUSED_MODES]
    self_test = [f"self-test: {name}" for name in SELF_TEST]
    kernel = ["apex's kernel against a product", *(f"apex: {name}" for name in cases.FUSED_WGRAD)]
    return [
        stage("kernels", "kernel_stage", "claims", *claims, limit_s=80, checks=["kernels of the loss"]),
        stage("fused-layer", "fused_stage", limit_s=20, checks=fused),
        steps("step", "step", limit_s=45),
        stage("colocated", "colocated_stage", limit_s=70, checks=list(COLOCATED)),
        stage("self-test", "selftest_stage", limit_s=115, checks=self_test),
        steps("model", "one", limit_s=45),
        stage("runs", "run_stage", limit_s=55, checks=list(RUNS)),
        steps("ranks", "several", limit_s=60),
        stage("sinks", "sinks_stage", limit_s=10, checks=["attention sinks: full", "attention sinks: window"]),
        stage("sanitizer", "kernel_stage", "sanitizer", limit_s=15, checks=["kernels under compute-sanitizer"]),
        stage("apex", "apex_stage", *apex, limit_s=45, checks=kernel),
        stage("fp8", "fp8_stage", limit_s=50, checks=["fp8 through Transformer Engine"]),
    ]


def _eight(options: argparse.Namespace) -> list[Stage]:
    """Return what eight GPUs add: at most fifteen minutes more."""
    python = [options.vllm_python] if options.vllm_python else []
    layouts = [f"eight: {name}" for name in cases.EIGHT_GPUS]
    self_test = [f"self-test of 8 ranks: {name}" for name in SELF_TEST]
    colocated = [f"vLLM colocated, engines of {tp}" for tp in (1, 2)]
    servers = [f"vLLM servers over {way}" for way in ("nccl", "gloo")]

    def stage(name: str, module: str, *arguments: str, limit_s: float, checks: list[str]) -> Stage:
        return Stage(name, [sys.executable, "-m", f"tests.gpu.{module}", *arguments], limit_s, checks)

    return [
        stage("nccl", "layout_stage", "eight", "nccl", limit_s=80, checks=layouts),
        stage("self-test of 8", "selftest_stage", "--ranks", "8", limit_s=60, checks=self_test),
        stage("hang", "eight_stage", "hang", limit_s=110, checks=["a rank that stops"]),
        stage("colocated of 8", "eight_stage", "colocated", limit_s=240, checks=colocated),
        stage("servers", "eight_stage", "servers", *python, limit_s=350, checks=servers),
    ]
