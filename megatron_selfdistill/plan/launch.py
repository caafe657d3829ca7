# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The commands that launch a planned run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_selfdistill.config import Config, shown_argument
from megatron_selfdistill.hidden_values import hidden
from megatron_selfdistill.plan.engines import factor_rules
from megatron_selfdistill.rollout.vllm.engine_adapter import EngineAdapter

NEEDED = {
    "checkpoint.load": "/path/to/megatron/checkpoint",
    "data.tokenizer": "/path/to/tokenizer",
    "data.path": "/path/to/problems.jsonl",
}
"""The keys that every training needs -> their placeholder in the command."""
_RUN_DIR = "runs/first"  # used if run_dir is not set
_SCRIPTS_GPUS_PER_NODE = 8  # the default of the scripts in examples/slurm


def launch_commands(config: Config, arguments: Sequence[str]) -> tuple[str, str]:
    """Return the commands that launch the plan: with Slurm by this project's scripts, and with torchrun on each node.

    Keys and variables that are still missing are shown with a path to fill in.  References to the environment are shown
    as the user wrote them, and a secret as such a reference.
    """
    kept = [shown_argument(one) for one in arguments if one.split("=")[0] not in ("dry_run", "run_dir")]
    given = {"checkpoint.load": config.checkpoint.load, "data.tokenizer": config.data.tokenizer}
    given["data.path"] = config.data.path
    kept += [f"{key}={path}" for key, path in NEEDED.items() if given[key] is None]
    return _sbatch(config, kept), _torchrun(config, kept)


def num_nodes(config: Config) -> int:
    """Return the number of the trainer's nodes."""
    return -(-(config.cluster.num_gpus or 1) // config.cluster.gpus_per_node)


def _sbatch(config: Config, overrides: Sequence[str]) -> str:
    nodes = num_nodes(config)
    variables, options = {"RUN_DIR": hidden(config.run_dir or _RUN_DIR)}, []
    script = "one_node" if nodes == 1 else "many_nodes"
    if _wants_servers(config, overrides):
        script = "rollout_nodes"
        variables |= _server_variables(config)
        nodes += int(variables["ROLLOUT_NODES"])
        # The script starts the servers, and passes their addresses to the run.
        overrides = [*(o for o in overrides if not o.startswith("rollout.num_servers=")), "rollout.num_servers=0"]
    if _ranks_per_node(config) != _SCRIPTS_GPUS_PER_NODE:
        variables["GPUS_PER_NODE"] = str(_ranks_per_node(config))
        options.append(f"--gpus-per-node={_ranks_per_node(config)}")
    if nodes > 1:
        options.append(f"--nodes={nodes}")
    environment = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return " ".join([*environment, "sbatch", *options, f"examples/slurm/{script}.sbatch", *map(shlex.quote, overrides)])


def _wants_servers(config: Config, overrides: Sequence[str]) -> bool:
    """Return whether the run needs servers that have not been started yet."""
    on_servers = config.samples and config.rollout.engine == "vllm" and config.rollout.placement == "server"
    return on_servers and not any(override.startswith("rollout.servers=") for override in overrides)


def _server_variables(config: Config) -> dict[str, str]:
    rollout, per_node = config.rollout, _ranks_per_node(config)
    num_servers = rollout.num_servers or len(rollout.servers)
    variables = {
        "HF_CONFIG": hidden(rollout.hf_config or "/path/to/hf/config"),
        "SERVER_PYTHON": hidden(rollout.server_python or "python"),
        "SERVER_GPUS": str(rollout.engine_tp),
    }
    if config.adapter.rank:
        adapter = EngineAdapter.of(config.adapter, factor_rules(config, config.model.vocab_size or 1))
        variables["SERVER_ARGS"] = " ".join(adapter.server_args())
    if rollout.engine_tp <= per_node:
        return variables | {"ROLLOUT_NODES": str(-(-num_servers // (per_node // rollout.engine_tp)))}
    server_nodes = rollout.engine_tp // per_node
    return variables | {"SERVER_NODES": str(server_nodes), "ROLLOUT_NODES": str(num_servers * server_nodes)}


def _torchrun(config: Config, overrides: Sequence[str]) -> str:
    nodes = num_nodes(config)
    # c10d's rendezvous would number the ranks as nodes arrive, but neighbouring ranks should run on neighbouring nodes.
    where = "--standalone" if nodes == 1 else f'--nnodes {nodes} --node-rank "$NODE_RANK" --master-addr "$HEAD"'
    command = f"torchrun {where} --nproc-per-node {_ranks_per_node(config)} -m megatron_selfdistill.train"
    return " ".join([command, *map(shlex.quote, [f"run_dir={hidden(config.run_dir or _RUN_DIR)}", *overrides])])


def _ranks_per_node(config: Config) -> int:
    return min(config.cluster.num_gpus or 1, config.cluster.gpus_per_node)
