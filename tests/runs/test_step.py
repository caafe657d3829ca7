# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The work that a step of a run does only once, and its waits for the device; when Megatron takes a pass for sampling.

Megatron projects the last position alone in a pass that samples.  Megatron Core before 0.18 looks for an inference
context among the arguments of a pass; later versions ask a flag of the process, `InferenceMode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny_run
from host_traffic import host_traffic

from megatron_selfdistill.compat import older_megatron

READS = ("tolist ", "_local_scalar_dense ", "nonzero ", "masked_select ", "bincount ", "equal ", "cpu ")
# Where host tensors become a `DeviceBatch`, and the optimizer that GPUs have from elsewhere.
NOT_ON_THE_DEVICE = (
    *("megatron_selfdistill/data/packed_batch.py", "megatron_selfdistill/pipeline/batch.py"),
    *("megatron_selfdistill/model/local_attention.py", "megatron/core/optimizer/optimizer.py"),
    "megatron/core/utils.py",
)
HAS_FLAG = older_megatron.version() >= (0, 18)


def flag() -> bool:
    if not HAS_FLAG:
        return False
    from megatron.core.inference.utils import InferenceMode

    return bool(InferenceMode.is_active())


def traffic_and_passes(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[tuple[bool, bool, int, int]]]:
    """Return what the second step exchanges, and of each pass: a cache, Megatron's flag, rows of tokens and logits."""
    from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
    from megatron.core.models.gpt import GPTModel

    from megatron_selfdistill.trainer import Trainer

    found, passes, forward = dict[str, list[str]](), [], GPTModel.forward

    def recorded(name: str, original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            second = self.step == 1
            with host_traffic() as traffic:
                outcome = original(self, *args, **kwargs)
            if second:
                found[name] = [line for line in traffic if not line.rpartition(":")[0].endswith(NOT_ON_THE_DEVICE)]
            return outcome

        return call

    def noted(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        active, result = flag(), forward(self, input_ids, *args, **kwargs)
        samples = kwargs.get("inference_context") is not None
        passes.append((samples, active, input_ids.shape[1], result.shape[1] if samples else 0))
        return result

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pack", "forward_backward", "update", "finish_step"):
            patch.setattr(Trainer, name, recorded(name, getattr(Trainer, name)))
        patch.setattr(GPTModel, "forward", noted)
        assert tiny_run.start(arguments) == 0 and not flag()
    return found, passes


@pytest.fixture(scope="module")
def run(ranks, data, tmp_path_factory):
    options = ["num_steps=3", "checkpoint.save_every=0", "loss.rollout_correction=truncated"]
    arguments = tiny_run.overrides(data, tmp_path_factory.mktemp("step") / "run", *options)
    return ranks.run(traffic_and_passes, arguments, world_size=1, init_process_group=False)[0]


def test_a_step_reads_from_the_device_six_times_beside_sampling(run):
    """They are lengths, counts, tokens, metrics twice and the norm; reads of the optimizer do not count."""
    traffic = {
        part: [line.rpartition(":")[0].rpartition("/")[2] for line in lines if line.startswith(READS)]
        for part, lines in run[0].items()
    }
    assert traffic == {
        "pack": ["integers.py", "integers.py"],
        "forward_backward": ["schedule.py"],
        "update": ["step.py", "clip_grads.py"],
        "finish_step": ["step.py"],
    }


def test_in_a_run_no_pass_but_those_that_sample_is_taken_for_one(run):
    sampling, others = ([each[1:] for each in run[1] if each[0] is samples] for samples in (True, False))
    assert max(num_tokens for _, num_tokens, _ in sampling) > 1, "the prompts are read in one pass"
    assert {(active, num_logits) for active, _, num_logits in sampling} == {(HAS_FLAG, 1)}
    assert len(others) > 4 and not any(active for active, *_ in others), "the passes of students and teachers"
