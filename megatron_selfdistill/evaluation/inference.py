# Copyright (c) 2026 the megatron_selfdistill authors. Apache-2.0.
"""A model that only generates: weights from a checkpoint and a sampler, without optimizer and teacher."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megatron_selfdistill.checkpoint.trained_weights import as_stored, loaded_chunks
from megatron_selfdistill.config import Config
from megatron_selfdistill.data.problems import Problem
from megatron_selfdistill.data.run_data import RunData
from megatron_selfdistill.distributed.ranks import RankGrid
from megatron_selfdistill.loss.sharded.vocab_parallel import VocabShard
from megatron_selfdistill.metrics.phases import Phases
from megatron_selfdistill.model.forward import unwrapped
from megatron_selfdistill.model.output_layer import decided_output_layer
from megatron_selfdistill.pipeline.score import ScoringModels, sequence_for
from megatron_selfdistill.rollout.base import Request, Response, Sampler, SamplingParams
from megatron_selfdistill.rollout.factory import make_sampler, sampling_params
from megatron_selfdistill.rollout.sampling import sample_seed


@dataclass(frozen=True)
class Inference:
    """The model and its sampler on this rank."""

    chunks: list[torch.nn.Module]
    vocab: VocabShard
    sampler: Sampler
    sampling: SamplingParams

    def first_samples(
        self, problems: Sequence[Problem], prompts: Sequence[list[int]], seed: int, grid: RankGrid
    ) -> list[Response]:
        """Return a response to each of this replica's problems: the sample that an evaluation draws first.

        ``prompts``: one per problem.  A replica has every dp_size-th problem.  ``seed``: that of the configuration.
        Every rank of the world calls this method.  Raises: `EngineError`.
        """
        own = list(zip(problems, prompts, strict=True))[grid.dp_rank :: grid.dp_size]
        requests = [Request(prompt, sample_seed(seed, 0, f"eval/{it.id}", 0)) for it, prompt in own]
        return self.sampler.generate(requests, self.sampling)

    def as_both_models(self, config: Config, prompts: Iterable[Sequence[int]], grid: RankGrid) -> ScoringModels:
        """Return the model as student and teacher, with packed sequences that hold a response after every prompt."""
        return ScoringModels(
            student=self.chunks,
            teacher=self.chunks,
            grid=grid,
            vocab=self.vocab,
            max_tokens=sequence_for(max(map(len, prompts)) + config.rollout.max_new_tokens, grid),
            fusion=decided_output_layer(config, self.chunks).fusion,
            backend=config.loss.backend,
        )


@contextmanager
def open_inference(
    config: Config, run_data: RunData, grid: RankGrid, phases: Phases | None = None
) -> Iterator[Inference]:
    """Open the model of ``checkpoint.load`` with the sampler of ``rollout``, and close the sampler at the end.

    The reporter prints the tokens that end a response, and warnings about the prompts, to standard error.
    The weights are random if ``checkpoint.load`` is null.  ``phases``: hears of the loading and of finished responses.
    Every rank of the world enters and leaves this context.  Raises: `ConfigError`, `CheckpointError`.
    """
    phases = phases or Phases(grid.device)
    if grid.is_reporter:
        print(*filter(None, (run_data.ends.about, run_data.about_prompts)), sep="\n", file=sys.stderr)
    with phases("loading the model"):
        config = as_stored(config)
        chunks = loaded_chunks(config, grid, run_data.vocab_size, config.checkpoint.load)
        vocab = VocabShard.from_group(unwrapped(chunks[-1]).vocab_size, run_data.vocab_size, grid.tp_group)
        sampler = make_sampler(config, run_data, chunks, grid, progress=phases.counted)
    try:
        sampler.update_weights(0)
        yield Inference(chunks, vocab, sampler, sampling_params(config, run_data))
    finally:
        sampler.close()
