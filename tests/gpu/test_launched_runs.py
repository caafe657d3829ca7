# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Programs that users start, on the device: the self-test, runs that sample beside the trainer or from servers, a hang.

The weights change in every step, so that the log-probs of engine and trainer agree only if the engine has got the new
weights.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import children
import pytest
import tiny_run

NUM_STEPS = 3
SIZES = ("model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4")
"""Heads of 64, which every kernel of attention has."""
QWEN3_8B = (
    *("recipe=qwen3_8b", "data.teacher_template='{problem}H{solution}|'", "model.vocab_size=151936"),
    *("data.global_batch_size=16", "data.max_length=1024", "rollout.max_new_tokens=64", "rollout.kv_cache_gb=4"),
    *("schedule.max_tokens=4096", f"num_steps={NUM_STEPS}", "checkpoint.save_every=1000", "metrics.console_every=0"),
    *("metrics.loggers=[]", "model.init_method_std=0.02"),
)
VLLM_PYTHON = "SELFDISTILL_VLLM_PYTHON"
NO_VLLM = importlib.util.find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(NO_VLLM, reason="vLLM is not installed in the environment of the trainer")


def trained(arguments: list[str], num_ranks: int = 1) -> None:
    status, output = children.launched(num_ranks, "-m", "megatron_selfdistill.train", *arguments)
    assert status == 0, output[-6000:]


def tiny(inputs: Path, run_dir: Path, on_gpu: bool, *keys: str) -> list[str]:
    """Return the arguments of a tiny run, in float32 on a CPU and in bf16 on a GPU."""
    arguments = tiny_run.overrides(inputs, run_dir, *SIZES, *keys)
    return [argument for argument in arguments if argument != "optimizer=fp32" or not on_gpu]


def assert_agreement(run_dir: Path, keeps, bound: float) -> None:
    """Assert the number of finished steps, and that the log-probs of sampler and trainer are near in every step."""
    from megatron_selfdistill.metrics.run_log import read_metrics

    found = [line["sampler/log_prob_mean_abs_diff"] for line in read_metrics(run_dir)]
    assert len(found) == NUM_STEPS
    for step, difference in enumerate(found, 1):
        keeps(f"log-probs of sampler and trainer apart in step {step}, nats", difference, bound)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(8, marks=pytest.mark.gpus(8))])
def test_the_self_test_of_a_node_holds(num_ranks):
    program = ("-m", "megatron_selfdistill", "doctor", "--brief", "--selftest")
    status, output = children.launched(num_ranks, *program)
    assert status == 0 and output.count("\nok ") == 3, output[-6000:]


@pytest.mark.parametrize("engine", ["megatron", pytest.param("vllm", marks=needs_vllm)])
def test_an_engine_beside_the_trainer_has_the_new_weights_in_every_step(inputs, tmp_path, keeps, on_gpu, engine):
    keys = ["model.init_method_std=0.1", f"num_steps={NUM_STEPS}", "checkpoint.save_every=1000"]
    keys += ["optimizer.lr_warmup_steps=0", "rollout.kv_cache_gb=0.1", f"rollout.engine={engine}"]
    trained(tiny(inputs, tmp_path / "run", on_gpu, *keys))
    # bf16 on a GPU, whose engine and trainer round at different places, and float32 on a CPU
    assert_agreement(tmp_path / "run", keeps, 0.1 if on_gpu else 1e-3)


def test_the_first_loss_of_a_run_in_fp8_is_near_that_in_bf16(inputs, tmp_path, keeps, on_gpu):
    if not on_gpu or importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs an NVIDIA GPU and Transformer Engine, which has the fp8 layers")
    from megatron_selfdistill.metrics.run_log import read_metrics

    losses = {}
    for name, keys in {"bf16": [], "fp8": ["+model.transformer.fp8=hybrid"]}.items():
        sizes = ["model.num_query_groups=2", "model.max_position_embeddings=128", "num_steps=2"]
        trained(tiny(inputs, tmp_path / name, on_gpu, *sizes, *keys))
        losses[name] = next(iter(read_metrics(tmp_path / name)))["loss/mean"]
    keeps("first loss in fp8 against bf16, relative", abs(losses["fp8"] / losses["bf16"] - 1), 0.1)


@pytest.mark.gpus(2)
def test_a_rank_that_stops_ends_the_run_with_status_5_and_is_named(inputs, tmp_path):
    keys = ("stop.hang_timeout_minutes=0.25", "optimizer.precision=bf16")
    arguments = tiny_run.overrides(inputs, tmp_path / "run", *keys)
    script = str(children.REPOSITORY / "tests" / "support" / "hanging_run.py")
    _, output = children.launched(2, script, "is stopped", "1", *arguments)
    assert "exitcode  : 5" in output, output[-6000:]
    assert ": rank 1 on " in (tmp_path / "run" / "stacks" / "verdict.txt").read_text()


def assert_an_8b_model_samples_from_vllm(inputs: Path, run_dir: Path, keeps, num_ranks: int, *keys: str) -> None:
    data = [f"run_dir={run_dir}", f"data.path={inputs}/problems.jsonl", f"data.tokenizer={inputs}/tokenizer"]
    trained([*QWEN3_8B, *data, *keys], num_ranks)
    assert_agreement(run_dir, keeps, 0.1)


@needs_vllm
@pytest.mark.gpus(8)
@pytest.mark.parametrize("engine_tp", [1, 2])
def test_an_8b_model_samples_from_vllm_in_the_processes_of_the_trainer(inputs, tmp_path, keeps, engine_tp):
    assert_an_8b_model_samples_from_vllm(inputs, tmp_path / "run", keeps, 8, f"rollout.engine_tp={engine_tp}")


@pytest.mark.skipif(NO_VLLM and VLLM_PYTHON not in os.environ, reason=f"needs vLLM here or in {VLLM_PYTHON}")
@pytest.mark.gpus(8)
@pytest.mark.parametrize("way", ["nccl", "gloo"])
def test_an_8b_model_samples_from_four_vllm_servers(inputs, tmp_path, keeps, way):
    keys = ["rollout.placement=server", "rollout.num_servers=4", f"rollout.transfer={way}", "rollout.engine_tp=1"]
    keys += [f"rollout.server_python={os.environ[VLLM_PYTHON]}"] if VLLM_PYTHON in os.environ else []
    assert_an_8b_model_samples_from_vllm(inputs, tmp_path / "run", keeps, 4, *keys, "cluster.num_gpus=4")
