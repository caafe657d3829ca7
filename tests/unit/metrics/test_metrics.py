# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Metrics cover the global batch in any layout, are equal on all ranks, and are logged once per step."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from host_traffic import host_traffic
from rich.console import Console

from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.data.packing import PackingRules, pack
from megatron_selfdistill.loss import Divergence, Status, Target, TokenStats, VocabShard, distillation_loss
from megatron_selfdistill.loss.batch_k import solve_batch_k
from megatron_selfdistill.metrics import (
    COLUMNS,
    MetricsLog,
    Phases,
    batch_entropies,
    pace,
    read_metrics,
    rollout_metrics,
    step_metrics,
)
from megatron_selfdistill.metrics.step import K_RESOLUTION
from megatron_selfdistill.rollout.base import Response

VOCAB_SIZE, NUM_TOKENS = 50, 231
ONE_RANK = SimpleNamespace(
    world_size=1, device=torch.device("cpu"), is_last_stage=True, is_first_of_replica=True, tp_rank=0
)
LAYOUTS = [
    pytest.param(2, {}, id="dp2"),
    pytest.param(2, {"context_parallel_size": 2}, id="cp2"),
    pytest.param(2, {"pipeline_model_parallel_size": 2}, id="pp2"),
    pytest.param(2, {"tensor_model_parallel_size": 2}, id="tp2"),
    pytest.param(4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="cp2pp2"),
    pytest.param(4, {"tensor_model_parallel_size": 2}, id="dp2tp2"),
]


def all_logits(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(student, teacher): rows of every sharpness, that agree more or less."""
    generator = torch.Generator().manual_seed(5)

    def logits() -> torch.Tensor:
        scale = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64) * 9
        return scale * torch.randn(num_tokens, VOCAB_SIZE, generator=generator, dtype=torch.float64)

    student = logits()
    return student, student + logits() / 3


def all_rows(num_tokens: int = NUM_TOKENS, target: Target | None = None) -> TokenStats:
    """Return the statistics of a whole batch, by the real loss."""
    student, teacher = all_logits(num_tokens)
    return distillation_loss(
        student,
        teacher,
        torch.arange(num_tokens) % VOCAB_SIZE,
        target=target or Target(),
        divergence=Divergence(),
        vocab=VocabShard(0, VOCAB_SIZE, VOCAB_SIZE),
    )


def some_rows(stats: TokenStats, rows: Any) -> TokenStats:
    values = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    return TokenStats(**{k: v if k == "grid_betas" else v[rows] for k, v in values.items()})


def output_of(stats: TokenStats | None, ids: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> Any:
    if ids is None:
        ids = torch.arange(0 if stats is None else len(stats.loss))
    return SimpleNamespace(stats=stats, response_ids=ids, weights=weights)


def sampler_log_probs(stats: TokenStats) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    noise = 0.01 * torch.randn(len(stats.loss), generator=generator, dtype=torch.float64)
    return stats.student_log_prob + noise


def share_of_rank(sizes: dict[str, int]) -> tuple[Any, Any, torch.Tensor]:
    """(grid, output, sampler's log-probs) of this rank; its replica holds every dp_size-th token."""
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    stats = all_rows()
    replica = torch.arange(NUM_TOKENS)[grid.dp_rank :: grid.dp_size]
    ids = torch.arange(len(replica)).flip(0)[grid.cp_rank :: grid.cp_size]  # packing changes the order
    output = output_of(some_rows(stats, replica[ids]), ids) if grid.is_last_stage else output_of(None)
    return grid, output, sampler_log_probs(stats)[replica]


def metrics_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    grid, output, log_probs = share_of_rank(sizes)
    return step_metrics(output, log_probs, grid)


def entropies_in_layout(sizes: dict[str, int]) -> tuple[float, list[float], list[float]]:
    grid, output, _ = share_of_rank(sizes)
    return batch_entropies(output, grid)


def rollouts_in_layout(sizes: dict[str, int]) -> dict[str, float]:
    from megatron_selfdistill.config import ParallelConfig
    from megatron_selfdistill.distributed import ranks

    grid = ranks.initialize(ParallelConfig(**sizes), 0)
    return rollout_metrics(responses()[grid.dp_rank :: grid.dp_size], grid)


def responses() -> list[Response]:
    lengths = [3, 9, 26, 1, 26]
    return [Response([7] * n, [-1.0] * n, [-1.0] * n, "length" if n == 26 else "stop") for n in lengths]


def nearest_rank(values: torch.Tensor, share: float) -> float:
    return float(values.sort().values[math.ceil(share * len(values)) - 1])


def test_step_metrics_are_the_means_over_tokens():
    stats = all_rows()
    found = step_metrics(output_of(stats), sampler_log_probs(stats), ONE_RANK)
    difference = (sampler_log_probs(stats) - stats.student_log_prob).abs()
    expected = {
        "tokens/response": NUM_TOKENS,
        "loss/mean": stats.loss.mean(),
        "loss/reverse_kl": stats.reverse_kl.mean(),
        "entropy/student": stats.student_entropy.mean(),
        "entropy/teacher": stats.teacher_entropy.mean(),
        "entropy/target": stats.target_entropy.mean(),
        "entropy/target_minus_student": (stats.target_entropy - stats.student_entropy).mean(),
        "k/mean": (1 / stats.beta).mean(),
        "k/p01": nearest_rank(1 / stats.beta, 0.01),
        "k/p99": nearest_rank(1 / stats.beta, 0.99),
        "top1_agreement": stats.top1_agreement.double().mean(),
        "teacher_cross_entropy": -stats.teacher_log_prob.mean(),
        "student_nll": -stats.student_log_prob.mean(),
        "sampler/log_prob_mean_abs_diff": difference.mean(),
        "sampler/log_prob_max_abs_diff": difference.max(),
    }
    expected |= {f"status/{s.name.lower()}": (stats.status == s).double().mean() for s in Status}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        tolerance = K_RESOLUTION / 2 if key.startswith("k/p") else 1e-12
        assert found[key] == pytest.approx(float(value), rel=tolerance), key


def test_the_share_of_tokens_whose_entropies_do_not_match_is_logged():
    stats = all_rows()
    assert step_metrics(output_of(stats), None, ONE_RANK)["status/unconverged"] == 0
    stats.status[:21] = Status.UNCONVERGED
    assert step_metrics(output_of(stats), None, ONE_RANK)["status/unconverged"] == pytest.approx(21 / NUM_TOKENS)


@pytest.mark.parametrize(("world_size", "sizes"), LAYOUTS)
def test_step_metrics_are_equal_on_all_ranks_and_do_not_depend_on_the_layout(ranks, world_size, sizes):
    stats = all_rows()
    alone = step_metrics(output_of(stats), sampler_log_probs(stats), ONE_RANK)
    found = ranks.run(metrics_in_layout, sizes, world_size=world_size)
    assert all(other == found[0] for other in found)
    assert found[0] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("spread", [0.01, 0.5, 2.0])
def test_k_percentiles_are_nearest_ranks_within_the_stated_resolution(spread):
    stats = all_rows(num_tokens=997)
    k = torch.exp(spread * torch.randn(997, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    found = step_metrics(output_of(dataclasses.replace(stats, beta=1 / k)), None, ONE_RANK)
    assert found["k/p01"] == pytest.approx(nearest_rank(k, 0.01), rel=K_RESOLUTION / 2)
    assert found["k/p99"] == pytest.approx(nearest_rank(k, 0.99), rel=K_RESOLUTION / 2)
    assert K_RESOLUTION <= 0.01


def test_the_metrics_of_a_step_wait_for_the_device_once():
    output = output_of(all_rows(), torch.arange(NUM_TOKENS), weights=torch.ones(NUM_TOKENS))
    sampled = -torch.rand(NUM_TOKENS, dtype=torch.float64)
    with host_traffic() as found:
        step_metrics(output, sampled, ONE_RANK, weight_cap=2.0)
    assert [line.partition(" at ")[0] for line in found] == ["tolist"]
    with host_traffic() as found:
        batch_entropies(output, ONE_RANK)
    assert [line.partition(" at ")[0] for line in found] == ["tolist"]


def test_percentiles_of_one_k_are_that_k():
    stats = all_rows()
    found = step_metrics(output_of(dataclasses.replace(stats, beta=torch.full_like(stats.beta, 0.4))), None, ONE_RANK)
    assert found["k/p01"] == found["k/p99"] == 2.5


def test_a_nan_token_shows_in_the_means_and_not_in_the_percentiles():
    stats = all_rows()
    broken = {name: getattr(stats, name).detach().clone() for name in ("loss", "beta", "student_log_prob")}
    for values in broken.values():
        values[3] = math.nan
    found = step_metrics(output_of(dataclasses.replace(stats, **broken)), sampler_log_probs(stats), ONE_RANK)
    assert math.isnan(found["loss/mean"]) and math.isnan(found["k/mean"])
    assert found["sampler/log_prob_max_abs_diff"] == math.inf
    assert math.isfinite(found["entropy/student"]) and math.isfinite(found["k/p99"])


def test_a_loss_without_target_reports_only_itself():
    stats = all_rows()
    unknown = {
        f.name: torch.full_like(stats.loss.detach(), math.nan)
        for f in dataclasses.fields(stats)
        if f.name not in ("loss", "student_log_prob", "status")
    }
    unknown |= {"grid_betas": torch.empty(0), "grid_entropies": torch.empty(NUM_TOKENS, 0)}
    found = step_metrics(output_of(dataclasses.replace(stats, **unknown)), None, ONE_RANK)
    assert found.keys() == {"tokens/response", "loss/mean", "student_nll"}
    assert all(map(math.isfinite, found.values()))


@pytest.mark.parametrize(("world_size", "sizes"), [LAYOUTS[0], LAYOUTS[2]])
def test_batch_entropies_are_the_means_over_the_global_batch(ranks, world_size, sizes):
    stats = all_rows()
    found = ranks.run(entropies_in_layout, sizes, world_size=world_size)
    assert found[0] == found[1]
    mean_entropy, betas, means = found[0]
    assert mean_entropy == pytest.approx(float(stats.student_entropy.mean()), rel=1e-12)
    assert betas == stats.grid_betas.tolist()
    assert means == pytest.approx(stats.grid_entropies.mean(0).tolist(), rel=1e-12)


def test_one_k_solved_from_batch_entropies_matches_the_mean_entropy():
    student, teacher = all_logits(NUM_TOKENS)
    target = Target("batch", k_max=None)
    k = solve_batch_k(*batch_entropies(output_of(all_rows(target=target)), ONE_RANK), None)
    q = ((target.teacher_weight * teacher + student) / k).softmax(-1)
    p = student.softmax(-1)
    assert float(-(q * q.log()).sum(-1).mean()) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=0.01)


def test_batch_entropies_leave_out_nan_and_need_a_target():
    stats = all_rows()
    broken = stats.student_entropy.clone()
    broken[:7] = math.nan
    mean, _, _ = batch_entropies(output_of(dataclasses.replace(stats, student_entropy=broken)), ONE_RANK)
    assert mean == pytest.approx(float(stats.student_entropy[7:].mean()), rel=1e-12)
    with pytest.raises(ValueError, match="needs a distillation loss"):
        batch_entropies(output_of(None), ONE_RANK)


@pytest.mark.parametrize(("world_size", "sizes"), [LAYOUTS[0], LAYOUTS[1], LAYOUTS[5]])
def test_rollout_metrics_count_each_response_once(ranks, world_size, sizes):
    expected = {
        "tokens/rollout": 65,
        "response/length_mean": 13,
        "response/length_max": 26,
        "response/truncated_share": 0.4,
    }
    assert ranks.run(rollouts_in_layout, sizes, world_size=world_size) == [expected] * world_size


def test_padding_shares_are_those_of_the_packed_batch():
    contexts = [ContextPair(str(n), [1] * n, [1] * 2 * n, [2] * 5, False) for n in (3, 8, 13)]
    batch = pack(contexts, PackingRules(max_tokens=32, cp_size=1, tp_size=4, paired=False))
    found = rollout_metrics(responses(), ONE_RANK, batch)
    assert found["padding/student"] == batch.student_padding_share > 0
    assert found["padding/teacher"] == batch.teacher_padding_share > 0


def test_without_responses_there_are_no_lengths():
    assert rollout_metrics([], ONE_RANK) == {"tokens/rollout": 0}


def test_phases_add_up_and_begin_anew():
    phases = Phases()
    for _ in range(2):
        with phases("rollout"):
            time.sleep(0.02)
    with phases("train"):
        time.sleep(0.01)
    found = phases.metrics(rollout=1000)
    assert 0.04 <= found["seconds/rollout"] < found["seconds/step"]
    assert found["tokens_per_second/rollout"] == pytest.approx(1000 / found["seconds/rollout"])
    assert found["seconds/train"] >= 0.01 and "tokens_per_second/train" not in found
    assert next(value for key, value in found.items() if key.startswith("memory/")) > 0
    assert phases.metrics(rollout=1000).keys() & {"seconds/rollout", "tokens_per_second/rollout"} == set()


class Queue:
    """A GPU that does what is queued a second later, and the events that are queued on it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.waits = 0
        queue = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object) -> None:
                self.time = queue.time

            def elapsed_time(self, end: Event) -> float:
                assert queue.waits, "the events have not passed yet"
                return 1000 * (end.time - self.time)

        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: None)
        patch.setattr(torch.cuda, "synchronize", self.wait)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)

    def wait(self, device: torch.device) -> None:
        self.waits += 1


def test_phases_of_a_gpu_wait_for_it_once_per_step(monkeypatch):
    queue = Queue(monkeypatch)
    phases = Phases(torch.device("cuda"))
    for name, seconds in (("pack", 0), ("train", 3.0), ("optimizer", 0.5), ("train", 1.0)):
        with phases(name):
            queue.time += seconds
        assert queue.waits == 0, f"the end of {name} waited"
    found = phases.metrics(train=80)
    assert queue.waits == 1
    assert (found["seconds/train"], found["seconds/optimizer"], found["seconds/pack"]) == (4.0, 0.5, 0.0)
    assert found["tokens_per_second/train"] == 20 and found["memory/peak_gib"] == 1
    assert "seconds/train" not in phases.metrics()
    assert queue.waits == 1, "nothing was timed"


def log_steps(run_dir: Path, steps: range, done: int, **options: Any) -> None:
    options = {"tensorboard": False, "console": False, "num_steps": 9} | options
    with MetricsLog(run_dir, **options) as log:
        log.resume(done)
        for step in steps:
            log.log(step, {"loss/mean": step / 10, "response/length_mean": 22.0})


def test_numbers_that_json_lacks_come_back(tmp_path):
    with MetricsLog(tmp_path, num_steps=3, tensorboard=False, console=False) as log:
        log.resume(0)
        log.log(1, {"loss/mean": math.nan, "gradient_norm": math.inf, "k/mean": -math.inf, "lr": 1e-4})
    line = (tmp_path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (values,) = read_metrics(tmp_path)
    assert math.isnan(values["loss/mean"]) and values["gradient_norm"] == math.inf
    assert values["k/mean"] == -math.inf and values["lr"] == 1e-4 and values["step"] == 1


def test_a_resumed_run_logs_no_step_twice(tmp_path):
    log_steps(tmp_path, range(1, 6), done=0)  # killed after step 5; the checkpoint is of step 3
    log_steps(tmp_path, range(4, 9), done=3)
    assert [values["step"] for values in read_metrics(tmp_path)] == list(range(1, 9))


def test_a_run_that_starts_again_forgets_everything(tmp_path):
    log_steps(tmp_path, range(3), done=0)
    log_steps(tmp_path, range(1), done=0)
    assert [values["step"] for values in read_metrics(tmp_path)] == [0]


@pytest.mark.parametrize("missing", [1, 7])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, missing):
    log_steps(tmp_path, range(1, 4), done=0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-missing])
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2]
    log_steps(tmp_path, range(4, 5), done=3)
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 4]


def test_only_the_reporter_writes(tmp_path):
    log_steps(tmp_path / "run", range(3), done=0, enabled=False, tensorboard=True, console=True)
    assert not (tmp_path / "run").exists()


def test_logging_before_resume_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="resume"):
        MetricsLog(tmp_path, num_steps=3, console=False).log(1, {})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, range(1, 6), done=0, tensorboard=True)
    time.sleep(1.1)  # event files are named by the second
    log_steps(tmp_path, range(4, 8), done=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/mean")
    assert [event.step for event in events] == list(range(1, 8))


@pytest.mark.parametrize("tensorboard", [False, True])
def test_what_was_logged_is_written_again_where_the_folder_is_deleted(tmp_path, caplog, tensorboard):
    with MetricsLog(tmp_path / "run", num_steps=9, tensorboard=tensorboard, console=False) as log:
        log.resume(0)
        for step in range(1, 6):
            if step == 4:
                shutil.rmtree(tmp_path / "run")
            log.log(step, {"loss/mean": step / 10})
    assert [values["step"] for values in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert [record.getMessage().endswith("it is written again") for record in caplog.records] == [True]
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss/mean")
        assert [event.step for event in events] == [1, 2, 3, 4, 5]


def lose_events(run_dir: Path, log: MetricsLog) -> None:
    """Delete the folder and let TensorBoard's thread find out, which it otherwise does at a time of its own."""
    while run_dir.exists():  # the thread may write into the folder while it is being removed
        shutil.rmtree(run_dir, ignore_errors=True)
    with pytest.raises(FileNotFoundError):
        for _ in range(1000):
            log._writer.add_scalar("lost", 0.0, 1)
            log._writer.flush()


def test_tensorboard_goes_on_where_its_thread_has_found_the_folder_gone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path / "run", num_steps=9, console=False) as log:
        log.resume(0)
        log.log(1, {"loss/mean": 0.1})
        lose_events(tmp_path / "run", log)
        log.log(2, {"loss/mean": 0.2})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("loss/mean")
    assert [event.step for event in events] == [1, 2]


def test_a_folder_that_is_gone_at_the_end_is_a_warning(tmp_path, caplog):
    with MetricsLog(tmp_path / "run", num_steps=9, console=False) as log:
        log.resume(0)
        log.log(1, {"loss/mean": 0.1})
        lose_events(tmp_path / "run", log)
    assert f"{tmp_path}/run may lack the last lines" in caplog.text


def test_a_file_that_takes_the_name_of_the_metrics_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, num_steps=9, tensorboard=False, console=False) as log:
        log.resume(0)
        log.log(1, {"loss/mean": 0.1})
        path.unlink()
        path.write_text("somebody else's\n")
        log.log(2, {"loss/mean": 0.2})
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.replaced.jsonl").read_text() == "somebody else's\n"


def test_where_there_is_no_terminal_the_console_has_plain_lines(tmp_path):
    output = Console(file=io.StringIO(), force_terminal=False, width=40)
    log_steps(tmp_path, range(1, 10), done=0, console=True, console_every=4, output=output)
    lines = output.file.getvalue().splitlines()
    assert [line.split(" of ")[0] for line in lines[1:]] == ["step 4", "step 8", "step 9"]
    assert "\x1b" not in output.file.getvalue()
    assert "left" in lines[1] and "loss 0.4000" in lines[1] and "length 22.0" in lines[1]


def test_on_a_terminal_there_is_a_progress_bar_and_it_is_taken_down(tmp_path):
    output = Console(file=io.StringIO(), force_terminal=True, width=100)
    log_steps(tmp_path, range(4, 7), done=3, console=True, output=output)
    text = output.file.getvalue()
    assert "3/9" in text and "6/9" in text and "step 5  loss 0.5000" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


EVERY_COLUMN = {
    "loss/mean": 0.1,
    "entropy/student": 0.2,
    "k/mean": 1.4,
    "top1_agreement": 0.9,
    "response/length_mean": 20.0,
    "response/truncated_share": 0.5,
    "gradient_norm": 1.5,
    "learning_rate": 1e-6,
    "seconds/step": 3.25,
}


def console_lines(tmp_path: Path, metrics: dict[str, float]) -> list[str]:
    output = Console(file=io.StringIO(), force_terminal=False, width=40)
    with MetricsLog(tmp_path, num_steps=9, tensorboard=False, output=output) as log:
        log.resume(0)
        for step in (1, 2, 3):
            log.log(step, metrics)
    return output.file.getvalue().splitlines()


def test_every_column_of_the_console_is_explained(tmp_path):
    line = console_lines(tmp_path, EVERY_COLUMN)[-1]
    place, *columns = line.split("  ")
    assert place.endswith(" left:") and len(columns) == len(EVERY_COLUMN)
    explained = dict(re.findall(r"^  (\S+) +(\S.*)$", COLUMNS, re.MULTILINE))
    assert explained.keys() == {column.rpartition(" ")[0] for column in columns} | {"left"}
    for (key, value), column in zip(EVERY_COLUMN.items(), columns, strict=True):
        label, _, shown = column.rpartition(" ")
        assert float(shown) == value and explained[label].endswith(f"({key})")


def test_a_legend_of_the_columns_is_printed_once_before_the_first_line(tmp_path):
    legend, *lines = console_lines(tmp_path, {"loss/mean": 0.1, "learning_rate": 1e-6})
    assert legend == "columns: loss = mean loss per response token (nats); lr = learning rate"
    assert len(lines) == 3 and all(line.startswith("step ") for line in lines)


def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stop the clock of `Pace`; what is returned moves it on."""
    now = [1000.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize("done", [0, 40])
def test_the_time_left_does_not_extrapolate_the_first_step_of_a_launch(monkeypatch, done):
    wait, speed, left = clock(monkeypatch), pace.Pace(done + 20), []
    for step, seconds in enumerate([315.0, 2.0, 4.0, 3.0], done + 1):
        wait(seconds)
        speed.advance(step)
        left.append(speed.left)
    assert left == ["", "", "0:51 left", "0:48 left"]


def test_the_time_left_counts_hours(monkeypatch):
    wait, speed = clock(monkeypatch), pace.Pace(1003)
    for step in (1, 2, 3):
        wait(7.509)
        speed.advance(step)
    assert speed.left == "2:05:09 left"


def test_the_console_shows_no_time_left_before_the_third_step(tmp_path):
    _, *lines = console_lines(tmp_path, {"loss/mean": 0.1})
    assert [" left" in line for line in lines] == [False, False, True]
    output = Console(file=io.StringIO(), force_terminal=True, width=100)
    log_steps(tmp_path, range(1, 4), done=0, console=True, output=output)
    assert "3/9" in output.file.getvalue().rpartition(" left")[0]


def test_messages_hide_what_the_environment_held_and_numbers_stay(tmp_path, monkeypatch):
    from megatron_selfdistill.config import load

    monkeypatch.setenv("LAB_DIGITS", "0.1000")
    load(["data.path='${oc.env:LAB_DIGITS}'"])
    output = Console(file=io.StringIO(), force_terminal=False)
    with MetricsLog(tmp_path, num_steps=9, tensorboard=False, output=output) as log:
        log.resume(0)
        log.message("starts from /a/0.1000")
        log.log(1, {"loss/mean": 0.1})
    first, _, step = output.file.getvalue().splitlines()
    assert first == "starts from /a/${oc.env:LAB_DIGITS}" and step == "step 1 of 9:  loss 0.1000"


def test_an_evaluation_is_logged_with_all_its_numbers(tmp_path):
    output = Console(file=io.StringIO(), force_terminal=False)
    with MetricsLog(tmp_path, num_steps=9, tensorboard=False, output=output) as log:
        log.resume(0)
        log.log_evaluation(0, {"evaluation/greedy_accuracy": 0.35})
        log.message("[saved] as it is")
    assert read_metrics(tmp_path) == [{"step": 0, "evaluation/greedy_accuracy": 0.35}]
    assert output.file.getvalue() == "step 0: evaluation/greedy_accuracy 0.35\n[saved] as it is\n"
