# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The table of docs/recipes/README.md: the plan of every recipe that names its GPUs.

python tools/size_table.py            writes the table, in a minute
python tools/size_table.py --check    changes nothing, and exits with 1 if the page has another table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_selfdistill.config import load
from megatron_selfdistill.config.key_list import config_dir
from megatron_selfdistill.instruments.plan.dry_run import Plan, dry_run
from megatron_selfdistill.instruments.plan.host_memory import checkpoint_bytes
from megatron_selfdistill.instruments.plan.memory import engine_weight_gib
from megatron_selfdistill.instruments.plan.plan_tables import num_nodes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "README.md"
BEGIN, END = "<!-- tools/size_table.py writes this table. -->", "<!-- The end of the table of tools/size_table.py. -->"
HEADINGS = (
    "recipe",
    "parameters, trained",
    "nodes",
    "layout",
    "engines",
    "GiB training / sampling",
    "GiB in a server",
    "problems",
    "bubble",
    "seconds of rollout / rest",
    "GB per update",
    "GB of a checkpoint",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table, or compare the table with --check; return 1 if the page differs, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if options.check:
        return int(wanted != text)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def recipes() -> list[str]:
    """Return the names of the recipes that name their GPUs, in the order of the alphabet."""
    files = sorted((config_dir() / "recipe").glob("*.yaml"))
    return [
        file.stem
        for file in files
        if "num_gpus" in (yaml.safe_load(file.read_text(encoding="utf-8")).get("cluster") or {})
    ]


def table() -> str:
    """Return the table as Markdown."""
    rows = [row(recipe, dry_run(load([f"recipe={recipe}"]))) for recipe in recipes()]
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *rows])


def row(recipe: str, plan: Plan) -> str:
    """Return the row of a recipe; the GiB are those of the GPU that holds most."""
    config, p = plan.config, plan.config.parallel
    if plan.update_bytes is None:
        raise ValueError(f"recipe={recipe}: expected a recipe that samples with vLLM, got none")
    trained = plan.adapter_parameters or plan.parameters
    on_servers = config.rollout.placement == "server"
    nodes, server_gpus = str(num_nodes(config)), config.rollout.engine_tp
    if on_servers:
        nodes += f" + {server_gpus / config.cluster.gpus_per_node:g}"
        engines = f"servers of {server_gpus} GPUs"
    else:
        engines = f"{(config.cluster.num_gpus or 1) // server_gpus} beside the trainer"
    sizes = {
        "TP": p.tensor_model_parallel_size,
        "PP": p.pipeline_model_parallel_size,
        "EP": p.expert_model_parallel_size if config.model.num_moe_experts else 1,
        "DP": plan.step.dp_size,
    }
    training, sampling = (max(getattr(one, f"{what}_peak") for one in plan.memory) for what in ("training", "rollout"))
    update = plan.update_bytes / 1e9
    rollout = sum(part.seconds for part in plan.parts if part.phase == "rollout")
    seconds = f"{rollout:.0f} / {sum(part.seconds for part in plan.parts) - rollout:.0f}"
    cells = [
        f"`{recipe}`",
        f"{plan.parameters / 1e9:.1f} B, " + (f"{trained / 1e9:.3g} B" if trained != plan.parameters else "all"),
        nodes,
        " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1),
        engines,
        f"{training:.1f} / {sampling:.1f}",
        f"{engine_weight_gib(config, plan.parameters):.1f}" if on_servers else "",
        str(config.data.global_batch_size),
        f"{plan.step.bubble:.1%}" if plan.step.bubble else "none",
        seconds,
        f"{update:.0f}" if update > 10 else f"{update:.2f}",
        f"{checkpoint_bytes(config, trained) / 1e9:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
