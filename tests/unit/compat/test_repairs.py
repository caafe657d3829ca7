# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The repairs correct the mistakes of Megatron Core, and leave a machine with CUDA unchanged."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import layouts
import models
import pytest
import torch
import torch.distributed as dist

from megatron_selfdistill.compat import cpu, repairs  # isort: skip  (must come before megatron.core)
import queue

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_selfdistill.config import ParallelConfig
from megatron_selfdistill.model import architecture, build
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.layers import RMSNorm

from megatron_selfdistill.compat.cpu import FileQueue  # isort: skip  (must come before megatron.core)

REPOSITORY = Path(__file__).resolve().parents[3]


# -- the router's padding mask --------------------------------------------------------------------------------


def router_with(**changes):
    chunks, _ = models.build(models.model_config("moe", **changes), ParallelConfig())
    return unwrapped(chunks[0]).decoder.layers[0].mlp.router.train()


SIZES = {"padded": (9, 5), "as many tokens as experts": (4, 2), "unpadded": (7, 7), "all padding": (6, 0)}
"""The number of tokens, and of real tokens among them."""


def counted_tokens() -> list[tuple[list[int], list[int]]]:
    """Return the tokens per expert that the router counts, and those that it routes among the real tokens."""
    found = []
    for num_tokens, num_real in SIZES.values():
        router = router_with(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
        padding_mask = torch.arange(num_tokens)[None] >= num_real
        _, routing_map = router(torch.randn(num_tokens, 1, 32), padding_mask=padding_mask)
        found.append((router.local_tokens_per_expert.int().tolist(), routing_map[:num_real].sum(0).tolist()))
    return found


def test_expert_biases_count_only_real_tokens(ranks):
    (found,) = ranks.run(counted_tokens, world_size=1)
    for (name, (_, num_real)), (counted, routed) in zip(SIZES.items(), found, strict=True):
        assert counted == routed, name
        assert sum(counted) == 2 * num_real, "two experts per token"


def auxiliary_loss(num_real: int, padding: float) -> tuple[float, torch.Tensor, float]:
    """Return the load-balancing loss of 6 tokens, its gradient in the router, and that of the real tokens in float64.

    ``num_real``: the number of real tokens among the 6.
    """
    router = router_with(transformer={"moe_aux_loss_coeff": 0.5})
    torch.manual_seed(0)
    clear_aux_losses_tracker()
    hidden = torch.randn(6, 1, 32)
    hidden[num_real:] = padding
    probs, _ = router(hidden, padding_mask=torch.arange(6)[None] >= num_real)
    (probs.sum() * 0.0).backward()
    logged = get_moe_layer_wise_logging_tracker()["load_balancing_loss"]["values"].sum()
    logits = (hidden[:num_real, 0].double() @ router.weight.detach().double().T).softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0)
    expected = 4 * (chosen.sum(0) / (2 * num_real) * logits.mean(0)).sum() if num_real else torch.zeros(())
    return float(logged), router.weight.grad.clone(), float(expected)


def auxiliary_losses(cases: list[tuple[int, float]]) -> list[tuple[float, torch.Tensor, float]]:
    return [auxiliary_loss(*case) for case in cases]


def test_the_balancing_loss_of_real_tokens_is_the_formula_and_that_of_padding_is_zero(ranks):
    cases = [(4, 0.0), (4, 7.0), (0, 1.0)]
    (((loss, gradient, expected), other, of_padding),) = ranks.run(auxiliary_losses, cases, world_size=1)
    assert loss == pytest.approx(expected, rel=1e-5) and gradient.norm() > 1e-3
    assert other[0] == loss
    torch.testing.assert_close(other[1], gradient)
    assert of_padding[0] == 0.0 and of_padding[1].isfinite().all() and not of_padding[1].any()


# -- Megatron Core on CPU, and a machine with CUDA --------------------------------------------------------------


@pytest.mark.full
def test_a_machine_with_cuda_is_left_as_it_was():
    """Nothing of torch is replaced, nothing set, and Megatron not even imported.

    Without CUDA the same comparison finds the replaced names.
    """
    code = """
import os, sys
import torch, torch.distributed
places = [torch, torch.Tensor, torch.nn.Module, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.distributed]
available = torch.cuda.is_available
torch.cuda.is_available = lambda: True
before = [dict(vars(place)) for place in places]
environment = dict(os.environ)
from megatron_selfdistill.compat import cpu
assert cpu.ON_CPU is False and cpu.install() is False
for place, names in zip(places, before):
    now = vars(place)
    changed = [name for name in names.keys() | now.keys() if now.get(name) is not names.get(name)]
    assert not changed, (place, changed)
assert dict(os.environ) == environment
assert not any(name.startswith("megatron.core") for name in sys.modules)

torch.cuda.is_available = available
import importlib
importlib.reload(cpu)
names = before[places.index(torch.Tensor)]
changed = {name for name, value in vars(torch.Tensor).items() if names.get(name) is not value}
assert cpu.ON_CPU and {"cuda", "to", "type", "new_empty"} <= changed, changed
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-Wignore", "-c", code], cwd=REPOSITORY, check=True, env=environment)


cpu_only = pytest.mark.skipif(not cpu.ON_CPU, reason="this machine has CUDA")


def error_of_importing_repairs(directory: str) -> str:
    """Return the error of the first import of the repairs in a process, with a directory first on the path."""
    sys.path.insert(0, directory)
    TopKRouter._selfdistill_repaired = False
    del sys.modules[repairs.__name__]
    with pytest.raises(ImportError) as caught:
        importlib.import_module(repairs.__name__)
    return str(caught.value)


@pytest.mark.parametrize("reason", ["undefined symbol: _ZN3c10", "No module named 'something_that_it_needs'"])
def test_a_transformer_engine_that_does_not_load_is_not_taken_for_none(ranks, tmp_path, reason):
    missing = reason.startswith("No module")
    code = "import something_that_it_needs" if missing else f"raise ImportError({reason!r})"
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text(code)
    found = ranks.run(error_of_importing_repairs, str(tmp_path), world_size=1, init_process_group=False)
    assert found == [reason]


def uneven_collectives() -> tuple[list[float], list[float], list[float]]:
    """Return the results of all_gather and reduce_scatter of 1, 2, .. rows, and of all_to_all: gloo alone does none."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [torch.full((r + 1,), float(r)) for r in range(size)]
    gathered = [torch.empty(r + 1) for r in range(size)]
    dist.all_gather(gathered, rows[rank])
    scattered = torch.empty(rank + 1)
    dist.reduce_scatter(scattered, [row + rank for row in rows])
    counts, received = torch.arange(1, size + 1), torch.empty(size * (size + 1) // 2)
    send = torch.full((size * int(counts[rank]),), float(rank))
    dist.all_to_all_single(received, send, counts, torch.full((size,), int(counts[rank])))
    return torch.cat(gathered).tolist(), scattered.tolist(), received.tolist()


@cpu_only
def test_collectives_of_uneven_parts_are_what_nccl_makes_of_them(ranks):
    for rank, (gathered, scattered, received) in enumerate(ranks.run(uneven_collectives, world_size=3)):
        assert gathered == received == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
        assert scattered == [3.0 * rank + 3] * (rank + 1)


# -- weights that Transformer Engine marks as cut --------------------------------------------------------------


class MarkedNorm(RMSNorm):
    """A replicated weight, marked as Transformer Engine marks that of a linear layer without a parallel mode."""

    parallel_mode = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)


def marked_spec(config: Any, vp_stage: int | None = None, **_: Any) -> Any:
    block = architecture.layer_spec(config, vp_stage, transformer_engine=False)
    for spec in block.layer_specs:
        spec.submodules.pre_mlp_layernorm = MarkedNorm
    return block


def norms_of_gradients(cases: list[layouts.Case]) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "layer_spec", marked_spec)
        return [layouts.run(case).grad_norm for case in cases]


def test_a_weight_that_every_tensor_parallel_rank_holds_is_counted_once(ranks):
    case = layouts.Case(kind="shallow", extra_weightless=0)
    (expected,) = ranks.run(norms_of_gradients, [case], world_size=1)[0]
    cut = [dataclasses.replace(case, parallel=models.parallel(tp=2, sp=sp)) for sp in (False, True)]
    assert ranks.run(norms_of_gradients, cut, world_size=2) == [[pytest.approx(expected, rel=1e-5)] * 2] * 2


def test_marks_are_as_weights_are_cut():
    """Each tensor-parallel rank has other experts, or other parts of them, and other heads."""
    experts = torch.nn.ModuleDict({"linear_fc1": torch.nn.Linear(2, 2)})
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts}), "core_attention": torch.nn.Module()})
    model.update({name: torch.nn.Linear(2, 2) for name in ("linear_q_down_proj", "linear_q_up_proj")})
    for module in (experts["linear_fc1"], model["linear_q_down_proj"], model["linear_q_up_proj"]):
        module.parallel_mode, module.weight.tensor_model_parallel = None, True
    model["linear_q_up_proj"].parallel_mode = "column"
    model["core_attention"].register_parameter("softmax_offset", torch.nn.Parameter(torch.zeros(4)))
    repairs.mark_weights_for_the_norm(model)
    marked = {name for name, param in model.named_parameters() if getattr(param, "tensor_model_parallel", False)}
    of_experts = {"mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc1.bias"}
    assert marked == of_experts | {"linear_q_up_proj.weight", "core_attention.softmax_offset"}


# The queue in which the writers of a checkpoint return their results on a CPU


@pytest.mark.parametrize("missing", [1, 20])
def test_an_incomplete_object_of_a_killed_writer_is_not_there(missing):
    results = FileQueue()
    results.put("complete")
    start = os.fstat(results._writer.fileno()).st_size
    results.put("incomplete")
    length = os.fstat(results._writer.fileno()).st_size - missing
    assert length > start
    os.ftruncate(results._writer.fileno(), length)
    os.lseek(results._writer.fileno(), length, os.SEEK_SET)
    assert results.get_nowait() == "complete"
    with pytest.raises(queue.Empty):
        results.get_nowait()
    results.put("the next save")
    assert results.get_nowait() == "the next save"
