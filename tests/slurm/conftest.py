# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A Slurm cluster of three nodes on this host: no root, munge, systemd or cgroups; it listens on loopback only."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

NODES, GPUS_PER_NODE = ("n1", "n2", "n3"), 8
_COMMANDS = ("slurmctld", "slurmd", "sbatch")

# auth/none needs no munge.  NoCtldInAddrAny listens on 127.0.0.1 only.  sched_interval starts jobs within 2 s.
# config_overrides: believe the CPUs below.  KillWait and SlurmdTimeout: 30 and 300 s by
# default; a busy host needs some patience.
_GLOBAL = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
KillWait=5
SlurmdTimeout=30
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=4000 Gres=gpu:{gpus}\n"
_PARTITIONS = """\
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=600 PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes=ALL MaxTime=600 PriorityTier=1 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Yield a running cluster; SLURM_CONF is set."""
    # Debian keeps daemons in a directory that is not on the PATH of an ordinary user.
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [command for command in _COMMANDS if shutil.which(command) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found: apt-get install slurmctld slurmd slurm-client")
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    os.environ["SLURM_CONF"] = str(cluster.root / "slurm.conf")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        del os.environ["SLURM_CONF"]


class Slurm:
    """The daemons, as children of this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        host = socket.gethostname().split(".")[0]
        text = _GLOBAL.format(host=host, port=free_port(), user=getpass.getuser(), root=root)
        for name in NODES:
            (root / f"spool-{name}").mkdir()
            text += _NODE.format(name=name, host=host, port=free_port(), gpus=GPUS_PER_NODE)
        (root / "state").mkdir()
        (root / "slurm.conf").write_text(text + _PARTITIONS)
        (root / "cgroup.conf").write_text(f"CgroupPlugin={_cgroup_plugin()}\n")
        for i in range(GPUS_PER_NODE):
            (root / f"gpu{i}").touch()  # Slurm only asks that the device files exist
        (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu[0-{GPUS_PER_NODE - 1}]\n")

    def start(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-i")
        for name in NODES:
            self.start_node(name)
        deadline = time.monotonic() + 60
        while self._idle_nodes() != len(NODES):
            if time.monotonic() > deadline:
                logs = "\n".join(f"{p}:\n{p.read_text()[-2000:]}" for p in self.root.glob("*.log"))
                pytest.fail(f"Slurm did not start:\n{logs}")
            time.sleep(0.1)

    def start_node(self, name: str) -> None:
        self._spawn(name, "slurmd", "-N", name)

    def cancel_all(self) -> None:
        """Return when no job is left, and every node is free."""
        subprocess.run(["scancel", "--quiet", f"--user={getpass.getuser()}"], check=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (
            subprocess.run(["squeue", "-h"], capture_output=True).stdout or self._idle_nodes() != len(NODES)
        ):
            time.sleep(0.2)

    def stop(self) -> None:
        self.cancel_all()  # slurmd does not exit while a step runs, and only slurmctld can end one
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _spawn(self, name: str, *command: str) -> None:
        nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.daemons[name] = subprocess.Popen([*command, "-D", "-f", str(self.root / "slurm.conf")], **nowhere)

    def _idle_nodes(self) -> int:
        command = ["sinfo", "-h", "-p", "wide", "-t", "idle", "-o", "%D"]
        return int(subprocess.run(command, capture_output=True, text=True).stdout.strip() or 0)


def _cgroup_plugin() -> str:
    """Return the plugin with which this version of Slurm needs no cgroups; older versions need cgroup/v1."""
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", version)
    assert found is not None, version
    return "disabled" if (int(found[1]), int(found[2])) >= (24, 5) else "cgroup/v1"
