# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""All launches of a run are one run on wandb, with its numbers and samples and no secret: the real package, offline."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

from megatron_selfdistill.metrics.loggers import WANDB_RUN_ID, LoggedRun, Loggers
from megatron_selfdistill.metrics.run_log import read_metrics
from tests.unit.metrics.test_samples import sample, token

pytestmark = pytest.mark.full  # importing wandb and starting its process takes seconds of CPU time

SECRET = "31415926535897932384626"  # of characters that the tokenizer knows


_HEADER, _BLOCK, _FRAME = 7, 32768, 7  # bytes: of the file, of a block, of the header of a frame (LevelDB's log format)
_FULL, _LAST = 1, 4


def launches(run_dir: Path) -> list[Path]:
    """Return the directories of a run's launches in wandb's directory, oldest first."""
    return sorted(path for path in (run_dir / "wandb").iterdir() if "-run-" in path.name and not path.is_symlink())


def records(launch: Path) -> list[Any]:
    """Return the messages of a launch, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = launch.glob("*.wandb")
    return [Record.FromString(text) for text in _texts(file.read_bytes())]


def history(launch: Path) -> list[dict[str, Any]]:
    """Return the rows that a launch has logged, without wandb's own columns; a path of keys is joined by dots."""
    rows = []
    for record in records(launch):
        if record.HasField("history"):
            items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def configuration(launch: Path) -> dict[str, Any]:
    """Return the configuration of the run that a launch has handed to wandb."""
    (run,) = (record.run for record in records(launch) if record.HasField("run"))
    return {update.key: json.loads(update.value_json) for update in run.config.update if update.key != "_wandb"}


def _texts(data: bytes) -> Iterator[bytes]:
    """Yield the text of each record; a record is one frame, or several that fill blocks."""
    at, text = _HEADER, b""
    while at + _FRAME <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _FRAME:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        text += data[at + _FRAME : at + _FRAME + length]
        at += _FRAME + length
        if kind in (_FULL, _LAST):
            yield text
            text = b""


def offline(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``work`` in wandb's offline mode, in a process whose exit does not end wandb's own process."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update({"WANDB_MODE": "offline", "LAB_PROMPT": SECRET})
    try:
        return work(*arguments)
    finally:
        wandb.teardown()


@pytest.fixture(scope="module")
def run(ranks, data, tmp_path_factory) -> Path:
    """Return the directory of a run of 6 steps whose second launch repeats the steps after the checkpoint of step 3."""
    run_dir = tmp_path_factory.mktemp("wandb") / "first"
    options = ["metrics.loggers=[tensorboard,wandb]"]
    arguments = tiny_run.overrides(data, run_dir, *options, "metrics.show_samples=1")
    launch(ranks, arguments)
    tiny_run.go_back_to_step(3, run_dir)
    launch(ranks, arguments)
    return run_dir


def launch(ranks: Any, arguments: list[str]) -> None:
    found = ranks.run(offline, tiny_run.start_and_listen, arguments, world_size=1, init_process_group=False)
    [(status, output)] = found
    assert status == 0, output
    assert SECRET not in output


def scalars(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [row for row in rows if "loss/mean" in row]


def test_the_launches_of_a_run_continue_one_run(run):
    first, second = launches(run)
    run_id = (run / WANDB_RUN_ID).read_text().strip()
    for launched, name in ((first, "first"), (second, "")):  # later launches keep the name that wandb's pages have
        (found,) = (record.run for record in records(launched) if record.HasField("run"))
        assert (found.run_id, found.resume, found.display_name) == (run_id, True, name)
        assert launched.name.endswith(f"-{run_id}")


def test_a_step_that_a_resumed_launch_repeats_is_there_once_per_launch_with_the_same_numbers(run):
    first, second = (scalars(history(launched)) for launched in launches(run))
    assert [row["step"] for row in first] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in second] == [4, 5, 6]
    of_files = {values["step"]: values for values in read_metrics(run)}
    for row in first[:3] + second:
        assert row == of_files[row["step"]]
    for before, again in zip(first[3:], second, strict=True):
        assert (before["step"], before["loss/mean"]) == (again["step"], again["loss/mean"])


def test_the_configuration_is_that_of_each_launch_and_no_file_of_wandb_holds_a_secret(run):
    files = [run / "config.until_step_3.yaml", run / "config.yaml"]
    for launched, file in zip(launches(run), files, strict=True):
        written = yaml.safe_load(file.read_text())
        assert configuration(launched) == written
    files = [file for file in (run / "wandb").rglob("*") if file.is_file()]
    assert len(files) > 4 and [file for file in files if SECRET.encode() in file.read_bytes()] == []


def log_a_script(run_dir: Path) -> None:
    loggers = Loggers(["wandb"], LoggedRun(run_dir, 3, {}))
    loggers.add_samples(4, [sample(token("<script>你好"), token(" no", -2.0))])
    loggers.add_scalars(4, {"loss/mean": math.nan, "k/mean": math.inf})
    loggers.close()


@pytest.fixture(scope="module")
def launched(ranks, tmp_path_factory) -> Path:
    """Return wandb's directory of `log_a_script`, which runs in a checkout."""
    run_dir = tmp_path_factory.mktemp("script")
    ranks.run(offline, log_a_script, run_dir, world_size=1, init_process_group=False)
    (launched,) = launches(run_dir)
    return launched


def test_the_samples_are_pages_with_the_texts_escaped(launched):
    with_sample, with_numbers = history(launched)
    assert with_sample["step"] == 4 and with_sample["samples/1._type"] == "html-file"
    page = (launched / "files" / with_sample["samples/1.path"]).read_text(encoding="utf-8")
    assert "&lt;script&gt;你好[- no-]" in page and "<script>" not in page
    assert math.isnan(with_numbers["loss/mean"]) and with_numbers["k/mean"] == math.inf


def test_neither_the_output_nor_the_state_of_git_nor_the_sources_are_copied(launched):
    found = records(launched)
    assert "redirect: off" in (launched / "logs" / "debug.log").read_text()
    environments = [record.environment for record in found if record.HasField("environment")]
    assert environments and not any(environment.HasField("git") for environment in environments)
    names = {file.name for file in (launched / "files").rglob("*") if file.is_file()}
    assert names.isdisjoint({"output.log", "diff.patch"}) and not list(launched.rglob("code/*"))
