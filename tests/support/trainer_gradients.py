# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""The gradient of one step on fixed responses: by the pipeline of this project, and by the loop of Megatron-LM.

Both return name of a tensor of the Hugging Face directory -> gradient of the mean loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hf_models
import models
import torch
from torch import Tensor

from megatron_selfdistill.compat import repairs  # noqa: F401  isort: skip  (must come before megatron.core)
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_selfdistill.config import OptimizerConfig, ParallelConfig
from megatron_selfdistill.data.contexts import ContextPair
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.interop.export import Exporter
from megatron_selfdistill.interop.hf.rules import Rule
from megatron_selfdistill.loss import Divergence, Target, VocabShard
from megatron_selfdistill.model.build import wrap_for_training
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.pipeline import schedule, token_losses
from megatron_selfdistill.pipeline.batch import pack_everywhere
from megatron_selfdistill.pipeline.configured_packing import packing_of_model
from megatron_selfdistill.pipeline.schedule import Reference

PROMPTS = [[5, 9, 2, 40], [7, 7, 31], [90, 12, 3, 3, 8]]
HINTED = [[5, 9, 2, 40, 66, 17, 4], [7, 7, 31, 50, 1], [90, 12, 3, 3, 8, 99, 98, 97, 2]]
RESPONSES = [[11, 60, 3, 82, 1], [23, 1], [44, 45, 46, 1]]
"""The tokens of three problems, of different lengths; each response ends with the token `END`."""
END = 1


def write_model(directory: Path) -> Path:
    """Write a random Qwen3 whose responses end with `END`; return the directory."""
    hf_models.write("qwen3", directory, eos_token_id=END, pad_token_id=0)
    return directory


def word_tokenizer() -> Any:
    """Return a tokenizer of the tokens <0> to <100>, one per word; other words are <0>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast  # which takes a second in each process that collects tests

    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(101)}, unk_token="<0>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"<{END}>", pad_token="<0>", unk_token="<0>")


def by_the_pipeline(directory: Path) -> dict[str, Tensor]:
    """Return the gradients of one step of the schedule; student, teacher and reference have the same weights."""
    student, frozen, grid, rules = _both(directory, ParallelConfig())
    texts = enumerate(zip(PROMPTS, HINTED, RESPONSES, strict=True))
    contexts = [ContextPair(str(i), *of_one, truncated=False) for i, of_one in texts]
    config = unwrapped(frozen[0]).config
    packing = packing_of_model(config, max_tokens=64, pair_order="alternating", with_teacher=True, with_reference=True)
    vocab = VocabShard.from_group(unwrapped(student[-1]).vocab_size, hf_models.VOCAB_SIZE, grid.tp_group)
    loss = token_losses.self_distillation(Target(), Divergence())
    batch, teacher = pack_everywhere(contexts, packing, grid), schedule.ScheduledTeacher(frozen)
    schedule.run(student, teacher, batch, loss, grid, vocab, reference=Reference(Target(), frozen))
    return _gradients(student, grid, rules)


def by_the_loop_of_megatron(directory: Path, parallel: ParallelConfig) -> dict[str, Tensor]:
    """Return the gradients of one step of Megatron Core's schedule with the forward_step of examples/trainers."""
    from trainers.megatron_lm import forward_step

    from _lib.megatron_loop import batch_of

    student, frozen, grid, rules = _both(directory, parallel)
    unwrapped(student[0]).config.finalize_model_grads_func = finalize_model_grads
    batch = batch_of(list(zip(PROMPTS, HINTED, strict=True)), RESPONSES, multiple=2)
    step = partial(forward_step, frozen=frozen[0], vocab_size=hf_models.VOCAB_SIZE)
    sizes = {"num_microbatches": 1, "seq_length": batch["tokens"].size(1), "micro_batch_size": len(PROMPTS)}
    run = get_forward_backward_func()
    run(forward_step_func=step, data_iterator=iter([batch]), model=student, forward_only=False, **sizes)
    return _gradients(student, grid, rules)


def _both(directory: Path, parallel: ParallelConfig) -> tuple[Any, Any, RankGrid, list[Rule]]:
    """Return the model wrapped for training, a frozen copy, the rank grid, and the rules of the family."""
    _, model, rules, tensors = hf_models.read(directory)
    student, grid = models.build(model, parallel, seed=None)
    frozen, _ = models.build(model, parallel, seed=None)
    for chunks in (student, frozen):
        hf_models.fill(chunks, rules, tensors)
    wrapped = list(wrap_for_training(student, OptimizerConfig(precision="fp32")))
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    return wrapped, [chunk.requires_grad_(False).eval() for chunk in frozen], grid, rules


def _gradients(student: Sequence[torch.nn.Module], grid: RankGrid, rules: Sequence[Rule]) -> dict[str, Tensor]:
    for chunk in student:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
    return {name: tensor.clone() for bucket in Exporter(student, grid, rules).stream() for name, tensor in bucket}


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that the gradients of all tensors are the expected ones, up to the rounding of float32."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5 * largest, msg=name)
