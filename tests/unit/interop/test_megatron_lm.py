# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The real Megatron-LM and this project load and continue each other's checkpoints; needs MEGATRON_LM=DIR, its sources.

The sources must be those of the installed Megatron Core: core_v0.16.1, or core_v0.19.0.  Its ``megatron.training`` and
``pretrain_gpt.py`` run in processes of their own on the CPU (megatron_lm_worker.py).  With MEGATRON_LM_CHECKPOINTS=DIR
too, the tests keep checkpoints in DIR, and read there what the same tests kept under the other release.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpointed_run
import models
import pytest
import torch
from checkpointed_run import ADAM, Setup
from held_state import held
from ports import neighbouring_ports

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.interop.conversion import hf_to_megatron, megatron_to_hf
from megatron_selfdistill.model.model_values import architecture, differences

MEGATRON_LM = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(
    MEGATRON_LM is None, reason="MEGATRON_LM names no directory with the Megatron-LM of the installed Megatron Core"
)
KEPT = Path(os.environ.get("MEGATRON_LM_CHECKPOINTS", "/nonexistent"))
OTHER = "0.16" if older_megatron.version() >= (0, 19) else "0.19"
"""The release whose checkpoints a test of two releases reads."""
needs_both = pytest.mark.skipif(not (KEPT / OTHER).is_dir(), reason="MEGATRON_LM_CHECKPOINTS holds no other release")

WORKER = Path(__file__).with_name("megatron_lm_worker.py")
ON_CPU = (
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-bias-swiglu-fusion --no-rope-fusion --distributed-backend gloo --use-cpu-initialization"
).split()
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 5 --mock-data --tokenizer-type NullTokenizer "
    f"--vocab-size {models.VOCAB_SIZE - (older_megatron.version() < (0, 18))} --seq-length 32 "
    "--ckpt-format torch_dist --log-interval 1 --eval-iters 0 --eval-interval 100"
).split()


def model_flags(setup: Setup) -> list[str]:
    """Return the flags with which Megatron-LM builds the model of ``setup``."""
    arch = architecture(setup.model) | {"ffn_hidden_size": setup.model.ffn_hidden_size}  # which experts alone lack
    sizes = "num_layers hidden_size ffn_hidden_size max_position_embeddings num_attention_heads kv_channels"
    flags = [f"--{name.replace('_', '-')}={arch[name]}" for name in f"{sizes} normalization rotary_base".split()]
    flags += ["--swiglu", "--disable-bias-linear", "--position-embedding-type=rope", "--group-query-attention"]
    flags += [f"--norm-epsilon={arch['layernorm_epsilon']}", f"--num-query-groups={arch['num_query_groups']}"]
    flags += ["--hidden-dropout=0.0", "--attention-dropout=0.0", "--make-vocab-size-divisible-by=8"]
    flags += ["--padded-vocab-size=64"]
    switches = {"add_qkv_bias": "--add-qkv-bias", "qk_layernorm": "--qk-layernorm"}
    flags += [flag for name, flag in switches.items() if arch[name]]
    flags += [] if arch["share_embeddings_and_output_weights"] else ["--untie-embeddings-and-output-weights"]
    if arch["num_moe_experts"] is not None:
        flags += [f"--num-experts={arch['num_moe_experts']}", "--moe-router-load-balancing-type=none"]
        named = ("moe_ffn_hidden_size", "moe_router_topk", "moe_router_score_function")
        flags += [f"--{name.replace('_', '-')}={arch[name]}" for name in named]
    return [*flags, "--bf16"] if setup.optimizer.precision == "bf16" else flags


def run_megatron_lm(what: str, out: Path, flags: Sequence[str], world_size: int = 1) -> str:
    """Run the worker on ``world_size`` ranks; returns what the last one printed."""
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(neighbouring_ports()),
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[3]), str(Path(models.__file__).parent)]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    command = [sys.executable, "-W", "ignore", WORKER, str(MEGATRON_LM), what, out, *TRAINING, *ON_CPU, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(world_size)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text[-4000:]
    return printed[-1]


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare weights to the bit, without the rows of padding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rows = models.VOCAB_SIZE if "word_embeddings" in name or "output_layer" in name else len(value)
        assert torch.equal(found[name][:rows], value[:rows]), name


# A run's checkpoints


def save_run(setup: Setup, run_dir: Path) -> dict[str, Any]:
    """Write the checkpoint of step 2; returns what the run holds then, with the next numbers of its random streams."""
    run = checkpointed_run.start(setup, run_dir, steps=2)
    run.save(2)
    return {"drawn": checkpointed_run.random_numbers(), **held(run.chunks, run.optimizer)}


BF16 = dataclasses.replace(ADAM, precision="bf16")
TP2 = ("--tensor-model-parallel-size=2",)
EP2 = ("--expert-model-parallel-size=2", "--moe-token-dispatcher-type=alltoall")
RUNS: dict[str, tuple[Setup, Sequence[str]]] = {
    "dense, DP 2": (Setup(kind="tied", optimizer=ADAM), ()),
    "dense in bf16, DP 2": (Setup(kind="gqa", optimizer=BF16), ()),
    "dense, TP 2": (Setup(kind="gqa", optimizer=ADAM).cut(tp=2), TP2),
    "experts, EP 2": (Setup(kind="moe", optimizer=ADAM).cut(ep=2), EP2),
}
"""name -> the run of two ranks, and the flags of its layout."""


def flags_of_run(name: str, run_dir: Path) -> list[str]:
    setup, layout = RUNS[name]
    flags = f"--load={run_dir / 'checkpoints'} --lr={setup.optimizer.lr}"  # 0.19 finds a group by its rate
    return [
        *model_flags(setup),
        *layout,
        *f"{flags} --use-distributed-optimizer --override-opt_param-scheduler".split(),
    ]


@pytest.mark.parametrize("name", RUNS)
def test_megatron_lm_takes_over_and_continues_a_run_and_this_project_continues_it(ranks, tmp_path, name):
    setup = RUNS[name][0]
    saved = ranks.run(save_run, setup, tmp_path / "run", world_size=2)
    flags = flags_of_run(name, tmp_path / "run")
    run_megatron_lm("state", tmp_path / "out.pt", flags, 2)
    found = torch.load(tmp_path / "out.pt")
    assert found["iteration"] == 2
    assert found["adam_steps"] and set(found["adam_steps"]) == {2}, "Adam's bias correction would be another one"
    assert found["drawn"] == saved[0]["drawn"]
    for part in ("weights", "moments"):
        require_equal(found[part], saved[0][part])

    flags += [f"--save={tmp_path / 'theirs'}", "--save-interval=5"]
    printed = run_megatron_lm("pretrain", tmp_path / "out.pt", flags, 2)
    losses = re.findall(r"iteration\s+(\d+)/\s+5 .*?lm loss: (\S+)", printed)
    assert [int(step) for step, _ in losses] == [3, 4, 5], printed[-3000:]
    assert all(0 < float(loss) < 20 for _, loss in losses)
    assert (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    ranks.run(loaded_by_us, tmp_path / "theirs", setup, True, tmp_path / "ours", world_size=2)
    megatron_to_hf(tmp_path / "theirs", tmp_path / "hf", vocab_size=models.VOCAB_SIZE)


# Checkpoints of Megatron-LM


def trained(kind: str, *flags: str, distributed: bool = False, world_size: int = 1) -> tuple[Setup, list[str], int]:
    """Return a run of this project with the same model, layout and kind of optimizer, all flags, and the ranks."""
    setup = Setup(kind=kind, optimizer=dataclasses.replace(ADAM, use_distributed_optimizer=distributed))
    setup = setup.cut(tp=2) if TP2[0] in flags else setup
    return setup, [*model_flags(setup), *flags, *(["--use-distributed-optimizer"] if distributed else [])], world_size


LEGACY = "--ckpt-format=torch"
TRAINED = {
    "torch_dist": trained("gqa"),
    "torch_dist, TP 2": trained("gqa", *TP2, world_size=2),
    "torch_dist, experts": trained("moe"),
    "torch_dist, distributed optimizer, DP 2": trained("tied", distributed=True, world_size=2),
    "torch_dist, reshardable": trained("gqa", "--dist-ckpt-optim-fully-reshardable", distributed=True, world_size=2),
    "legacy": trained("gqa", LEGACY),
    "legacy, TP 2": trained("gqa", LEGACY, *TP2, world_size=2),
    "legacy, distributed optimizer, DP 2": trained("tied", LEGACY, distributed=True, world_size=2),
    "legacy, experts": trained("moe", LEGACY),
}
"""The models that Megatron-LM trains from scratch."""


def loaded_by_us(path: Path, setup: Setup, with_optimizer: bool, scratch: Path) -> dict[str, Any]:
    """Return what a run of this project holds after it loaded a checkpoint, by Megatron-LM's names."""
    from megatron_selfdistill.checkpoint.external import load_weights, load_weights_and_optimizer

    run = checkpointed_run.start(setup, scratch, steps=1)
    if with_optimizer:
        assert load_weights_and_optimizer(path, run.chunks, run.optimizer, models.VOCAB_SIZE) == 5
    else:
        load_weights(path, run.chunks, models.VOCAB_SIZE)
    return held(run.chunks, run.optimizer)


def require_readable(ranks, directory: Path, name: str, scratch: Path) -> None:
    """Compare what this project reads from a checkpoint with what Megatron-LM held when it wrote the checkpoint."""
    setup, flags, world_size = TRAINED[name]
    theirs, path, has_state = torch.load(directory / "out.pt"), directory / "theirs", LEGACY not in flags
    described = architecture_from_args(stored_args(path))
    assert differences(described, setup.model) == {} and described.vocab_size == models.VOCAB_SIZE
    found = ranks.run(loaded_by_us, path, setup, has_state, scratch / "run", world_size=world_size)[0]
    require_equal(found["weights"], theirs["weights"])
    if has_state:
        assert set(found["adam_steps"]) == {5}
        require_equal(found["moments"], theirs["moments"])
    hf_to_megatron(megatron_to_hf(path, scratch / "hf"), scratch / "back")
    found = ranks.run(loaded_by_us, scratch / "back", setup, False, scratch / "again", world_size=world_size)[0]
    require_equal(found["weights"], theirs["weights"])


@pytest.mark.parametrize("name", TRAINED)
def test_this_project_reads_what_megatron_lm_trained_from_scratch(ranks, tmp_path, name):
    _, flags, world_size = TRAINED[name]
    directory = KEPT / older_megatron.version_text() / name if KEPT.is_dir() else tmp_path
    directory.mkdir(parents=True, exist_ok=True)
    flags = [*flags, f"--save={directory / 'theirs'}", "--save-interval=5"]
    run_megatron_lm("pretrain", directory / "out.pt", flags, world_size)
    require_readable(ranks, directory, name, tmp_path)


@needs_both
@pytest.mark.parametrize("name", TRAINED)
def test_this_project_reads_what_megatron_lm_of_the_other_release_trained(ranks, tmp_path, name):
    require_readable(ranks, KEPT / OTHER / name, name, tmp_path)
