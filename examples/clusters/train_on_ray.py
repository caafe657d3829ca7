# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Start a run on Ray: one task per node, each of which runs torchrun, as the scripts for Slurm do.

    python examples/clusters/train_on_ray.py --nodes 4 --gpus 8 run_dir=/shared/runs/first data.path=... ...

Every node needs this package, and the file system of the run directory.  The program ends with status 1 as soon as one
node fails, and Ray then ends the others; started again, it resumes the run from its last checkpoint.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


def free_address() -> tuple[str, int]:
    """Return the address of this node and a free port."""
    address: Any = get_node_ip_address  # without types
    with socket.socket() as listener:
        listener.bind(("", 0))
        return address(), listener.getsockname()[1]


def run_node(address: tuple[str, int], nodes: int, rank: int, ranks: int, settings: Sequence[str]) -> int:
    """Run torchrun with the ranks of one node; return its status."""
    layout = [f"--nnodes={nodes}", f"--node-rank={rank}", f"--nproc-per-node={ranks}"]
    meeting = [f"--master-addr={address[0]}", f"--master-port={address[1]}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *layout, *meeting]
    return subprocess.run([*torchrun, "-m", "megatron_selfdistill.train", *settings]).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run all nodes; return 0 once the run is complete, and 1 if a node has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs per node; 0: one rank per node on a CPU (default: 8)")
    parser.add_argument("--address", help="Ray's cluster (default: RAY_ADDRESS, else one on this machine)")
    options, settings = parser.parse_known_args(argv)
    ray.init(address=options.address)
    size = {"CPU": 1.0, **({"GPU": float(options.gpus)} if options.gpus else {})}
    group = placement_group([size] * options.nodes, strategy="STRICT_SPREAD" if options.gpus else "SPREAD")
    ray.get(group.ready())

    def on_node(index: int, function: Any) -> Any:
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        wanted = {"num_cpus": 1, "num_gpus": options.gpus, "max_retries": 0, "scheduling_strategy": place}
        return ray.remote(**wanted)(function)

    address = ray.get(on_node(0, free_address).remote())
    layout = options.nodes, max(options.gpus, 1)
    running = [on_node(i, run_node).remote(address, layout[0], i, layout[1], settings) for i in range(options.nodes)]
    while running:
        [ended], running = ray.wait(running)
        if ray.get(ended) != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
