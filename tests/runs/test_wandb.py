# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The launches of a run are one run on wandb, with its numbers, its samples and no secret: the real package, offline."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import wandb_files
import yaml

from megatron_selfdistill.metrics import read_metrics
from megatron_selfdistill.metrics.loggers import WANDB_RUN_ID, LoggedRun, Loggers
from tests.unit.metrics.test_samples import sample, token

pytestmark = pytest.mark.full  # importing wandb and starting its process takes seconds of CPU time

SECRET = "s3cr3t-value-of-the-lab"


def arguments_of(data: Path, run_dir: Path) -> list[str]:
    options = ["metrics.loggers=[tensorboard,wandb]", "data.system_prompt='${oc.env:LAB_PROMPT}'"]
    return tiny_run.overrides(data, run_dir, *options, "metrics.show_samples=1", "num_steps=6")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Return the directory of a run that was killed in step 5, after its checkpoint of step 3, and started again."""
    run_dir = tmp_path_factory.mktemp("wandb") / "first"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("LAB_PROMPT", SECRET)
        killed = tiny_run.in_new_process(arguments_of(data, run_dir), kill_at="step")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        again = tiny_run.in_new_process(arguments_of(data, run_dir))
        assert again.returncode == 0, again.stderr
        assert SECRET not in again.stdout + again.stderr
    return run_dir


def scalars(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [row for row in rows if "loss/mean" in row]


def test_the_launches_of_a_run_continue_one_run(run):
    first, second = wandb_files.launches(run)
    run_id = (run / WANDB_RUN_ID).read_text().strip()
    for launch in (first, second):
        (found,) = (record.run for record in wandb_files.records(launch) if record.HasField("run"))
        assert (found.run_id, found.resume) == (run_id, True)
        assert launch.name.endswith(f"-{run_id}")
    names = [r.run.display_name for launch in (first, second) for r in wandb_files.records(launch) if r.HasField("run")]
    assert names == ["first", ""], "a later launch keeps the name that the run has on wandb's pages"


def test_a_step_that_a_killed_launch_repeats_is_there_once_per_launch_with_the_same_numbers(run):
    first, second = (scalars(wandb_files.history(launch)) for launch in wandb_files.launches(run))
    assert [row["step"] for row in first] == [1, 2, 3, 4] and [row["step"] for row in second] == [4, 5, 6]
    of_files = {values["step"]: values for values in read_metrics(run)}
    for row in first[:3] + second:
        assert row == of_files[row["step"]]
    assert first[3]["loss/mean"] == second[0]["loss/mean"]


def test_every_curve_is_drawn_over_the_steps(run):
    for launch in wandb_files.launches(run):
        metrics = [record.metric for record in wandb_files.records(launch) if record.HasField("metric")]
        assert [(m.name, m.glob_name, m.step_metric) for m in metrics[:2]] == [("step", "", ""), ("", "*", "step")]


def test_the_configuration_is_that_of_the_run_directory_and_no_file_of_wandb_holds_a_secret(run):
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["data"]["system_prompt"] == "${oc.env:LAB_PROMPT}"
    for launch in wandb_files.launches(run):
        assert wandb_files.configuration(launch) == written
    files = [file for file in (run / "wandb").rglob("*") if file.is_file()]
    assert len(files) > 4 and [file for file in files if SECRET.encode() in file.read_bytes()] == []


def test_neither_the_output_nor_the_sources_are_copied(run):
    names = {file.name for file in (run / "wandb").rglob("*") if file.is_file()}
    assert names.isdisjoint({"output.log", "diff.patch"}) and not list((run / "wandb").rglob("code"))
    for launch in wandb_files.launches(run):
        assert not any(record.HasField("output_raw") or record.HasField("output") for record in wandb_files.records(launch))


def test_the_samples_are_pages_with_the_texts_escaped(ranks, tmp_path):
    ranks.run(log_a_script, tmp_path, world_size=1, init_process_group=False)
    (launch,) = wandb_files.launches(tmp_path)
    with_sample, with_numbers = wandb_files.history(launch)
    assert with_sample["step"] == 4 and with_sample["samples/1._type"] == "html-file"
    page = (launch / "files" / with_sample["samples/1.path"]).read_text(encoding="utf-8")
    assert "&lt;script&gt;你好<strong> no</strong></pre>" in page and "<script>" not in page
    assert math.isnan(with_numbers["loss/mean"]) or with_numbers["loss/mean"] == "NaN"
    assert with_numbers["k/mean"] == "Infinity"


def log_a_script(run_dir: Path) -> None:
    os.environ["WANDB_MODE"] = "offline"
    loggers = Loggers(["wandb"], LoggedRun(run_dir, 3, {}))
    loggers.add_samples(4, [sample(token("<script>你好"), token(" no", -2.0))])
    loggers.add_scalars(4, {"loss/mean": math.nan, "k/mean": math.inf})
    loggers.close()
