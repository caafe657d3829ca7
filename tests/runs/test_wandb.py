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
from megatron_selfdistill.metrics.samples import Sample, SampleToken

pytestmark = pytest.mark.full  # importing wandb and starting its process takes seconds of CPU time

SECRET = "31415926535897932384626"  # of characters that the tokenizer knows


def launches(run_dir: Path) -> list[Path]:
    """Return the directories of a run's launches in wandb's directory, oldest first."""
    return sorted(path for path in (run_dir / "wandb").iterdir() if "-run-" in path.name and not path.is_symlink())


def messages(launch: Path, kind: str) -> list[Any]:
    """Return the messages of a launch that are of the kind "run", "history" or "environment", in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = launch.glob("*.wandb")
    found = [Record.FromString(text) for text in texts(file.read_bytes())]
    return [getattr(record, kind) for record in found if record.HasField(kind)]


def texts(data: bytes) -> Iterator[bytes]:
    """Yield the text of each record in LevelDB's log format: frames with a header of 7 bytes, their length and kind."""
    at, text = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        text += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last frame of several
            yield text
            text = b""


def history(launch: Path) -> list[dict[str, Any]]:
    """Return the rows that a launch has logged, without wandb's own columns; a path of keys is joined by dots."""
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in messages(launch, "history")
    ]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


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


def test_the_launches_of_a_run_continue_one_run_without_a_secret_in_which_a_repeated_step_is_the_same(
    ranks, data, tmp_path
):
    """The second launch repeats the steps after the checkpoint of step 3."""
    run = tmp_path / "first"
    options = ["metrics.loggers=[tensorboard,wandb]", "metrics.show_samples=1"]
    arguments = tiny_run.overrides(data, run, *options)
    for again in (False, True):
        if again:
            tiny_run.go_back_to_step(3, run)
        found = ranks.run(offline, tiny_run.start_and_listen, arguments, world_size=1, init_process_group=False)
        assert found[0][0] == 0 and SECRET not in found[0][1], found
    run_id, names = (run / WANDB_RUN_ID).read_text().strip(), ("first", "")  # a later launch keeps wandb's name
    settings = [run / "config.until_step_3.yaml", run / "config.yaml"]
    for launched, name, file in zip(launches(run), names, settings, strict=True):
        (one,) = messages(launched, "run")
        assert (one.run_id, one.resume, one.display_name) == (run_id, True, name)
        assert launched.name.endswith(f"-{run_id}")
        configuration = {item.key: json.loads(item.value_json) for item in one.config.update if item.key != "_wandb"}
        assert configuration == yaml.safe_load(file.read_text())
    first, second = ([row for row in history(launched) if "loss/mean" in row] for launched in launches(run))
    assert [row["step"] for row in first + second] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    of_files = {values["step"]: values for values in read_metrics(run)}
    for row in first[:3] + second:
        assert row == of_files[row["step"]]
    assert [row["loss/mean"] for row in first[3:]] == [row["loss/mean"] for row in second]
    files = [file for file in (run / "wandb").rglob("*") if file.is_file()]
    assert len(files) > 4 and [file for file in files if SECRET.encode() in file.read_bytes()] == []


def log_a_script(run_dir: Path) -> None:
    tokens = [SampleToken(1, text, 0.1, -2.0, -2.0 + ratio, 1.25, "matched") for text, ratio in SCRIPT.items()]
    loggers = Loggers(["wandb"], LoggedRun(run_dir, 3, {}))
    loggers.add_samples(4, [Sample("p7", "1+1=", "two", tokens, truncated=False)])
    loggers.add_scalars(4, {"loss/mean": math.nan, "k/mean": math.inf})
    loggers.close()


SCRIPT = {"<script>你好": 0.0, " no": -2.0}


def test_samples_are_pages_with_the_texts_escaped_and_neither_output_nor_git_nor_sources_are_copied(ranks, tmp_path):
    ranks.run(offline, log_a_script, tmp_path, world_size=1, init_process_group=False)  # in a checkout
    (launched,) = launches(tmp_path)
    with_sample, with_numbers = history(launched)
    assert with_sample["step"] == 4 and with_sample["samples/1._type"] == "html-file"
    page = (launched / "files" / with_sample["samples/1.path"]).read_text(encoding="utf-8")
    assert "&lt;script&gt;你好[- no-]" in page and "<script>" not in page
    assert math.isnan(with_numbers["loss/mean"]) and with_numbers["k/mean"] == math.inf
    assert "redirect: off" in (launched / "logs" / "debug.log").read_text()
    environments = messages(launched, "environment")
    assert environments and not any(environment.HasField("git") for environment in environments)
    names = {file.name for file in (launched / "files").rglob("*") if file.is_file()}
    assert names.isdisjoint({"output.log", "diff.patch"}) and not list(launched.rglob("code/*"))
