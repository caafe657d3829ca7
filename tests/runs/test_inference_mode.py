# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron knows when a pass samples: it then projects the last position alone, and no other pass is taken for one.

Megatron Core before 0.18 looks for an inference context among the arguments of a pass; later versions ask a flag of the
process, `InferenceMode`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tiny_run

from megatron_selfdistill.compat import older_megatron

HAS_FLAG = older_megatron.version() >= (0, 18)


class Pass(NamedTuple):
    """One forward pass of a model."""

    samples: bool
    """Whether it has a cache."""
    active: bool
    """Whether Megatron's flag is set; False where there is none."""
    num_tokens: int
    """The number of tokens of each row."""
    num_logits: int
    """The number of positions of each row that the output layer has projected, where the pass samples."""


def flag() -> bool:
    if not HAS_FLAG:
        return False
    from megatron.core.inference.utils import InferenceMode

    return bool(InferenceMode.is_active())


def passes_of_a_run(arguments: list[str]) -> list[Pass]:
    """Return the forward passes of all models during a run, which must end well."""
    from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
    from megatron.core.models.gpt import GPTModel

    passes, forward = [], GPTModel.forward

    def noted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        active, result = flag(), forward(self, input_ids, *args, **kwargs)
        samples = kwargs.get("inference_context") is not None
        passes.append(Pass(samples, active, input_ids.shape[1], result.shape[1] if samples else 0))
        return result

    assert tiny_run.start_with(arguments, GPTModel, "forward", noted) == 0 and not flag()
    return passes


def test_in_a_run_no_pass_but_those_that_sample_is_taken_for_one(ranks, data, tmp_path):
    options = tiny_run.overrides(data, tmp_path / "run", "num_steps=2", "checkpoint.save_every=0")
    (passes,) = ranks.run(passes_of_a_run, options, world_size=1, init_process_group=False)
    sampling = [each for each in passes if each.samples]
    others = [each for each in passes if not each.samples]
    assert max(each.num_tokens for each in sampling) > 1, "the prompts are read in one pass"
    assert {each.active for each in sampling} == {HAS_FLAG} and {each.num_logits for each in sampling} == {1}
    assert len(others) > 4 and not any(each.active for each in others), "the passes of students and teachers"
