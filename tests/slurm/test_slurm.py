# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The project's own sbatch scripts, unedited, on a real Slurm: a run survives the events of its cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from events import wait_until
from slurm_jobs import ENDS, FOR_VLLM, SCRIPTS, STEPS, Job, config_of_the_tiny_model, parent, sh
from tiny_run import assert_equal_runs, reproducible_metrics


@pytest.fixture(autouse=True)
def free_nodes(slurm):
    yield
    slurm.cancel_all()


@pytest.fixture(scope="module")
def uninterrupted(slurm, data, tmp_path_factory) -> Path:
    """Return the directory of a complete run on two nodes."""
    job = Job("many_nodes", data, tmp_path_factory.mktemp("uninterrupted") / "run")
    nodes = {rank: node for rank, (_, node) in job.after_steps(1).ranks().items()}
    assert nodes == {0: "n1", 1: "n2"}, "ranks follow the order of the nodes"
    assert job.end() == "COMPLETED", job.text()
    assert job.steps_done() == job.saved_step() == STEPS and job.restarts() == 0
    return job.run_dir


def assert_goes_on(ranks, job: Job, uninterrupted: Path, seconds: int = 3) -> None:
    """Assert that a saved and requeued job, started after ``seconds``, ends like a run without an interruption."""
    job.start_again(seconds)
    saved = job.saved_step()
    assert 0 < saved < STEPS
    assert job.end() == "COMPLETED", job.text()
    assert job.restarts() == 1 and f"at step {saved} of {STEPS}" in job.text()
    assert not (job.run_dir / "stopped").exists()
    assert_equal_runs(ranks, uninterrupted, job.run_dir, STEPS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_accepts(slurm, script):
    sh("sbatch", "--test-only", str(script), RUN_DIR="runs/none", HF_CONFIG="none")


def test_a_run_on_one_node_completes_with_a_report_of_the_environment_first(slurm, data, tmp_path):
    passed = "RUN_DIR,GPUS_PER_NODE,PYTHON,PYTHONPATH,PATH,OMP_NUM_THREADS,NETWORK_INTERFACE"  # some sites ask for this
    options, parameters = [f"--export={passed}"], {"RUN_DOCTOR": "1", "GPUS_PER_NODE": "2"}
    job = Job("one_node", data, tmp_path / "run", "num_steps=2", options=options, **parameters)
    assert job.end() == "COMPLETED", job.text()
    assert 0 <= job.text().find("0: python ") < job.text().find("DP 2")
    assert job.saved_step() == 2 and "DP 2" in job.text()


def with_servers(data: Path, directory: Path, *more: str, server_nodes: int = 1, **environment: str) -> Job:
    """Return a run with one server, on one node or over two nodes."""
    if "SELFDISTILL_VLLM_PYTHON" not in os.environ:
        pytest.skip("needs SELFDISTILL_VLLM_PYTHON, a Python with vLLM")
    parameters = {
        "ROLLOUT_NODES": str(server_nodes),
        "SERVER_NODES": str(server_nodes),
        "SERVER_GPUS": str(server_nodes),
        "HF_CONFIG": str(config_of_the_tiny_model(directory / "hf", data)),
        "SERVER_PYTHON": os.environ["SELFDISTILL_VLLM_PYTHON"],
        "SERVER_ARGS": "--dtype=float32 --max-model-len=128 --kv-cache-gb=0.2",
        "SERVER_HOST": "127.0.0.1",
        "TORCHDYNAMO_DISABLE": "1",
        "MKL_NUM_THREADS": "1",
    }
    options = ["--nodes=3", "--partition=wide"] if server_nodes == 2 else []
    return Job("rollout_nodes", data, directory / "run", *FOR_VLLM, *more, options=options, **parameters | environment)


def test_a_server_over_two_rollout_nodes_serves_a_run(slurm, data, tmp_path):
    job = with_servers(data, tmp_path, "num_steps=2", "rollout.transfer=gloo", server_nodes=2)  # as between hosts
    wait_for_servers(job)
    assert job.nodes_running("megatron_selfdistill.engines.vllm.server.serve") == {"n2", "n3"}, job.text() + logs(
        job.run_dir / "servers"
    )
    assert job.end() == "COMPLETED", job.text() + logs(job.run_dir / "servers")
    assert_served(job, 2)
    assert "SELFDISTILL_SERVER_TOKEN" not in sh("scontrol", "show", "job", job.id)


def test_preemption_of_a_run_with_a_rollout_node_saves_requeues_and_goes_on_with_new_servers(slurm, data, tmp_path):
    steps = 40
    job = with_servers(data, tmp_path, f"num_steps={steps}")
    wait_for_servers(job)
    job.after_steps(1)
    assert job.nodes_running("megatron_selfdistill.engines.vllm.server.serve") == {"n2"}
    preempt()
    job.start_again()
    saved = job.saved_step()
    assert 0 < saved < steps, job.text()
    wait_for_servers(job, times=2)
    assert job.end() == "COMPLETED", job.text() + logs(job.run_dir / "servers")
    assert job.restarts() == 1 and f"at step {saved} of {steps}" in job.text()
    assert_served(job, steps)


def wait_for_servers(job: Job, times: int = 1) -> None:
    """Wait for the servers, which take minutes to start on a busy machine."""
    up = "1 vLLM servers are up"
    wait_until(lambda: job.text().count(up) == times or job.field("JobState") in ENDS, 1200.0)
    assert job.text().count(up) == times, job.text() + logs(job.run_dir / "servers")


def assert_served(job: Job, steps: int) -> None:
    assert job.saved_step() == steps
    metrics = reproducible_metrics(job.run_dir)[-1]
    assert metrics["rollout/servers_alive"] == 1 and metrics["rollout/sync_bytes"] > 0


def logs(directory: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-4000:] for path in directory.glob("*.log"))


def preempt() -> None:
    sh("sbatch", "--partition=urgent", "--nodes=2", "--gpus-per-node=8", "--output=/dev/null", "--wrap=true")


def stuck(path: Path, program: str = "exec sleep 1000") -> str:
    """Write a program that creates the file ``started`` next to it and does not end; return its path."""
    path.write_text(f"#!/bin/bash\ntouch {path.parent}/started\n{program}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("step", ["report", "servers"])
def test_preemption_before_the_run_requeues(slurm, data, tmp_path, step):
    """While a node's environment is reported, or servers start."""
    python = stuck(tmp_path / "python")
    parameters = {"report": {"RUN_DOCTOR": "1", "PYTHON": python}, "servers": {"SERVER_PYTHON": python}}
    job = Job("rollout_nodes", data, tmp_path / "run", HF_CONFIG="none", **parameters[step])
    wait_until((tmp_path / "started").exists)
    preempt()
    wait_until(lambda: job.restarts() == 1 or job.field("JobState") in ("COMPLETED", "FAILED"))
    reason = {"report": "TERM, before the run began", "servers": "TERM, while the servers started"}
    assert f"goes back into the queue: {reason[step]}" in job.text() and job.restarts() == 1, job.text()


def test_a_run_that_does_not_stop_in_slurms_grace_time_is_requeued_by_slurm(slurm, data, tmp_path):
    sh("scontrol", "update", "PartitionName=batch", "GraceTime=2")
    try:
        python = stuck(tmp_path / "python", "while sleep 1; do :; done")  # TERM is ignored here
        job = Job("one_node", data, tmp_path / "run", PYTHON=python)
        wait_until((tmp_path / "started").exists)
        preempt()
        wait_until(lambda: job.restarts() == 1 or job.field("JobState") in ("COMPLETED", "FAILED"))
        assert job.restarts() == 1
    finally:
        sh("scontrol", "update", "PartitionName=batch", "GraceTime=120")


def test_usr1_to_the_tasks_alone_saves_requeues_and_goes_on_bit_for_bit(slurm, ranks, data, tmp_path, uninterrupted):
    """Slurm signals no other processes of a step where it keeps them in cgroups."""
    job = Job("many_nodes", data, tmp_path / "run").after_steps(2)
    tasks = job.tasks()
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGUSR1)
    assert_goes_on(ranks, job, uninterrupted)
    assert "SIGUSR1; started again" in job.text()
    assert "srun: error" not in job.text(), "torchrun outlives the signal, else it would take slower steps with it"


def test_preemption_saves_requeues_and_goes_on_bit_for_bit(slurm, ranks, data, tmp_path, uninterrupted):
    """Here every process gets TERM, and torchrun, where it listens, would kill its ranks at once."""
    job = Job("many_nodes", data, tmp_path / "run", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="0").after_steps(2)
    preempt()
    assert_goes_on(ranks, job, uninterrupted)
    assert "SIGTERM; started again" in job.text() and "srun: error" not in job.text()


def test_a_requeue_by_hand_keeps_the_last_checkpoint_at_least(slurm, data, tmp_path):
    """Slurm itself ends the job then, KillWait seconds later: the run saves if it can."""
    job = Job("one_node", data, tmp_path / "run", "num_steps=100000", "checkpoint.save_every=2").after_steps(3)
    sh("scontrol", "requeue", job.id)
    wait_until(lambda: job.field("JobState") == "PENDING" and not job.processes())
    assert job.restarts() == 1 and job.saved_step() >= 2


def test_a_run_that_knows_its_jobs_end_stops_before_and_requeues(slurm, data, tmp_path):
    late, options = "stop.margin_minutes=2.6", ("--time=3", "--signal=USR1@5")  # no sooner than a minute before the end
    job = Job("many_nodes", data, tmp_path / "run", "num_steps=100000", late, options=options)
    wait_until(lambda: job.restarts() == 1)
    assert job.saved_step() > 0 and "its time is nearly over; started again" in job.text()
    assert "ends by itself before its Slurm job does, in" in job.text()


def test_a_crash_fails_the_job_which_is_not_requeued(slurm, data, tmp_path):
    job = Job("many_nodes", data, tmp_path / "run", "num_steps=100000").after_steps(1)
    (other, _), (one, _) = (job.ranks()[rank] for rank in (0, 1))
    os.kill(other, signal.SIGSTOP)  # this process does not end by itself
    os.kill(one, signal.SIGKILL)
    assert job.end() == "FAILED" and job.restarts() == 0
    wait_until(lambda: not job.processes(), 60)  # no process keeps the allocation


def test_a_cancelled_job_stays_cancelled(slurm, data, tmp_path):
    job = Job("many_nodes", data, tmp_path / "run", "num_steps=100000").after_steps(1)
    sh("scancel", job.id)
    assert job.end() == "CANCELLED" and job.restarts() == 0


def test_the_death_of_a_node_requeues_the_job_which_goes_on_bit_for_bit(slurm, ranks, data, tmp_path, uninterrupted):
    job = Job("many_nodes", data, tmp_path / "run", "checkpoint.save_every=2").after_steps(3)
    killed = set(job.processes("n2"))
    # The step's daemon would report an ordinary task failure.
    daemons = {parent(pid) for pid in killed} - killed - {os.getpid(), 1}
    for pid in [slurm.daemons["n2"].pid, *daemons, *killed]:
        os.kill(pid, signal.SIGKILL)
    slurm.daemons["n2"].wait()
    wait_until(lambda: job.restarts() == 1)
    slurm.start_node("n2")
    # Slurm sends the signal that the dead node has missed again after 60 s, also to the step that has its number then.
    assert_goes_on(ranks, job, uninterrupted, seconds=75)


def test_the_time_limits_signal_saves_and_requeues(slurm, data, tmp_path):
    """It comes up to a minute early."""
    own_limit_off = "stop.time_limit_minutes=1000"
    options = ("--time=2", "--signal=USR1@40")
    job = Job("many_nodes", data, tmp_path / "run", "num_steps=100000", own_limit_off, options=options)
    wait_until(lambda: job.restarts() == 1)
    assert job.saved_step() > 0 and "SIGUSR1; started again" in job.text()
