# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The real Megatron-LM and this project load and continue each other's checkpoints; needs MEGATRON_LM=DIR, its sources.

The sources must be those of the installed Megatron Core: core_v0.16.1, or core_v0.19.0.  Its ``megatron.training`` and
``pretrain_gpt.py`` run in processes of their own on the CPU (megatron_lm_worker.py), with the flags of
tests/support/megatron_flags.py.  With MEGATRON_LM_CHECKPOINTS=DIR too, the tests keep checkpoints in DIR, and read
there what the same tests kept under the other release.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpointed_run
import hf_models
import models
import pytest
import torch
from checkpointed_run import ADAM, Setup
from held_state import held
from megatron_flags import megatron_flags
from ports import neighbouring_ports

from megatron_selfdistill.checkpoint.formats.stored_model import architecture_from_args, stored_args
from megatron_selfdistill.compat import older_megatron
from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.interop.conversion import DTYPES, hf_to_megatron, megatron_to_hf
from megatron_selfdistill.interop.hf.mapping import family_of
from megatron_selfdistill.model.model_values import differences

MEGATRON_LM = os.environ.get("MEGATRON_LM")
pytestmark = pytest.mark.skipif(
    MEGATRON_LM is None, reason="MEGATRON_LM names no directory with the Megatron-LM of the installed Megatron Core"
)
KEPT = Path(os.environ.get("MEGATRON_LM_CHECKPOINTS", "/nonexistent"))
OTHER = "0.16" if older_megatron.version() >= (0, 19) else "0.19"
"""The release whose checkpoints a test of two releases reads."""

WORKER = Path(__file__).with_name("megatron_lm_worker.py")
ON_CPU = (
    "--transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion "
    "--no-bias-swiglu-fusion --no-rope-fusion --distributed-backend gloo --use-cpu-initialization"
).split()
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 5 --mock-data --tokenizer-type NullTokenizer "
    f"--vocab-size {models.VOCAB_SIZE - (older_megatron.version() < (0, 18))} "
    "--ckpt-format torch_dist --log-interval 1 --eval-iters 0 --eval-interval 100"
).split()


def run_megatron_lm(what: str, out: Path, flags: Sequence[str], world_size: int = 1) -> str:
    """Run the worker on ``world_size`` ranks; returns what the last one printed."""
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(neighbouring_ports()),
        "PYTHONPATH": os.pathsep.join([str(WORKER.parents[3]), str(Path(hf_models.__file__).parent)]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    command = [sys.executable, "-W", "ignore", WORKER, str(MEGATRON_LM), what, out, *TRAINING, *ON_CPU, *flags]
    running = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
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


def flags_of(hf: Path) -> list[str]:
    config = json.loads((hf / "config.json").read_text())
    return megatron_flags(family_of(config).model_config(config))


# Flags

WITHOUT_FLAGS = ("llama_linear", "moonlight", "minimax", "qwen3_next", "qwen3_5", "olmoe")
WITHOUT_FLAGS += () if older_megatron.version() >= (0, 19) else ("qwen3_yarn", "gpt_oss", "ministral3")
WITH_FLAGS = [kind for kind in hf_models.CONFIGS if not kind.startswith(WITHOUT_FLAGS)]
"""The kinds of models that flags express."""


# Converted checkpoints

# The constants of YaRN that Megatron-LM has no flags for, at the values that Megatron Core computes with.
EXPRESSIBLE = {
    "deepseek_v3": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "mscale": 0.8,
            "mscale_all_dim": 0.6,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        }
    }
}


@pytest.mark.parametrize("kind", WITH_FLAGS)
def test_megatron_lm_computes_the_logits_of_transformers(tmp_path, kind):
    model = hf_models.write(kind, tmp_path / "hf", **EXPRESSIBLE.get(kind, {}))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    tokens = hf_models.SEQUENCES[1]
    torch.save(torch.tensor(tokens), tmp_path / "out.pt")
    flags = [*flags_of(tmp_path / "hf"), "--load", str(tmp_path / "megatron"), "--seq-length", "40"]
    run_megatron_lm("logits", tmp_path / "out.pt", flags)
    found = torch.load(tmp_path / "out.pt")[:, : hf_models.VOCAB_SIZE]
    torch.testing.assert_close(found, hf_models.hf_logits(model, [tokens]), atol=3e-5, rtol=0)


# A run's checkpoints


def save_run(setup: Setup, run_dir: Path) -> dict[str, Any]:
    """Write the checkpoint of step 2; returns what the run holds then, with the next numbers of its random streams."""
    run = checkpointed_run.start(setup, run_dir, steps=2)
    run.save(2)
    return {"drawn": checkpointed_run.random_numbers(), **held(run.chunks, run.optimizer)}


RUNS = {
    "dense, DP 2": (Setup(kind="tied", optimizer=ADAM), 2, []),
    "dense in bf16, DP 2": (Setup(kind="gqa", optimizer=dataclasses.replace(ADAM, precision="bf16")), 2, []),
    "dense, TP 2": (
        Setup(kind="gqa", optimizer=ADAM).cut(tensor_model_parallel_size=2),
        2,
        ["--tensor-model-parallel-size", "2"],
    ),
    "experts, EP 2": (
        Setup(kind="moe", optimizer=ADAM).cut(expert_model_parallel_size=2),
        2,
        ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "alltoall"],
    ),
}
"""name -> the run, its number of ranks, the flags of its layout."""


def flags_of_run(setup: Setup, run_dir: Path, layout: list[str]) -> list[str]:
    return [
        *megatron_flags(setup.model, dtype=DTYPES[setup.optimizer.precision]),
        *("--load", str(run_dir / "checkpoints")),
        *("--seq-length", "32", "--lr", str(setup.optimizer.lr)),  # 0.19 finds a group of parameters by its rate
        *("--use-distributed-optimizer", "--override-opt_param-scheduler"),
        *layout,
    ]


@pytest.mark.parametrize("name", RUNS)
def test_megatron_lm_takes_over_a_runs_weights_optimizer_and_random_states(ranks, tmp_path, name):
    setup, world_size, layout = RUNS[name]
    saved = ranks.run(save_run, setup, tmp_path / "run", world_size=world_size)
    run_megatron_lm("state", tmp_path / "out.pt", flags_of_run(setup, tmp_path / "run", layout), world_size)
    found = torch.load(tmp_path / "out.pt")
    assert found["iteration"] == 2
    assert found["adam_steps"] and set(found["adam_steps"]) == {2}, "Adam's bias correction would be another one"
    assert found["drawn"] == saved[0]["drawn"]
    for part in ("weights", "moments"):
        require_equal(found[part], saved[0][part])


@pytest.mark.parametrize("name", RUNS)
def test_megatron_lms_training_script_continues_a_run_and_this_project_continues_it(ranks, tmp_path, name):
    setup, world_size, layout = RUNS[name]
    ranks.run(save_run, setup, tmp_path / "run", world_size=world_size)
    flags = [*flags_of_run(setup, tmp_path / "run", layout), "--save", str(tmp_path / "theirs"), "--save-interval", "5"]
    printed = run_megatron_lm("pretrain", tmp_path / "out.pt", flags, world_size)
    losses = re.findall(r"iteration\s+(\d+)/\s+5 .*?lm loss: (\S+)", printed)
    assert [int(step) for step, _ in losses] == [3, 4, 5], printed[-3000:]
    assert all(0 < float(loss) < 20 for _, loss in losses)
    assert (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").read_text().strip() == "5"
    assert ranks.run(load_theirs, setup, tmp_path / "theirs", world_size=world_size) == [5] * world_size
    megatron_to_hf(tmp_path / "theirs", tmp_path / "hf", vocab_size=models.VOCAB_SIZE)


def load_theirs(setup: Setup, path: Path) -> int:
    from megatron_selfdistill.checkpoint.external import load_weights_and_optimizer

    run = checkpointed_run.start(setup, path.parent / "ours", steps=1)
    return load_weights_and_optimizer(path, run.chunks, run.optimizer, models.VOCAB_SIZE)


# Checkpoints of Megatron-LM


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that Megatron-LM trains from scratch."""

    kind: str
    flags: tuple[str, ...] = ()
    world_size: int = 1
    distributed: bool = False
    """Whether data-parallel ranks share the optimizer."""

    @property
    def parallel(self) -> ParallelConfig:
        """The layout, which is that of ``flags``."""
        return ParallelConfig(tensor_model_parallel_size=2 if "--tensor-model-parallel-size" in self.flags else 1)

    @property
    def is_legacy(self) -> bool:
        """Whether the checkpoint has the legacy format."""
        return "torch" in self.flags

    @property
    def setup(self) -> Setup:
        """A run of this project with the same model, layout and kind of optimizer."""
        optimizer = dataclasses.replace(ADAM, use_distributed_optimizer=self.distributed)
        return Setup(kind=self.kind, optimizer=optimizer, parallel=self.parallel)


SHARED, LEGACY, TP2 = "--use-distributed-optimizer", ("--ckpt-format", "torch"), ("--tensor-model-parallel-size", "2")
TRAINED = {
    "torch_dist": Trained("gqa"),
    "torch_dist, TP 2": Trained("gqa", TP2, 2),
    "torch_dist, experts": Trained("moe"),
    "torch_dist, distributed optimizer, DP 2": Trained("tied", (SHARED,), 2, True),
    "torch_dist, reshardable": Trained("gqa", (SHARED, "--dist-ckpt-optim-fully-reshardable"), 2, True),
    "legacy": Trained("gqa", LEGACY),
    "legacy, TP 2": Trained("gqa", (*LEGACY, *TP2), 2),
    "legacy, distributed optimizer, DP 2": Trained("tied", (*LEGACY, SHARED), 2, True),
    "legacy, experts": Trained("moe", LEGACY),
}


def loaded_by_us(path: Path, trained: Trained, with_optimizer: bool, scratch: Path) -> dict[str, Any]:
    """Return what a run of this project holds after it loaded a checkpoint, by Megatron-LM's names."""
    from megatron_selfdistill.checkpoint.external import load_weights, load_weights_and_optimizer

    run = checkpointed_run.start(trained.setup, scratch, steps=1)
    if with_optimizer:
        assert load_weights_and_optimizer(path, run.chunks, run.optimizer, models.VOCAB_SIZE) == 5
    else:
        load_weights(path, run.chunks, models.VOCAB_SIZE)
    return held(run.chunks, run.optimizer)


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare weights to the bit, without the rows of padding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rows = models.VOCAB_SIZE if "word_embeddings" in name or "output_layer" in name else len(value)
        assert torch.equal(found[name][:rows], value[:rows]), name


def require_readable(ranks, directory: Path, trained: Trained, scratch: Path) -> None:
    """Compare what this project reads from a checkpoint with what Megatron-LM held when it wrote the checkpoint."""
    theirs, path = torch.load(directory / "out.pt"), directory / "theirs"
    described = architecture_from_args(stored_args(path))
    assert differences(described, trained.setup.model) == {} and described.vocab_size == models.VOCAB_SIZE
    world = trained.world_size
    found = ranks.run(loaded_by_us, path, trained, not trained.is_legacy, scratch / "run", world_size=world)[0]
    require_equal(found["weights"], theirs["weights"])
    if not trained.is_legacy:
        assert set(found["adam_steps"]) == {5}
        require_equal(found["moments"], theirs["moments"])
    hf_to_megatron(megatron_to_hf(path, scratch / "hf"), scratch / "back")
    found = ranks.run(loaded_by_us, scratch / "back", trained, False, scratch / "again", world_size=world)[0]
    require_equal(found["weights"], theirs["weights"])


@pytest.mark.parametrize("name", TRAINED)
def test_this_project_reads_what_megatron_lm_trained_from_scratch(ranks, tmp_path, name):
    trained = TRAINED[name]
    directory = KEPT / older_megatron.version_text() / name if KEPT.is_dir() else tmp_path
    directory.mkdir(parents=True, exist_ok=True)
    flags = [*megatron_flags(trained.setup.model), *trained.flags, "--seq-length", "32"]
    flags += ["--save", str(directory / "theirs"), "--save-interval", "5"]
    run_megatron_lm("pretrain", directory / "out.pt", flags, trained.world_size)
    require_readable(ranks, directory, trained, tmp_path)


# Two releases

needs_both = pytest.mark.skipif(not (KEPT / OTHER).is_dir(), reason="MEGATRON_LM_CHECKPOINTS holds no other release")


@needs_both
@pytest.mark.parametrize("name", TRAINED)
def test_this_project_reads_what_megatron_lm_of_the_other_release_trained(ranks, tmp_path, name):
    require_readable(ranks, KEPT / OTHER / name, TRAINED[name], tmp_path)


def test_a_run_is_kept_for_the_other_release(ranks, tmp_path):
    setup, world_size, _ = RUNS["dense, DP 2"]
    directory = KEPT / older_megatron.version_text() / "run" if KEPT.is_dir() else tmp_path
    saved = ranks.run(save_run, setup, directory, world_size=world_size)
    torch.save(saved[0]["moments"], directory / "moments.pt")


@needs_both
def test_megatron_lm_takes_over_a_run_of_an_older_release_only(tmp_path):
    setup, world_size, layout = RUNS["dense, DP 2"]
    directory = KEPT / OTHER / "run"
    flags = flags_of_run(setup, directory, layout)
    if OTHER == "0.19":  # its state is no common.pt
        with pytest.raises(AssertionError, match=r"common\.pt"):
            run_megatron_lm("state", tmp_path / "out.pt", flags, world_size)
        return
    run_megatron_lm("state", tmp_path / "out.pt", flags, world_size)
    require_equal(torch.load(tmp_path / "out.pt")["moments"], torch.load(directory / "moments.pt"))
