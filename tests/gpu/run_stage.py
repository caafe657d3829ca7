# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Stage: whole runs on one device, each against another run or against whole forward passes, and memory by the plan.

python -m tests.gpu.run_stage
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

# Packed float32 rows: see gpu/layout_rank.py.
sys.modules["transformer_engine"] = None  # type: ignore[assignment]

import tiny_run  # noqa: E402
import torch  # noqa: E402
from taught import write_records_of_teachers  # noqa: E402

from tests.gpu.determinism import deterministic, set_environment  # noqa: E402
from tests.gpu.leaving import leave  # noqa: E402
from tests.gpu.results import Figure, Outcome, all_held, largest  # noqa: E402

ON_GPU = torch.cuda.is_available()


def main() -> int:
    set_environment()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="selfdistill_runs_", ignore_cleanup_errors=True) as path:
        directory = Path(path)
        tiny_run.write_data(directory)
        checks = {
            "teacher offloaded to host memory": partial(offloaded_teacher, directory),
            "teachers fetched beside the student": partial(fetched_teachers, directory),
            "saving in the background and resuming": partial(background_saves, directory),
            "guided sampling in process": guided_sampling,
            "decoding from CUDA graphs": partial(guided_sampling, cuda_graphs=True),
            "memory against the plan": partial(planned_memory, directory),
        }
        return all_held(checks)


def run(arguments: list[str]) -> None:
    """Run a whole training run in this process; raises where it does not end with 0."""
    with deterministic(ON_GPU):
        status = tiny_run.start(arguments)
    leave(synchronize=False)
    if ON_GPU:
        torch.cuda.empty_cache()
    if status:
        raise RuntimeError(f"a run ended with status {status}, expected 0: {' '.join(arguments)}")


def differences(one: Path, other: Path, num_steps: int = 6) -> tuple[Figure, Figure]:
    """Return the largest difference of any metric of two runs, clocks aside, and of any tensor of their checkpoints."""
    metrics = {}
    both = tiny_run.reproducible_metrics(one), tiny_run.reproducible_metrics(other)
    if [len(lines) for lines in both] != [num_steps] * 2 or both[0][0].keys() != both[1][0].keys():
        raise RuntimeError(f"expected the same metrics of {num_steps} steps twice, got {list(map(len, both))} steps")
    for step, (a, b) in enumerate(zip(*both, strict=True), 1):
        metrics |= {f"{key} of step {step}": _apart(a[key], b[key]) for key in a}
    from megatron_selfdistill.checkpoint.formats.directory import iteration_name
    from megatron_selfdistill.interop.torch_dist_tensors import TorchDistReader

    a, b = (TorchDistReader(path / "checkpoints" / iteration_name(num_steps)) for path in (one, other))
    tensors = {
        key: float((a.read_at((key, ()), ()).double() - b.read_at((key, ()), ()).double()).abs().max())
        if math.prod(shape)
        else 0.0
        for key, shape in a.shapes.items()
    }
    return largest("metrics, largest difference", metrics, 0.0), largest("tensors, largest difference", tensors, 0.0)


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b or (math.isnan(a) and math.isnan(b)) else abs(a - b)


def offloaded_teacher(directory: Path) -> Outcome:
    """Compare a run whose teacher's weights and rows rest in host memory with one whose teacher stays on the device."""
    keys = ["teacher.weights=frozen", "checkpoint.save_every=6", "schedule.pair_order=teacher_first"]
    resident, offloaded = directory / "resident", directory / "offloaded"
    run(tiny_run.overrides(directory, resident, *keys))
    run(tiny_run.overrides(directory, offloaded, *keys, "teacher.offload=cpu", "schedule.teacher_store_gb=0"))
    return Outcome(differences(resident, offloaded))


def fetched_teachers(directory: Path) -> Outcome:
    """Compare a run that fetches the weights of two teachers beside the student with one that copies them between.

    A copy that overtook a pass on the device, or was read before its end, would change the numbers.
    """
    file = write_records_of_teachers(directory, ["code", "math"])
    keys = [f"data.path={file}", "checkpoint.save_every=6"]
    for seed, name in enumerate(("code", "math"), 1):
        run(tiny_run.overrides(directory, directory / name, "num_steps=1", "optimizer.lr=1e-2", f"seed={seed}"))
        keys.append(f"teachers.{name}.load={directory / name / 'checkpoints'}")
    fetched, between = directory / "fetched", directory / "between"
    run(tiny_run.overrides(directory, fetched, *keys))
    run(tiny_run.overrides(directory, between, *keys, "teacher.offload=cpu"))
    return Outcome(differences(fetched, between))


def background_saves(directory: Path) -> Outcome:
    """Compare a run that resumes from a checkpoint saved in the background with the run that never stopped."""
    whole, halves = directory / "whole", directory / "halves"
    keys = ["checkpoint.async_save=true", "teacher.weights=ema"]
    run(tiny_run.overrides(directory, whole, *keys))
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoints" / "iter_0000006")
    (halves / "checkpoints" / tiny_run.TRACKER).write_text("3")
    run(tiny_run.overrides(directory, halves, *keys))
    return Outcome(differences(whole, halves))


def guided_sampling(cuda_graphs: bool = False) -> Outcome:
    """Compare greedy guided tokens with the argmax of the mixed logits of two whole forward passes."""
    import decoding
    import guided_decoding
    import models
    import torch.distributed as dist

    from megatron_selfdistill.rollout.megatron import recorded_passes

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        chunks, grid = models.build(models.model_config(), models.parallel())
        model = chunks[0].eval()
        recorded_passes.COLUMNS = 4  # several recordings, and others where responses have ended
        params = replace(guided_decoding.GREEDY_PAIRS, stop_token_ids=tuple(range(models.VOCAB_SIZE // 8)))
        sampler = guided_decoding.guided_sampler_of(chunks, grid, cuda_graphs=cuda_graphs)
        requests = decoding.make_pairs(28)
        below, difference, count = 0.0, 0.0, 0
        for request, response in zip(requests, sampler.generate(requests, params), strict=True):
            student, teacher = decoding.both_logits(partial(decoding.logits_of, model), request, response.token_ids)
            mix, ids = 0.75 * teacher + student, torch.tensor(response.token_ids)[:, None]
            below = max(below, float((mix.amax(-1) - mix.gather(1, ids)[:, 0]).max()))
            stated = torch.tensor(response.log_probs, dtype=torch.float64)
            difference = max(difference, float((student.log_softmax(-1).gather(1, ids)[:, 0] - stated).abs().max()))
            count += len(response.token_ids)
    finally:
        leave(synchronize=False)
    return Outcome(
        (
            Figure("tokens below the best mixed logit", below, 1e-3),
            Figure("student's log-probs off whole passes, nats", difference, 1e-3),
            Figure("tokens", float(count), 50, at_least=True),
        )
    )


PLANNED = (
    *("model.num_layers=16", "model.hidden_size=1024", "model.ffn_hidden_size=4096", "model.num_attention_heads=16"),
    *("model.num_query_groups=8", "model.vocab_size=65536", "model.make_vocab_size_divisible_by=128"),
    *("model.max_position_embeddings=4096", "model.init_method_std=0.02", "optimizer.lr=1e-5"),
    *("data.global_batch_size=64", "schedule.max_tokens=4096", "num_steps=2", "checkpoint.save_every=1000"),
    *("rollout.max_new_tokens=48", "rollout.kv_cache_gb=0.5", "cluster.num_gpus=1"),
)
"""0.4e9 parameters in bf16."""


def planned_memory(directory: Path) -> Outcome:
    """Compare the most memory that a run has allocated on the device with the dry run's figure, reserved room aside."""
    if not ON_GPU:
        return Outcome(not_done="the plan is about a GPU's memory, and this is a CPU")
    from megatron_selfdistill.metrics.run_log import read_metrics

    run_dir = directory / "planned"
    arguments = [a for a in tiny_run.overrides(directory, run_dir, *PLANNED) if a != "optimizer=fp32"]
    code = f"import sys; from tests.gpu.run_stage import print_plan; print_plan({arguments!r})"
    planned = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if planned.returncode:
        raise RuntimeError(f"the dry run failed: {planned.stderr[-300:]}")
    expected = float(planned.stdout.split()[-1])
    torch.cuda.reset_peak_memory_stats()
    run(arguments)
    peak = max(line["memory/peak_gib"] for line in read_metrics(run_dir))
    print(f"planned {expected:.2f} GiB, allocated at most {peak:.2f} GiB", flush=True)
    return Outcome(
        (
            Figure("allocated, to the plan", peak / expected, 1.1),
            Figure("the same, from below", peak / expected, 0.6, at_least=True),
        )
    )


def print_plan(arguments: list[str]) -> None:
    """Print the GiB that the plan expects while training, without the reserve.

    The plan runs in a new process, because it replaces the process group.
    """
    from megatron_selfdistill import config as configuration
    from megatron_selfdistill.instruments.plan.dry_run import dry_run

    (memory,) = dry_run(configuration.load(arguments)).memory
    parts = {name: gib for name, gib in memory.training.items() if name != "reserved"}
    print(parts, file=sys.stderr)
    print(sum(parts.values()))


if __name__ == "__main__":
    sys.exit(main())
