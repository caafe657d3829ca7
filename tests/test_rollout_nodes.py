# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Which commands examples/slurm/rollout_nodes.sbatch runs on which node, with a scontrol, an srun and a Python that
only write down what they were asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "examples" / "slurm" / "rollout_nodes.sbatch"
NODES = [f"n{i}" for i in range(6)]

SCONTROL = """
case "$1 $2" in
"show hostnames") for i in $FAKE_NODES; do echo "$i"; done ;;
"show node") echo "NodeName=$3 NodeAddr=127.0.0.1${3#n} NodeHostName=$3" ;;
esac
"""
# The tasks of a step, one on each node of its list, at once.
SRUN = """
while [ $# -gt 0 ]; do
    case "$1" in
    --nodelist=*) nodes=${1#--nodelist=} ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
SLURM_NODEID=0
for node in ${nodes//,/ }; do
    FAKE_NODE=$node SLURM_NODEID=$SLURM_NODEID "$@" &
    SLURM_NODEID=$((SLURM_NODEID + 1))
done
wait
"""
# A head says that it is healthy until the trainer has been there; nothing else stays.
PYTHON = """
import http.server, json, os, pathlib, sys, threading, time

def option(name):
    return next((each.split("=", 1)[1] for each in sys.argv if each.startswith(f"--{name}=")), None)

class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

folder = pathlib.Path(os.environ["FAKE_RECORD"])
node, port = os.environ["FAKE_NODE"], option("port")
told = {"node": node, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "arguments": sys.argv[1:]}
(folder / f"{node}-{port or 'trainer'}.json").write_text(json.dumps(told))
if port is None:
    (folder / "trained").touch()
elif option("node-rank") == "0":
    server = http.server.HTTPServer((f"127.0.0.1{node[1:]}", int(port)), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    while not (folder / "trained").exists():
        time.sleep(0.02)
"""


@dataclass(frozen=True)
class Command:
    """What one process was started with."""

    node: str
    gpus: str | None
    arguments: list[str]

    def options(self, *names: str) -> list[str]:
        values = dict(each.removeprefix("--").split("=", 1) for each in self.arguments if "=" in each)
        return [values[name] for name in names]


def submitted(folder: Path, **parameters: str) -> tuple[subprocess.CompletedProcess[str], list[Command], list[Command]]:
    """How the script ended; the servers' commands and the trainer's, by node and port."""
    fakes, record = folder / "bin", folder / "record"
    for new in (fakes, record):
        new.mkdir()
    shell = "#!/bin/bash\n"
    texts = {"scontrol": shell + SCONTROL, "srun": shell + SRUN, "python": f"#!{sys.executable}\n{PYTHON}"}
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
        "RUN_DIR": str(folder / "run"),
        "HF_CONFIG": "/model",
        "RUN_DOCTOR": "0",
        "PYTHON": "python",
        "SERVER_PYTHON": "python",
        **parameters,
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "a=b"], env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    found = [Command(**json.loads(path.read_text())) for path in sorted(record.glob("*.json"))]
    servers = [command for command in found if "megatron_selfdistill.serve" in command.arguments]
    return done, servers, [command for command in found if command not in servers]


def test_a_server_of_two_nodes_is_started_on_neighbours_and_the_trainer_gets_the_heads(tmp_path):
    done, servers, trainers = submitted(
        tmp_path, ROLLOUT_NODES="4", SERVER_NODES="2", SERVER_GPUS="16", SERVER_ARGS="--max-model-len=9"
    )
    assert done.returncode == 0, done.stderr
    assert "2 vLLM servers are up" in done.stdout
    assert [(one.node, *one.options("nnodes", "node-rank", "master-addr")) for one in servers] == [
        ("n2", "2", "0", "127.0.0.12"),
        ("n3", "2", "1", "127.0.0.12"),
        ("n4", "2", "0", "127.0.0.14"),
        ("n5", "2", "1", "127.0.0.14"),
    ]
    assert {one.gpus for one in servers} == {"0,1,2,3,4,5,6,7"}
    [[tensor_parallel_size, hf_config, port, master_port, longest]] = {
        tuple(one.options("tensor-parallel-size", "hf-config", "port", "master-port", "max-model-len"))
        for one in servers
    }
    assert (tensor_parallel_size, hf_config, longest) == ("16", "/model", "9")
    assert int(port) not in (int(master_port), int(master_port) + 1)
    assert [one.node for one in trainers] == ["n0", "n1"]
    for one in trainers:
        assert f"rollout.servers=[http://127.0.0.12:{port},http://127.0.0.14:{port}]" in one.arguments
        assert one.arguments[-1] == "a=b"


def test_servers_of_a_node_each_share_its_gpus(tmp_path):
    done, servers, trainers = submitted(tmp_path, ROLLOUT_NODES="2", SERVER_GPUS="4")
    assert done.returncode == 0, done.stderr
    assert [(one.node, one.gpus, *one.options("nnodes", "node-rank")) for one in servers] == [
        (node, gpus, "1", "0") for node in ("n4", "n5") for gpus in ("0,1,2,3", "4,5,6,7")
    ]
    assert {*one_of(servers, "tensor-parallel-size")} == {"4"}
    addresses = [f"http://127.0.0.1{one.node[1:]}:{port}" for one in servers for port in one.options("port")]
    assert len(trainers) == 4 and len(set(addresses)) == 4
    assert f"rollout.servers=[{','.join(addresses)}]" in trainers[0].arguments


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
    done, servers, trainers = submitted(tmp_path, **parameters)
    assert done.returncode == 2 and words in done.stdout
    assert not servers and not trainers
