# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The trainer's process beside a real vLLM engine: its state, and the weights that an update writes."""

from __future__ import annotations

import os
import random
from typing import Any
from unittest import mock

import models
import numpy as np
import torch
from colocated import DRAWN, GREEDY, MODELS, TIMEOUT, requests, sampler, streamed
from responses import tokens

from megatron_selfdistill.config import ParallelConfig


def draws() -> tuple[Any, ...]:
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()


def state() -> tuple[Any, ...]:
    return (
        dict(os.environ),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.set_num_threads,
        torch.cuda.Event,
        torch.cuda.current_stream,
        torch.Tensor.pin_memory,
    )


def what_changed() -> None:
    """Return the state of a trainer's process before and after, without a launcher's environment."""
    from megatron_selfdistill.distributed import ranks

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(4)]
    for _ in range(2):  # also where the group of the first run is gone when its sampler is closed
        chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
        before = state()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        with sampler(MODELS["gqa"], chunks, grid, kv_cache_gb=None) as it:
            found = [draws()]
            it.update_weights(1)
            found.append(draws())
            responses = it.generate(requests(), DRAWN)
            found.append(draws())
            assert state() == before
            it.sleep()  # nothing to give back on a CPU
            assert tokens(it.generate(requests(), DRAWN)) == tokens(responses)
            it.close()
            found.append(draws())
            assert found == expected
            assert state() == before
            ones = torch.ones(1)
            torch.distributed.all_reduce(ones)  # the trainer's group goes on
            ranks.shutdown()


def test_random_streams_environment_and_functions_of_torch_are_kept_and_a_second_run_finds_a_clean_process(
    ranks_without_vllm,
):
    ranks_without_vllm.run(what_changed, world_size=1, timeout=TIMEOUT, init_process_group=False)


def slept() -> tuple[list[str], bool, dict[str, float]]:
    """Return the outcome for an engine that can sleep: here it loses its weights by getting others."""
    chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
    happened: list[str] = []
    with sampler(MODELS["gqa"], chunks, grid) as it:
        engine, load = it._engine, it._engine.load
        it.update_weights(6)
        before = it.generate(requests(), DRAWN)
        it.metrics()

        def forget() -> None:
            happened.append("sleep")
            load(((name, torch.zeros_like(tensor)) for name, tensor in streamed(it)), -1)

        def recorded_load(tensors: Any, version: int) -> None:
            happened.append(f"load {version}")
            load(tensors, version)

        engine.can_sleep = True
        engine.sleep, engine.load = forget, recorded_load
        engine.wake = lambda what: happened.append(f"wake {what}")
        it.sleep()
        it.sleep()
        after = it.generate(requests(), DRAWN)
        again = it.generate(requests(), DRAWN)
        it.sleep()
        it.update_weights(7)
        engine.can_sleep = False
        same = tokens(after) == tokens(again) == tokens(before)
        return happened, same and {r.weight_version for r in after} == {6}, it.metrics()


def test_an_engine_that_slept_gets_its_weights_again_before_it_writes(ranks):
    happened, same, metrics = ranks.run(slept, world_size=1, timeout=TIMEOUT)[0]
    cycle = ["sleep", "wake weights", "load 6", "wake kv_cache"]
    assert happened == [*cycle, "sleep", "wake weights", "load 7", "wake kv_cache"]
    assert same
    assert metrics["rollout/sync_bytes"] > 0 and metrics["rollout/sync_seconds"] > 0


def parameters_of(it: Any) -> dict[str, torch.Tensor]:
    return it._engine._llm.apply_model(lambda model: dict(model.named_parameters()))[0]


def updated_twice() -> tuple[list[tuple[int, ...]], bool, int, bool]:
    """Return the shapes of the memory that an update takes, and what became of the parameters.

    After the shapes come: whether all parameters stay in their place; how many parameters have the name of a tensor
    that was sent, and whether each of these parameters holds that tensor.
    """
    import vllm._custom_ops
    from vllm.model_executor.model_loader.reload import meta

    taken: list[tuple[int, ...]] = []
    materialize = meta.materialize_meta_tensor

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        taken.append(tuple(tensor.shape))
        return materialize(tensor)

    with mock.patch.object(vllm._custom_ops, "_supports_onednn", False):  # it would pack weights into others
        chunks, grid = models.build(MODELS["gqa"], ParallelConfig())
        with sampler(MODELS["gqa"], chunks, grid) as it:
            it.update_weights(1)
            before = {name: parameter.data_ptr() for name, parameter in parameters_of(it).items()}
            with torch.no_grad():
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.mul_(1.5)
            with mock.patch.object(meta, "materialize_meta_tensor", noted):
                it.update_weights(2)
            sent = {name: tensor.clone() for name, tensor in streamed(it)}
            live = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
            num_views = sum(tensor.untyped_storage().data_ptr() in live for _, tensor in streamed(it))
            assert num_views > len(sent) // 2  # of the trainer's own weights, which
            with torch.no_grad():  # training then changes, and the engine must not see that
                for chunk in chunks:
                    for parameter in chunk.parameters():
                        parameter.zero_()
            after = parameters_of(it)
            shared = after.keys() & sent.keys()
            stay = before == {name: parameter.data_ptr() for name, parameter in after.items()}
            equal = all(torch.equal(after[name][: len(sent[name])], sent[name]) for name in shared)  # less padding
            assert len(it.generate(requests(), GREEDY)) == len(requests())
    return taken, stay, len(shared), equal


def test_an_update_takes_no_memory_and_leaves_every_parameter_where_it_is(ranks):
    ((taken, stay, num_shared, equal),) = ranks.run(updated_twice, world_size=1, timeout=TIMEOUT)
    assert taken == []
    assert stay and equal and num_shared > 4
