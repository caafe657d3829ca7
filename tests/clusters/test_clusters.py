# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The files of examples/clusters start the run of torchrun: on the real Ray, and as the pods of Kubernetes do."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ports import free_port
from tiny_run import overrides, reproducible_metrics, train

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTERS = REPOSITORY / "examples" / "clusters"
PLACES = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def expected(ranks, data, tmp_path_factory) -> list[dict[str, float]]:
    """Return the metrics of the run on two ranks."""
    run_dir = tmp_path_factory.mktemp("expected")
    train(ranks, overrides(data, run_dir), world_size=2)
    return reproducible_metrics(run_dir)


def on_ray(*settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CLUSTERS / "train_on_ray.py"), "--nodes=2", "--gpus=0", *settings]
    return subprocess.run(command, env=os.environ | PLACES, capture_output=True, text=True, timeout=300)


def test_ray_starts_the_run_of_torchrun(data, tmp_path, expected):
    ended = on_ray(*overrides(data, tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert reproducible_metrics(tmp_path) == expected


def test_a_node_that_fails_ends_the_others_and_the_program(data, tmp_path):
    ended = on_ray(*overrides(data, tmp_path, "model.hidden_size=33"))
    assert ended.returncode == 1 and "hidden_size" in ended.stdout + ended.stderr


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTERS / "kubernetes_job.yaml").read_text()))


def test_kubernetes_knows_every_field_of_the_job():
    for document in documents():
        for version in ("1.31", kubernetes_validate.latest_version()):  # podFailurePolicy is stable since 1.31
            kubernetes_validate.validate(document, version, strict=True)


def test_the_nodes_of_the_job_are_of_one_number_and_meet_at_its_first_pod():
    service, job = documents()
    pods, (trainer,) = job["spec"]["template"]["spec"], job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in trainer["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    assert trainer["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS_PER_NODE"])
    assert environment["MASTER"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pods["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def start_pods(run_dir: Path, settings: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start the command of two pods with one rank each, in process groups of their own."""
    trainer = documents()[1]["spec"]["template"]["spec"]["containers"][0]
    command = [word.replace("29500", str(free_port())) for word in trainer["command"]]
    of_pod = PLACES | {"NODES": "2", "GPUS_PER_NODE": "1", "MASTER": "127.0.0.1", "RUN_DIR": str(run_dir)}
    return [
        subprocess.Popen(
            [*command, *settings], env=os.environ | of_pod | {"JOB_COMPLETION_INDEX": str(i)}, start_new_session=True
        )
        for i in range(2)
    ]


def children(pid: int) -> list[int]:
    return [int(it) for file in Path(f"/proc/{pid}/task").glob("*/children") for it in file.read_text().split()]


def test_a_pod_that_must_leave_stops_the_run_which_resumes(data, tmp_path, expected):
    settings = [it for it in overrides(data, tmp_path) if not it.startswith("run_dir=")]
    pods = start_pods(tmp_path, settings)
    while not (tmp_path / "metrics.jsonl").exists():
        assert not any(pod.poll() for pod in pods)
        time.sleep(0.1)
    (torchrun,) = children(pods[1].pid)
    for rank in children(torchrun):  # as the hook before the pod's end
        os.kill(rank, signal.SIGTERM)
    assert [pod.wait(120) for pod in pods] == [128 + signal.SIGTERM] * 2
    assert [pod.wait(120) for pod in start_pods(tmp_path, settings)] == [0, 0]
    assert reproducible_metrics(tmp_path) == expected


def test_hadolint_finds_no_fault_in_the_containerfile():
    assert shutil.which("hadolint", path=PLACES["PATH"])
    subprocess.run(["hadolint", str(CLUSTERS / "Containerfile")], env=os.environ | PLACES, check=True)
    pinned = [line.split("==")[0] for line in (REPOSITORY / "tools" / "tested_versions.txt").read_text().splitlines()]
    named = (CLUSTERS / "Containerfile").read_text().partition("'^(")[2].partition(")==")[0].split("|")
    assert set(named) <= {*pinned}
