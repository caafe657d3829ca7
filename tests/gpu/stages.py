# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The stages of ``make test-gpu``: in which order, with which limits, and which checks each must report."""

from __future__ import annotations

import argparse
import sys

from megatron_selfdistill.selftest.node_test import CHECKS
from tests.gpu import cases
from tests.gpu.runner import Stage

SELF_TEST = tuple(CHECKS)
RUNS = (
    "teacher offloaded to host memory",
    "saving in the background and resuming",
    "guided sampling in process",
    "memory against the plan",
)
CPU_CLAIMS = (
    "test_equal_maxima_count_by_their_lowest_column_within_and_across_blocks",
    "test_solve_target_finds_what_the_loss_finds_bit_for_bit",
    "test_no_rows_and_rows_of_one_column_have_no_loss",
)
"""A few that Triton's interpreter runs in seconds; tests/unit/loss/test_kernels.py runs all of them."""
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
    """Return the stages of one device: at most nine minutes together on a GPU; a CPU that others want too gets more."""
    slower = 1 if on_gpu else CPU_PATIENCE
    one, several = (
        list(group) if on_gpu else list(cases.CPU_REDUCED[name])
        for name, group in (("one", cases.ONE_RANK), ("several", cases.SEVERAL_RANKS))
    )
    environment = {} if on_gpu else NO_GPU
    apex = [str(options.apex_source)] if options.apex_source else []

    def stage(name: str, module: str, *arguments: str, limit_s: float, checks: list[str]) -> Stage:
        command = [sys.executable, "-m", f"tests.gpu.{module}", *arguments]
        return Stage(name, command, slower * limit_s, checks, environment)

    return [
        stage("roofline", "roofline", limit_s=40, checks=["copy and product", "torch.compile"]),
        stage(
            "kernels",
            "kernel_stage",
            "claims",
            *(() if on_gpu else CPU_CLAIMS),
            limit_s=115,
            checks=["kernels of the loss"],
        ),
        stage("sanitizer", "kernel_stage", "sanitizer", limit_s=40, checks=["kernels under compute-sanitizer"]),
        stage(
            "self-test",
            "selftest_stage",
            *("--seconds", f"{slower * 45}"),
            limit_s=90,
            checks=[f"self-test: {name}" for name in SELF_TEST],
        ),
        stage(
            "model",
            "layout_stage",
            *("one", "staged", "--seconds", f"{slower * 55}", "--names", *one),
            limit_s=60,
            checks=[f"one: {name}" for name in one],
        ),
        stage("runs", "run_stage", limit_s=50, checks=list(RUNS)),
        stage(
            "ranks",
            "layout_stage",
            *("several", "staged", "--seconds", f"{slower * 65}", "--names", *several),
            limit_s=70,
            checks=[f"several: {name}" for name in several],
        ),
        stage(
            "sinks",
            "sinks_stage",
            limit_s=15,
            checks=["attention sinks: full", "attention sinks: window"],
        ),
        stage("ipc", "ipc_stage", limit_s=20, checks=["CUDA IPC between two processes", "weights over CUDA IPC"]),
        stage(
            "apex",
            "apex_stage",
            *apex,
            limit_s=40,
            checks=["apex's kernel against a product", *(f"apex: {name}" for name in cases.FUSED_WGRAD)],
        ),
    ]


def _eight(options: argparse.Namespace) -> list[Stage]:
    """Return what eight GPUs add: at most fifteen minutes more."""
    python = [options.vllm_python] if options.vllm_python else []

    def stage(name: str, module: str, *arguments: str, limit_s: float, checks: list[str]) -> Stage:
        return Stage(name, [sys.executable, "-m", f"tests.gpu.{module}", *arguments], limit_s, checks)

    return [
        stage(
            "nccl",
            "layout_stage",
            *("eight", "nccl", "--seconds", "75"),
            limit_s=80,
            checks=[f"eight: {name}" for name in cases.EIGHT_GPUS],
        ),
        stage(
            "self-test of 8",
            "selftest_stage",
            *("--ranks", "8", "--seconds", "25"),
            limit_s=60,
            checks=[f"self-test of 8 ranks: {name}" for name in SELF_TEST],
        ),
        stage("hang", "eight_stage", "hang", limit_s=110, checks=["a rank that stops"]),
        stage(
            "colocated",
            "eight_stage",
            "colocated",
            limit_s=240,
            checks=[f"vLLM colocated, engines of {tp}" for tp in (1, 2)],
        ),
        stage(
            "servers",
            "eight_stage",
            *("servers", *python),
            limit_s=350,
            checks=[f"vLLM servers over {way}" for way in ("nccl", "gloo", "ipc")],
        ),
        stage("fp8", "eight_stage", "fp8", limit_s=60, checks=["fp8 through Transformer Engine"]),
    ]
