# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Legacy checkpoints in the format of Megatron-LM's ``--ckpt-format torch``: one pickle per model-parallel rank."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import models
import torch

from megatron_selfdistill.checkpoint.formats.megatron_args import megatron_args
from megatron_selfdistill.config import ModelConfig, ParallelConfig
from megatron_selfdistill.model.forward import unwrapped


def save(directory: Path, model: ModelConfig, parallel: ParallelConfig, names: str, **changes: Any) -> None:
    """Write this rank's file with the names of the layer spec local or te; ``changes`` replace stored arguments."""
    chunks, grid = models.build(model, parallel)
    args = megatron_args(chunks[0], model)
    for name in ("tensor", "pipeline", "expert"):
        setattr(args, f"{name}_model_parallel_size", getattr(parallel, f"{name}_model_parallel_size"))
    for name, value in changes.items():
        setattr(args, name, value)
    rank_name = f"mp_rank_{grid.tp_rank:02d}"
    if grid.pp_size > 1:
        rank_name += f"_{grid.pp_rank:03d}"
    if grid.ep_size > 1:
        rank_name += f"_{grid.ep_group.rank():03d}"
    states = [unwrapped(chunk).state_dict() for chunk in chunks]
    if names == "te":
        states = [_te_names(state, moe=model.num_moe_experts is not None) for state in states]
    content: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 4, "optimizer": {"state": {}}}
    content |= {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}
    file = directory / "iter_0000004" / rank_name / "model_optim_rng.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    (directory / "latest_checkpointed_iteration.txt").write_text("4")


def _te_names(state: dict[str, Any], moe: bool) -> dict[str, Any]:
    renamed = {}
    for name, value in state.items():
        name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        if not moe:
            name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        name = re.sub(r"experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight", r"experts.\2.weight\1", name)
        renamed[name] = value
    renamed["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"statistics of FP8")
    return renamed
