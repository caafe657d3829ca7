# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Fixtures for every test, who sees GPUs, what is skipped where there is none, and where a session's time went."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hidden_gpus

gc.disable()  # until all tests are collected: imports make millions of objects, and almost all of them stay
VISIBLE = hidden_gpus.hide()  # before torch is imported: a process that has looked for GPUs does not look again

import pytest  # noqa: E402
from ranks import RankPool  # noqa: E402

if TYPE_CHECKING:
    from shared import SharedDirectories

pytest.register_assert_rewrite("tiny_run", "parity")  # before they are imported: their assertions are those of tests

# The examples of hypothesis are the same in every session, and none is too slow on a busy machine.
if importlib.util.find_spec("hypothesis") is not None:  # the environment of a GPU's owner may lack it
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "busy machine", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("busy machine")

TESTS = Path(__file__).resolve().parent
pytest_plugins = ["shared", "smoke"]


def switched_on(name: str) -> bool:
    return os.environ.get(f"SELFDISTILL_TEST_{name}") == "1"


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


# Left out where what they need is not there: each target of make brings it.
NEEDS = {
    "browser": (switched_on("BROWSER"), "Chromium and playwright: make test-browser"),
    "clusters": (switched_on("CLUSTERS"), "Ray, kubernetes-validate and hadolint: make test-clusters"),
    "verl": (installed("verl"), "verl: make test-verl"),
    "environments": (installed("textworld", "reasoning_gym"), "textworld and reasoning-gym: make test-environments"),
    "real_model": (switched_on("REAL"), "the wheel of a real model: make test-real"),
    "vllm/colocated": (installed("vllm"), "vLLM: make test-vllm"),
    "vllm/server": ("SELFDISTILL_VLLM_PYTHON" in os.environ, "vLLM: make test-vllm"),
    "slurm": (switched_on("SLURM"), "slurmctld, slurmd and slurm-client: make test-slurm"),
}
collect_ignore = [directory for directory, (there, _) in NEEDS.items() if not there]


def pytest_report_header() -> list[str]:
    return [f"skipped: tests/{place}, which needs {what}" for place, (there, what) in NEEDS.items() if not there]


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks.run(fn, *args, world_size=N)``: see ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data(shared: SharedDirectories) -> Path:
    """40 problems with answers as hints, and a tokenizer: see tiny_run.py.  All tests read it; none writes into it."""
    import tiny_run

    return shared.get("data", tiny_run.write_data)


@pytest.fixture(scope="module")
def own_data(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of ``data``, into which the tests of a file may write."""
    return Path(shutil.copytree(data, tmp_path_factory.mktemp("own") / "data"))


@pytest.fixture(scope="session")
def finished(ranks: RankPool, data: Path, shared: SharedDirectories) -> Path:
    """Return the directory of a run of 6 steps with checkpoints of steps 3 and 6; tests must not change it."""
    import tiny_run

    return shared.get("finished_run", lambda directory: tiny_run.train(ranks, tiny_run.overrides(data, directory)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    external = {path for path in {item.path for item in items} if any(path.is_relative_to(TESTS / it) for it in NEEDS)}
    for item in items:
        if item.path in external:
            item.add_marker(pytest.mark.external)
        if item.get_closest_marker("scheduling"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not hidden_gpus.number(VISIBLE):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but look at no object of the modules that are loaded by now."""
    gc.freeze()
    gc.set_threshold(20_000)  # as in the ranks (rank_worker.py)
    gc.enable()
    atexit.register(gc.unfreeze)  # else nanobind reports Triton's objects as leaked at the end of the process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Show GPUs to the child processes of a test that is marked ``gpu``, its fixtures' included."""
    if item.get_closest_marker("gpu") is None:
        return (yield)
    with hidden_gpus.shown(VISIBLE):
        return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write one line with the seconds of each part: the directories of tests/, and the files directly in tests/."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                part = report.nodeid.split("::")[0].removeprefix(f"{TESTS.name}/").split("/")[0]
                seconds[part] += report.duration
    if seconds:
        parts = ", ".join(f"{name.removesuffix('.py')} {spent:.1f}" for name, spent in seconds.most_common())
        terminalreporter.write_line(f"seconds by part: {parts}")
