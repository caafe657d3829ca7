# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands that the scripts of examples/slurm run on each node.

The tests replace scontrol, srun and Python by programs that only record their arguments, and sleep by a short one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "examples" / "slurm"
NODES = [f"n{i}" for i in range(6)]
PROGRAMS = ("megatron_selfdistill.rollout.vllm.server.serve", "megatron_selfdistill.train", "doctor")

SCONTROL = """
case "$1 $2" in
"show hostnames") for i in $FAKE_NODES; do echo "$i"; done ;;
"show node") echo "NodeName=$3 NodeAddr=127.0.0.1${3#n} NodeHostName=$3" ;;
"requeue $SLURM_JOB_ID") exit 1 ;; # the script would wait for its end
esac
"""
# The tasks of a step, one on each node of its list, at once; its status is the highest.
SRUN = """
nodes=$FAKE_NODES
for i; do echo "$i"; done >"$(mktemp "$FAKE_RECORD/XXXXXX.srun")"
while [ $# -gt 0 ]; do
    case "$1" in
    --nodelist=*) nodes=${1#--nodelist=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
nodes=(${nodes//,/ }) tasks=() status=0
export SLURM_STEP_NUM_NODES=${#nodes[@]}
for i in "${!nodes[@]}"; do
    FAKE_NODE=${nodes[i]} SLURM_NODEID=$i SLURM_PROCID=$i "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do
    wait "$task"
    ended=$?
    [ $ended -le $status ] || status=$ended
done
exit $status
"""
# A head says that it is healthy until the trainer has been there; nothing else stays.
PYTHON = """
import json, os, pathlib, signal, sys, threading, time

def option(name):
    return next((each.split("=", 1)[1] for each in sys.argv if each.startswith(f"--{name}=")), None)

directory = pathlib.Path(os.environ["FAKE_RECORD"])
node, port = os.environ["FAKE_NODE"], option("port")
started = {"node": node, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "arguments": sys.argv[1:]}
doctor = sys.argv[1:4] == ["-m", "megatron_selfdistill", "doctor"]
(directory / f"{node}-{'doctor' if doctor else port or 'trainer'}.json").write_text(json.dumps(started))
if doctor:
    end = os.environ["FAKE_DOCTOR"] if node == "n1" else "0"
    os.kill(os.getpid(), signal.SIGTERM) if end == "TERM" else sys.exit(int(end))
elif port is None:
    (directory / "trained").touch()
elif option("node-rank") == "0":
    import http.server

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    server = http.server.HTTPServer((f"127.0.0.1{node[1:]}", int(port)), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not (directory / "trained").exists():
        time.sleep(0.02)
"""


@dataclass(frozen=True)
class Command:
    """The node, the GPUs and the arguments of one started process."""

    node: str
    gpus: str | None
    arguments: list[str]

    def options(self, *names: str) -> list[str]:
        values = dict(each.removeprefix("--").split("=", 1) for each in self.arguments if "=" in each)
        return [values[name] for name in names]


@dataclass(frozen=True)
class Submitted:
    """The exit status of a script, and its processes by node and port."""

    done: subprocess.CompletedProcess[str]
    servers: list[Command]
    trainers: list[Command]
    doctors: list[Command]
    steps: list[list[str]]
    """srun's arguments."""


def submitted(directory: Path, script: str = "rollout_nodes", **parameters: str) -> Submitted:
    fakes, record = directory / "bin", directory / "record"
    for new in (fakes, record):
        new.mkdir()
    shell = "#!/bin/bash\n"
    texts = {"scontrol": shell + SCONTROL, "srun": shell + SRUN, "python": f"#!{sys.executable} -IS\n{PYTHON}"}
    texts["sleep"] = f"{shell}exec /bin/sleep 0.05\n"  # the scripts wait for seconds until they look again
    for name, text in texts.items():
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{fakes}{os.pathsep}{os.environ['PATH']}",
        "FAKE_NODES": " ".join(NODES),
        "FAKE_RECORD": str(record),
        "SLURM_JOB_NODELIST": "n[0-5]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.10",
        "FAKE_DOCTOR": "0",
        "RUN_DIR": str(directory / "run"),
        "HF_CONFIG": "/model",
        "RUN_DOCTOR": "0",
        "SERVER_START_MINUTES": "1",
        "PYTHON": "python",
        "SERVER_PYTHON": "python",
        **parameters,
    }
    done = subprocess.run(
        ["bash", str(SCRIPTS / f"{script}.sbatch"), "a=b"],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [Command(**json.loads(path.read_text())) for path in sorted(record.glob("*.json"))]
    of = [[one for one in found if word in one.arguments] for word in PROGRAMS]
    return Submitted(done, *of, [path.read_text().splitlines() for path in record.glob("*.srun")])


def test_a_server_of_two_nodes_is_started_on_neighbours_and_the_trainer_gets_the_heads(tmp_path):
    job = submitted(tmp_path, ROLLOUT_NODES="4", SERVER_NODES="2", SERVER_GPUS="16", SERVER_ARGS="--max-model-len=9")
    assert job.done.returncode == 0, job.done.stderr
    assert "2 vLLM servers are up" in job.done.stdout
    assert [(one.node, *one.options("nnodes", "node-rank", "master-addr")) for one in job.servers] == [
        ("n2", "2", "0", "127.0.0.12"),
        ("n3", "2", "1", "127.0.0.12"),
        ("n4", "2", "0", "127.0.0.14"),
        ("n5", "2", "1", "127.0.0.14"),
    ]
    assert {one.gpus for one in job.servers} == {"0,1,2,3,4,5,6,7"}
    [[tensor_parallel_size, hf_config, port, master_port, longest]] = {
        tuple(one.options("tensor-parallel-size", "hf-config", "port", "master-port", "max-model-len"))
        for one in job.servers
    }
    assert (tensor_parallel_size, hf_config, longest) == ("16", "/model", "9")
    assert int(port) not in (int(master_port), int(master_port) + 1)
    assert [one.node for one in job.trainers] == ["n0", "n1"]
    for one in job.trainers:
        assert f"rollout.servers=[http://127.0.0.12:{port},http://127.0.0.14:{port}]" in one.arguments
        assert one.arguments[-1] == "a=b"


def test_servers_of_a_node_each_share_its_gpus(tmp_path):
    job = submitted(tmp_path, ROLLOUT_NODES="2", SERVER_GPUS="4")
    assert job.done.returncode == 0, job.done.stderr
    assert [(one.node, one.gpus, *one.options("nnodes", "node-rank")) for one in job.servers] == [
        (node, gpus, "1", "0") for node in ("n4", "n5") for gpus in ("0,1,2,3", "4,5,6,7")
    ]
    assert {*one_of(job.servers, "tensor-parallel-size")} == {"4"}
    addresses = [f"http://127.0.0.1{one.node[1:]}:{port}" for one in job.servers for port in one.options("port")]
    assert len(job.trainers) == 4 and len(set(addresses)) == 4
    assert f"rollout.servers=[{','.join(addresses)}]" in job.trainers[0].arguments


def one_of(commands: list[Command], name: str) -> list[str]:
    return [command.options(name)[0] for command in commands]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"ROLLOUT_NODES": "6"}, "expected ROLLOUT_NODES from 1 to 5 of 6 nodes, got 6"),
        (
            {"ROLLOUT_NODES": "3", "SERVER_NODES": "2", "SERVER_GPUS": "16"},
            "expected ROLLOUT_NODES as a multiple of SERVER_NODES, got 3 and 2",
        ),
        ({"SERVER_NODES": "0"}, "expected ROLLOUT_NODES as a multiple of SERVER_NODES, got 1 and 0"),
        ({"SERVER_GPUS": "16"}, "expected SERVER_GPUS=8 on SERVER_NODES=1 (fewer only on one), got 16"),
        ({"ROLLOUT_NODES": "2", "SERVER_NODES": "2"}, "expected SERVER_GPUS=16 on SERVER_NODES=2"),
    ],
)
def test_nodes_that_do_not_add_up_are_refused_before_anything_starts(tmp_path, parameters, words):
    job = submitted(tmp_path, **parameters)
    assert job.done.returncode == 2 and words in job.done.stdout
    assert not job.servers and not job.trainers


@pytest.mark.parametrize("script", ["one_node", "many_nodes", "rollout_nodes"])
def test_a_container_sees_the_repository_and_the_run_directory_however_it_is_named_and_what_else_is_given(
    tmp_path, script
):
    """Check that a relative directory becomes absolute, since pyxis takes only sources that begin with / or a dot."""
    relative = os.path.relpath(tmp_path / "runs" / "first", REPOSITORY)
    given = {"RUN_DIR": relative, "CONTAINER_MOUNTS": "/data:/data", "RUN_DOCTOR": "1"}
    job = submitted(tmp_path, script, CONTAINER_IMAGE="trainer.sqsh", SERVER_CONTAINER_IMAGE="vllm.sqsh", **given)
    assert job.done.returncode == 0, job.done.stderr
    mounts = [REPOSITORY, tmp_path / "runs" / "first", *(["/model"] if script == "rollout_nodes" else []), "/data"]
    expected = [
        f"--container-mounts={','.join(f'{path}:{path}' for path in mounts)}",
        f"--container-workdir={REPOSITORY}",
    ]
    assert len(job.steps) == (3 if script == "rollout_nodes" else 2)
    for step in job.steps:
        image = "vllm.sqsh" if "examples/slurm/server_node.sh" in step else "trainer.sqsh"
        assert [one for one in step if one.startswith("--container")] == [f"--container-image={image}", *expected]
    assert f"run_dir={tmp_path}/runs/first" in job.trainers[0].arguments


def test_without_an_image_there_is_no_container(tmp_path):
    job = submitted(tmp_path, "many_nodes", CONTAINER_MOUNTS="/data:/data")
    assert job.trainers and not [one for step in job.steps for one in step if one.startswith("--container")]


@pytest.mark.parametrize(("environment", "gpus"), [({}, "8"), ({"SLURM_GPUS_ON_NODE": "4"}, "4")])
def test_there_are_as_many_ranks_as_the_job_has_gpus_and_every_node_is_asked_for_them(tmp_path, environment, gpus):
    job = submitted(tmp_path, "many_nodes", RUN_DOCTOR="1", **environment)
    assert [one.options("nnodes", "nproc-per-node", "node-rank") for one in job.trainers] == [
        ["6", gpus, str(rank)] for rank in range(6)
    ]
    full, *brief = [one.arguments[3:] for one in job.doctors]
    assert full == [f"--ranks={gpus}"] and brief == 5 * [[f"--ranks={gpus}", "--brief"]]


@pytest.mark.parametrize("script", ["many_nodes", "rollout_nodes"])
def test_a_node_where_no_run_can_start_ends_the_job(tmp_path, script):
    job = submitted(tmp_path, script, RUN_DOCTOR="1", FAKE_DOCTOR="1")
    assert job.done.returncode == 1 and "queue" not in job.done.stdout
    assert job.doctors and not job.servers and not job.trainers


def test_term_during_the_report_requeues_the_job(tmp_path):
    job = submitted(tmp_path, "many_nodes", RUN_DOCTOR="1", FAKE_DOCTOR="TERM")
    assert "goes back into the queue: TERM, before the run began" in job.done.stdout
    assert job.doctors and not job.trainers


def test_elsewhere_than_in_the_repository_a_script_ends_at_once(tmp_path):
    command = ["bash", str(SCRIPTS / "one_node.sbatch")]
    done = subprocess.run(command, env=os.environ | {"RUN_DIR": "run"}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "examples/slurm/common.sh: No such file" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["trainer_node.sh", "server_node.sh"])
def test_a_nodes_script_may_be_replaced_while_it_runs(tmp_path, script):
    """Slurm copies the script that is submitted, and no other."""
    copy, python = tmp_path / script, tmp_path / "python"
    copy.write_text((SCRIPTS / script).read_text())
    python.write_text(f"#!/bin/bash\nyes 'exit 7' | head -1000 >{copy}\n")
    python.chmod(0o755)
    names = ["STEP_NUM_NODES", "NODEID", "LAUNCH_NODE_IPADDR"]
    given = {f"SLURM_{name}": "0" for name in names} | {"PYTHON": str(python), "GPUS_PER_NODE": "8", "PORT": "1"}
    server = ["HEADS", "ARGS", "HOST", "PORT", "GPUS"]
    given |= {f"SERVER_{name}": "1" for name in server} | {"SERVER_PYTHON": str(python), "HF_CONFIG": "/model"}
    given |= {"SERVERS_PER_NODE": "1", "NODE_GPUS": "1", "SERVER_NODES": "1", "RUN_DIR": str(tmp_path)}
    done = subprocess.run(["bash", str(copy)], env=os.environ | given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and copy.read_text().startswith("exit 7"), done.stderr
