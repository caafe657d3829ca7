# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Recorded passes: each pass is one that a CUDA graph could repeat, and gives the responses of other passes."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from decoding import GREEDY, NEW_TOKENS, make_requests, sampler_of
from models import build, model_config, parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")
"""Parts of the names of operations whose result the host waits for."""


class Operations(TorchDispatchMode):
    """The operations of a pass: names, numbers, shapes, and the addresses of the tensors that it has not made itself.

    A CUDA graph repeats exactly these, so that they must be equal in the passes that one recording stands for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}  # address -> what keeps it from being used again
        self.log: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, given = func(*args, **(kwargs or {})), tree_leaves((args, kwargs))
        self.log.append((str(func), *map(self._shown, given)))
        read = {_address(x) for x in given if isinstance(x, torch.Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and _address(x) not in read]
        self.made |= {_address(x): x for x in made}
        return result

    def _shown(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return str(value)
        return tuple(value.shape), value.stride(), None if (at := _address(value)) in self.made else at


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def operations_of(records: bool, window: list[int] | None = None) -> list[tuple[int, list[tuple[Any, ...]]]]:
    [model], grid = build(model_config("gqa", transformer={"window_size": window}), parallel())
    sampler, found = sampler_of([model], grid, cuda_graphs=records), []
    run = sampler._passes.run

    def logged(model: Any, context: Any, given: torch.Tensor) -> Any:
        if not getattr(context, "decodes", False):
            return run(model, context, given)
        with Operations() as operations:
            logits = run(model, context, given)
        found.append((len(given), operations.log))
        return logits

    sampler._passes.run = logged  # type: ignore[method-assign]
    sampler.generate(make_requests(), GREEDY)
    return found


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.full), [5, 0]])
def test_passes_of_one_recording_do_the_same_at_the_same_addresses_and_wait_for_nothing(ranks, window):
    [recorded] = ranks.run(operations_of, True, window, world_size=1)
    assert len(recorded) == NEW_TOKENS - 1
    assert all(passed == recorded[0] for passed in recorded)
    names = [[name for name, *_ in log] for _, log in recorded]
    assert not [name for of_pass in names for name in of_pass if any(waits in name for waits in WAITS)]
    assert all(of_pass.count("aten.cos.default") == 1 for of_pass in names), "one rotary table for all layers"


def test_other_passes_grow_so_that_no_graph_could_repeat_them(ranks):
    [grown] = ranks.run(operations_of, False, world_size=1)
    assert len(grown) == NEW_TOKENS - 1 and all(passed != grown[0] for passed in grown[1:])


def decoded_without_graphs(kind: str, config: Any) -> tuple[bool, str]:
    chunks, grid = build(model_config(kind), config)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = sampler_of(chunks, grid, cuda_graphs=True).generate(make_requests(), GREEDY)
    return found == sampler_of(chunks, grid).generate(make_requests(), GREEDY), said.getvalue()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("moe", parallel()), pytest.param("gated_delta", parallel(), marks=pytest.mark.full), ("shallow", parallel(pp=2))],
)
def test_a_model_whose_passes_differ_decodes_without_graphs_and_says_so_once(ranks, kind, layout):
    results = ranks.run(decoded_without_graphs, kind, layout, world_size=layout.pipeline_model_parallel_size)
    assert all(same for same, _ in results)
    assert "".join(said for _, said in results).count("rollout.cuda_graphs: this model decodes without graphs") == 1
