# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Slurm job that runs a script of examples/slurm, and the state that a user can see."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from events import wait_until
from tiny_run import REPOSITORY, overrides, saved_step

SCRIPTS = sorted((REPOSITORY / "examples" / "slurm").glob("*.sbatch"))
STEPS = 16
# On a CPU, vLLM's attention supports heads of 32 channels and no smaller heads.
FOR_VLLM = ("model.hidden_size=64", "model.num_attention_heads=2", "model.num_query_groups=2")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def sh(*command: str, **environment: str) -> str:
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | environment, cwd=REPOSITORY)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


class Job:
    """A submitted script with overrides, the ``options`` of sbatch and the parameters in ``environment``."""

    def __init__(
        self, script: str, data: Path, run_dir: Path, *more: str, options: Sequence[str] = (), **environment: str
    ) -> None:
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        parameters = {
            **{"RUN_DIR": str(run_dir), "GPUS_PER_NODE": "1", "RUN_DOCTOR": "0", "CUDA_VISIBLE_DEVICES": ""},
            **{"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            "NETWORK_INTERFACE": "lo",  # both nodes are this host, whose name may be missing in DNS
            **{"TOKENIZERS_PARALLELISM": "false", **environment},
        }
        own = f"num_steps={STEPS} checkpoint.save_every=4 rollout.kv_cache_gb=0.1 metrics.console_every=1".split()
        arguments = overrides(data, run_dir, *own, *more)
        path = next(path for path in SCRIPTS if path.stem == script)
        self.id = sh("sbatch", "--parsable", f"--output={self.log}", *options, str(path), *arguments, **parameters)

    def field(self, name: str) -> str:
        return sh("scontrol", "show", "job", self.id).split(f"{name}=", 1)[1].split()[0]

    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps_done(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def saved_step(self) -> int:
        return saved_step(self.run_dir)

    def after_steps(self, count: int) -> Job:
        """Wait until the run has done ``count`` steps, and return the running job."""
        wait_until(lambda: self.steps_done() >= count or self.field("JobState") in ENDS)
        assert self.field("JobState") == "RUNNING", self.text()
        return self

    def start_again(self, seconds: int = 3) -> None:
        """Start a requeued job, which otherwise waits for two minutes, after ``seconds``."""
        wait_until(lambda: self.field("JobState") == "PENDING" and self.restarts() > 0)
        # A job that restarts within a second of its requeue ends with "credential revoked".
        sh("scontrol", "update", f"JobId={self.id}", f"StartTime=now+{seconds}")

    def end(self) -> str:
        wait_until(lambda: self.field("JobState") in ENDS)
        return self.field("JobState")

    def processes(self, node: str | None = None) -> dict[int, dict[str, str]]:
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                lines = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue  # no process, or a process that has ended
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            here = node is None or environment.get("SLURMD_NODENAME") == node
            same_cluster = environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
            if environment.get("SLURM_JOB_ID") == self.id and same_cluster and here:
                found[int(entry.name)] = environment
        return found

    def nodes_running(self, module: str) -> set[str]:
        """Return the nodes with processes of this job that have ``module`` on their command line."""
        found = set()
        for pid, environment in self.processes().items():
            with contextlib.suppress(OSError):  # the process has ended
                if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0"):
                    found.add(environment["SLURMD_NODENAME"])
        return found

    def tasks(self) -> list[int]:
        """Return the pids of the processes that Slurm started for the steps of the job."""
        own = self.processes()
        return [pid for pid, one in own.items() if "SLURM_STEP_NUM_NODES" in one and parent(pid) not in own]

    def ranks(self) -> dict[int, tuple[int, str]]:
        workers = {pid: one for pid, one in self.processes().items() if "LOCAL_RANK" in one}
        own = {pid: one for pid, one in workers.items() if parent(pid) not in workers}  # without their forks
        return {int(one["RANK"]): (pid, one["SLURMD_NODENAME"]) for pid, one in own.items()}


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def config_of_the_tiny_model(directory: Path, data: Path) -> Path:
    """Write the config.json of the jobs' model, which vLLM can run on a CPU, and return its ``directory``."""
    from megatron_selfdistill.config import load
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.interop.hf.mapping import family_of_model

    config = load(overrides(data, directory / "unused", *FOR_VLLM))
    model = replace(config.model, vocab_size=RunData.load(config).vocab_size)
    family = family_of_model(model)
    described = {"architectures": [family.architecture], **family.hf_config(model, "float32")}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(described))
    return directory
