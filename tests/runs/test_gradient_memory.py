# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Gradients take no memory while a colocated engine samples, and steps have the same bits as with that memory.

In the place of vLLM the sampler in process samples, and notes how many bytes the gradients have at each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import overrides

STEPS = 2
SHARDED = "optimizer.use_distributed_optimizer=true"
LAYOUTS = {
    "one rank": (1, []),
    "overlapped": (2, [SHARDED, "optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true"]),
    "experts in bf16": (2, [SHARDED, "optimizer.precision=bf16", "model.num_moe_experts=4"]),
    "adapters": (1, ["adapter.rank=2"]),
}
CASES = ["one rank", *(pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS if name != "one rank")]


def gradient_bytes(chunks: Sequence[Any]) -> int:
    buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    assert buffers
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def trained(arguments: Sequence[str], releases: bool) -> dict[str, Any]:
    """Train; return the bytes of the gradients at each sampling and in each step, the gradients and the weights."""
    from megatron_selfdistill.config import load
    from megatron_selfdistill.data.run_data import RunData
    from megatron_selfdistill.distributed import ranks
    from megatron_selfdistill.engines.vllm import colocated
    from megatron_selfdistill.learner import Learner
    from megatron_selfdistill.rollout.megatron.megatron_sampler import MegatronSampler
    from megatron_selfdistill.trainer import Trainer

    found: dict[str, list[Any]] = {"sampling": [], "training": [], "gradients": [], "weights": []}

    class Colocated(MegatronSampler):
        def __init__(self, weights: Any, grid: Any, hf_config: Path, rollout: Any, **options: Any) -> None:
            self.wrapped = weights._weights._chunks
            found["sampling"].append(gradient_bytes(self.wrapped))
            super().__init__(self.wrapped, grid, options["vocab_size"], options["max_length"], 0.1)

        def generate(self, *arguments: Any) -> Any:
            found["sampling"].append(gradient_bytes(self.wrapped))
            return super().generate(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colocated, "ColocatedSampler", Colocated)
        if not releases:
            patch.setattr(Learner, "release_gradients", lambda learner: None)
        config = load(arguments)
        run_data = RunData.load(config)
        trainer = Trainer(config, run_data, ranks.initialize(config.parallel, config.seed))
        try:
            for _ in range(STEPS):
                batch = trainer.next_batch()
                trainer.measure(batch)
                step = [trainer.forward_backward(batch, trainer.pack(batch))]
                chunks = trainer.learner.chunks
                found["training"].append(gradient_bytes(chunks))
                parameters = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
                found["gradients"].append(flat([p.main_grad for p in parameters]))
                trainer.finish_step(step, trainer.update(step))
                trainer.measure(batch)
                found["weights"].append(flat(parameters))
            empty = replace(batch, contexts=[replace(context, response=[]) for context in batch.contexts])
            step = [trainer.forward_backward(empty, trainer.pack(empty))]
            assert step[0].output is None and trainer.update(step) == {}
            found["sampling"].append(gradient_bytes(chunks))
            resumed = Trainer(config, run_data, trainer.grid)
            found["weights"].append(flat([p for chunk in resumed.learner.chunks for p in chunk.parameters()]))
            resumed.close()
        finally:
            trainer.close()
            ranks.shutdown()
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_released_while_an_engine_samples_and_steps_keep_every_bit(ranks, data, tmp_path, name):
    world_size, layout = LAYOUTS[name]
    found = {}
    for releases in (True, False):
        keys = ["rollout.engine=vllm", "checkpoint.save_every=2", f"num_steps={STEPS}", *layout]
        arguments = overrides(data, tmp_path / str(releases), *keys)
        found[releases] = ranks.run(trained, arguments, releases, world_size=world_size, init_process_group=False)
    for released, kept in zip(found[True], found[False], strict=True):
        assert len(released["sampling"]) == STEPS + 3 and set(released["sampling"]) == {0}
        assert set(kept["sampling"]) == set(kept["training"]) == set(released["training"]) and kept["training"][0] > 0
        for what in ("gradients", "weights"):
            for one, other in zip(released[what], kept[what], strict=True):
                assert one.abs().sum() > 0 and torch.equal(one, other)
