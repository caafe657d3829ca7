# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Save and load the state of a live run under Megatron-LM's keys: weights, optimizer and random states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_selfdistill.compat import older_megatron, repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_selfdistill.checkpoint.optimizer_shards import one_owner_per_parameter
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.model.forward import unwrapped


def model_state(chunks: Sequence[torch.nn.Module], content: dict[str, Any]) -> dict[str, Any]:
    """Return the sharded state dicts of the chunks by Megatron's keys: ``model``, or ``model0`` ... with VPP."""
    states = [unwrapped(chunk).sharded_state_dict(metadata=dict(content)) for chunk in chunks]
    return dict(zip(chunk_keys(chunks), states, strict=True))


def load_model_state(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copy ``loaded``, the tensors of `model_state` from a checkpoint, into the chunks."""
    for key, chunk in zip(chunk_keys(chunks), chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[key])


def optimizer_state(
    optimizer: MegatronOptimizer, model: dict[str, Any], content: dict[str, Any], is_loading: bool = False
) -> Any:
    """Return the optimizer's sharded state dict; ``model`` is the result of `model_state`.

    Collectives: with the distributed optimizer and not ``is_loading``, exchanges of float32 state between the
    data-parallel ranks.  Each rank keeps about its share of 12 bytes per parameter of the model shard in host memory
    (`optimizer_shards`).
    """
    _create_state(optimizer)
    with one_owner_per_parameter(_single_optimizers(optimizer)):
        return optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=content)


def load_optimizer_state(optimizer: MegatronOptimizer, wanted: Any, loaded: dict[str, Any], num_steps: int) -> None:
    """Copy the loaded state of `optimizer_state` into the optimizer.

    ``wanted``: the result of `optimizer_state`.  ``loaded``: the loaded tensors.  ``num_steps``: the stored result of
    `optimizer_steps`.  The hyperparameters of this run's configuration stay, and so does the number of Megatron's
    chained optimizers in this layout (experts have their own optimizer under expert parallelism only).
    """
    copied, _ = extract_matching_values(wanted, lambda _: True)
    _, persistent = extract_nonpersistent(copied)
    complete = merge(extract_sharded_base(persistent)[1], loaded)
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    parts = [complete] if len(chained) == 1 else [complete[index] for index in range(len(chained))]
    for single, single_state in zip(chained, parts, strict=True):
        _keep_own_rates(single.optimizer.param_groups, single_state.get("optimizer", single_state))
        if not isinstance(single, DistributedOptimizer):
            # Megatron omits a step of 0 and the state of SGD without momentum, but its loader expects them.
            inner = single_state.get("optimizer", single_state).setdefault("state", {})
            if _is_torch_adam(single) and any(isinstance(key, int) for key in inner):
                inner["common_step"] = torch.tensor(float(num_steps))
    # Megatron copies state that data-parallel ranks cut (``dp_reshardable``) into the weights under autograd.
    with torch.no_grad(), one_owner_per_parameter(_single_optimizers(optimizer)):
        optimizer.load_state_dict(complete)
    for single in _single_optimizers(optimizer):
        for state in single.optimizer.state.values():
            if "exp_avg" in state and _is_torch_adam(single):
                # One tensor per parameter: torch would increment a shared tensor once per parameter.
                state["step"] = torch.tensor(float(num_steps))
        for group in single.optimizer.param_groups:
            if "step" in group:  # Transformer Engine's and apex's FusedAdam count here
                group["step"] = _like(group["step"], num_steps)


def _keep_own_rates(own: list[dict[str, Any]], stored: dict[str, Any]) -> None:
    """Give the stored groups of parameters the learning rates of this run, by which Megatron finds them since 0.19."""
    kinds, rates = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"), ("max_lr", "min_lr")
    for group in stored.get("param_groups", []):
        same = next((one for one in own if all(one.get(kind) == group.get(kind) for kind in kinds)), {})
        group.update({rate: same[rate] for rate in rates if rate in same})


def optimizer_steps(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates so far, as Adam's bias correction counts them; 0 for SGD."""
    inner = [single.optimizer for single in _single_optimizers(optimizer)]
    counts = [state["step"] for one in inner for state in one.state.values() if "step" in state]
    counts += [group["step"] for one in inner for group in one.param_groups if "step" in group]
    return max((int(count) for count in counts), default=0)


@contextlib.contextmanager
def gathered_parameters(chunks: Sequence[Any]) -> Iterator[None]:
    """Gather the parameters of all ranks, and disable the forward hooks while the context is open.

    With ``overlap_param_gather`` a rank's copy of the parameters of other ranks is one step old until the next forward
    pass.  Without ``overlap_param_gather`` the context does nothing.
    """
    hooked = [chunk for chunk in chunks if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


RNG_STATE = "rng_state"
"""Megatron-LM's key of random states: one object per (pipeline, tensor) rank.

Until Megatron-LM 0.17 there is with expert parallelism one object per (pipeline, tensor, data x context) rank.
"""
OWN_RNG_STATE = "selfdistill_rng_state"
"""The key of the random states of all ranks, which a bit-for-bit resume needs.

There is one object per (pipeline, tensor, data x context) rank.
"""


def random_states(grid: RankGrid) -> dict[str, ShardedObject]:
    """Return the random states of this rank (Python, NumPy, torch on CPU and GPU, Megatron's tracker) for a checkpoint.

    `OWN_RNG_STATE` holds the states of every rank.  `RNG_STATE` holds the states that Megatron-LM stores, in
    Megatron-LM's format, so that ``pretrain_gpt.py`` can continue the run.  Source: ``get_rng_state`` in Megatron-LM's
    ``megatron/training/checkpointing.py``.
    """
    own = _random_state(OWN_RNG_STATE, grid)
    if older_megatron.cuts_random_states_by_data(grid.ep_size):
        return {OWN_RNG_STATE: own, RNG_STATE: _random_state(RNG_STATE, grid)}
    sizes, place = (grid.pp_size, grid.tp_size), (grid.pp_rank, grid.tp_rank)
    theirs = ShardedObject(RNG_STATE, own.data, sizes, place, replica_id=grid.dp_cp_group.rank())
    return {OWN_RNG_STATE: own, RNG_STATE: theirs}


def wanted_random_state(grid: RankGrid) -> dict[str, ShardedObject]:
    """Return the sharded object that a load fills for `load_random_state`."""
    return {OWN_RNG_STATE: _random_state(OWN_RNG_STATE, grid)}


def load_random_state(loaded: dict[str, Any]) -> None:
    """Set the random states of this rank to those of ``loaded``, the result of reading `wanted_random_state`."""
    (states,) = loaded[OWN_RNG_STATE]
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(states["rng_tracker_states"])


def _random_state(key: str, grid: RankGrid) -> ShardedObject:
    """Return the random states of this rank as the object of its (pipeline, tensor, data x context) coordinate."""
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }
    sizes = (grid.pp_size, grid.tp_size, grid.dp_cp_group.size())
    return ShardedObject(key, [states], sizes, (grid.pp_rank, grid.tp_rank, grid.dp_cp_group.rank()), replica_id=0)


def layout(grid: RankGrid) -> dict[str, int]:
    """Return the sizes of the parallel layout; random states are valid in the same layout only."""
    return {
        "tensor_model_parallel_size": grid.tp_size,
        "pipeline_model_parallel_size": grid.pp_size,
        "virtual_pipeline_model_parallel_size": grid.virtual_pipeline_model_parallel_size or 1,
        "context_parallel_size": grid.cp_size,
        "expert_model_parallel_size": grid.ep_size,
        "data_parallel_size": grid.dp_size,
    }


def chunk_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    """Return the key of each chunk in `model_state`."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def _single_optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [single for single in chained if not getattr(single, "is_stub_optimizer", False)]


def _is_torch_adam(single: MegatronOptimizer) -> bool:
    return isinstance(single.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _create_state(optimizer: MegatronOptimizer) -> None:
    """Create the state tensors of optimizers that have not made a step, with their values before the first step.

    Megatron describes existing state only: without it each load and a save before the first step would fail.
    """
    for single in _single_optimizers(optimizer):
        if single.init_state_fn is None:  # SGD has none, but Megatron calls it
            single.init_state_fn = lambda *_: None
        if not single.optimizer.state:
            _step_without_effect(single.optimizer)


def _step_without_effect(optimizer: torch.optim.Optimizer) -> None:
    """Make one step with zero gradients, without learning rate and decay; then set the count of steps to 0."""
    kept = [(group, {key: group[key] for key in ("lr", "weight_decay")}) for group in optimizer.param_groups]
    grads: list[tuple[Tensor, Tensor | None]] = []
    for group, _ in kept:
        group |= {"lr": 0.0, "weight_decay": 0.0}
        for param in group["params"]:
            grads.append((param, param.grad))
            if param.numel():  # FusedAdam fails on empty tensors
                param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, grad in grads:
        param.grad = grad
    for group, values in kept:
        group.update(values)
        if "step" in group:
            group["step"] = _like(group["step"], 0)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].zero_()


def _like(count: Any, value: int) -> Any:
    return torch.full_like(count, value) if torch.is_tensor(count) else value
