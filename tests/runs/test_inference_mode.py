# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""Megatron knows when a pass samples: it then projects the last position alone, and no other pass is taken for one.

Megatron Core before 0.18 looks for an inference context among the arguments of a pass; later versions ask a flag of the
process, `InferenceMode`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tiny_run
from decoding import GREEDY, make_requests, sampler_of
from models import build, model_config, parallel

from megatron_selfdistill.compat import older_megatron

HAS_FLAG = older_megatron.version() >= (0, 18)


class Pass(NamedTuple):
    """One forward pass of a model."""

    samples: bool
    """Whether it has a cache."""
    active: bool
    """Whether Megatron's flag is set."""
    num_tokens: int
    """The number of tokens of each row."""
    num_logits: int
    """The number of positions of each row that the output layer has projected, where the pass samples."""


def flag() -> bool:
    """Return Megatron's flag; False where there is none."""
    if not HAS_FLAG:
        return False
    from megatron.core.inference.utils import InferenceMode

    active: bool = InferenceMode.is_active()
    return active


def passes_of(work: Callable[[], Any]) -> list[Pass]:
    """Return the forward passes of all models while ``work`` runs."""
    from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
    from megatron.core.models.gpt import GPTModel

    passes: list[Pass] = []
    forward = GPTModel.forward

    def noted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        active, result = flag(), forward(self, input_ids, *args, **kwargs)
        samples = kwargs.get("inference_context") is not None
        passes.append(Pass(samples, active, input_ids.shape[1], result.shape[1] if samples else 0))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPTModel, "forward", noted)
        work()
    return passes


def check(passes: list[Pass]) -> None:
    """Assert that every pass that samples has the flag and projects one position, and that no other pass has it."""
    sampling = [each for each in passes if each.samples]
    assert max(each.num_tokens for each in sampling) > 1, "the prompts are read in one pass"
    assert {each.active for each in sampling} == {HAS_FLAG} and not flag()
    assert {each.num_logits for each in sampling} == {1}
    assert {each.active for each in passes if not each.samples} <= {False}


def passes_of_a_run(arguments: list[str]) -> list[Pass]:
    """Return the passes of a run, which must end well."""
    statuses: list[int] = []
    passes = passes_of(lambda: statuses.append(tiny_run.start(arguments)))
    assert statuses == [0] and not flag()
    return passes


def test_in_a_run_no_pass_but_those_that_sample_is_taken_for_one(ranks, data, tmp_path):
    options = tiny_run.overrides(data, tmp_path / "run", "num_steps=2", "checkpoint.save_every=0")
    (passes,) = ranks.run(passes_of_a_run, options, world_size=1, init_process_group=False)
    check(passes)
    assert len([each for each in passes if not each.samples]) > 4, "the passes of students and teachers"


def passes_of_equal_prompts() -> list[Pass]:
    """Return the passes that sample after prompts of one length, whose cache has no rows of its own."""
    [model], grid = build(model_config("shallow"), parallel())
    requests = [dataclasses.replace(request, prompt=request.prompt[:3]) for request in make_requests()]
    return passes_of(lambda: sampler_of([model], grid).generate(requests, GREEDY))


def test_after_prompts_of_one_length_the_last_position_alone_is_projected(ranks):
    check(ranks.run(passes_of_equal_prompts, world_size=1)[0])


def flag_around_an_error() -> list[bool]:
    """Return the flag before, during and after a pass that samples and fails."""
    [model], grid = build(model_config("shallow"), parallel())
    sampler, seen = sampler_of([model], grid), [flag()]

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append(flag())
        raise RuntimeError("out of memory")

    model.embedding.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        sampler.generate(make_requests(), GREEDY)
    return [*seen, flag()]


def test_a_sampling_pass_that_fails_leaves_no_flag(ranks):
    assert ranks.run(flag_around_an_error, world_size=1) == [[False, HAS_FLAG, False]]
