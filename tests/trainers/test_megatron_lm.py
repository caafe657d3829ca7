# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The forward_step for Megatron-LM makes the gradient of this project's pipeline, also on shards of the vocabulary."""

from __future__ import annotations

import pytest
import trainer_gradients
from models import parallel


@pytest.mark.full
@pytest.mark.parametrize("layout", [parallel(), parallel(tp=2), parallel(tp=2, sp=True)], ids=["TP1", "TP2", "TP2+SP"])
def test_the_loop_of_megatron_core_has_the_gradient_of_the_pipeline(ranks, tiny_qwen3, expected, layout):
    world_size = layout.tensor_model_parallel_size
    for gradients in ranks.run(trainer_gradients.by_the_loop_of_megatron, tiny_qwen3, layout, world_size=world_size):
        trainer_gradients.assert_gradients(gradients, expected)


def test_a_second_pipeline_stage_is_refused(ranks, tiny_qwen3):
    with pytest.raises(Exception, match="expected pipeline_model_parallel_size=1"):
        ranks.run(trainer_gradients.by_the_loop_of_megatron, tiny_qwen3, parallel(pp=2), world_size=2)


def steps_of_the_page() -> list[float]:
    from trainers.megatron_lm import main

    return main(num_steps=2)


def test_the_file_of_the_page_trains_as_it_stands(ranks):
    ((first, second),) = ranks.run(steps_of_the_page, world_size=1, init_process_group=False)
    assert first > 0 and second > 0 and abs(second - first) > 1e-3 * first
